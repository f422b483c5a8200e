"""The digest of a mechanism changes with whatever changes the promise or its keeping, and with nothing else."""

import pytest

from fedmentor_core.audit import mechanism as module
from fedmentor_core.audit.mechanism import Mechanism
from fedmentor_core.config_io import validate_config

SHA = "a" * 64


@pytest.fixture
def mechanism(tiny_study):
    def of(**changes) -> Mechanism:
        raw = {**tiny_study}
        for key, value in changes.items():
            raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
        return Mechanism.of(validate_config(raw), SHA)

    return of


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"rounds": 3}, "rounds"),
        ({"training": {"steps_per_round": 3}}, "training.steps_per_round"),
        ({"training": {"rows_per_unit": "all"}}, "training.rows_per_unit"),
        ({"adapter": {"target_modules": ["q_proj"]}}, "adapter.target_modules"),
        ({"adaptation": {"gamma": 0.5}}, "adaptation.gamma"),
        ({"privacy": {"reserve_fraction": 0.3}}, "privacy.reserve_fraction"),
        ({"privacy": {"noise_seed": 1}}, "privacy.noise_seed"),
        ({"privacy": {"planned_runs": 30}}, "privacy.planned_runs"),
    ],
)
def test_what_changes_the_mechanism_changes_the_digest(mechanism, changes, name):
    found = mechanism(**changes)
    assert found.sha256 != mechanism().sha256
    assert [line.split(":")[0] for line in found.differences(mechanism())] == [name]


def test_budgets_and_clip_norms_count_as_they_apply(mechanism, tiny_study):
    by_policy = mechanism(privacy={"epsilon_by_sensitivity": {"low": 8.0, "medium": 6.0, "high": 3.0}})
    assert by_policy.differences(mechanism()) == ("domains.two.epsilon: 3.0 / 4.0",)
    outright = [tiny_study["domains"][0], {**tiny_study["domains"][1], "epsilon": 4.0}]
    del outright[1]["sensitivity"]
    assert mechanism(domains=outright).sha256 == mechanism().sha256
    clipped = mechanism(privacy={"clip_norm": 0.5})
    assert clipped.differences(mechanism()) == ("domains.one.clip_norm: 0.5 / 1.0", "domains.two.clip_norm: 0.5 / 1.0")


def test_a_sites_own_floor_counts(mechanism, tiny_study, tmp_path):
    policy = tmp_path / "one.yaml"
    policy.write_text("domain: one\nepsilon: 8.0\nmin_noise_multiplier: 2.5\n", encoding="utf-8")
    domains = [{**tiny_study["domains"][0], "policy_file": str(policy)}, tiny_study["domains"][1]]
    assert mechanism(domains=domains).differences(mechanism()) == ("domains.one.min_noise_multiplier: 2.5 / 0.3",)


def test_places_names_and_evaluation_do_not_count(mechanism):
    elsewhere = mechanism(
        name="another",
        privacy={"ledger_url": "file:///elsewhere"},
        storage={"url": "file:///elsewhere"},
        evaluation={"max_new_tokens": 4},
        execution={"max_parallel_clients": 2},
        audit={"before_promotion": True},
    )
    assert elsewhere.sha256 == mechanism().sha256


def test_another_version_backbone_or_domain_is_another_mechanism(mechanism, tiny_study, monkeypatch):
    here = mechanism()
    assert here.domains == {"one", "two"}
    other = Mechanism.of(validate_config(tiny_study), "b" * 64)
    assert [line.split(":")[0] for line in other.differences(here)] == ["backbone.sha256"]
    fewer = mechanism(domains=tiny_study["domains"][:1])
    assert all(line.startswith("domains.two.") and line.endswith("/ (none)") for line in here.differences(fewer))
    monkeypatch.setattr(module, "__version__", "0.0.0")
    assert [line.split(":")[0] for line in mechanism().differences(here)] == ["fedmentor"]
