"""Arms as derived studies, the grid's order, and what is refused before anything is read."""

from typing import Any

import pytest

from fedmentor_core.compare.arms import ARM_NAMES, POOLED, cell_config, find_arm
from fedmentor_core.compare.grid import config_of, plan_grid
from fedmentor_core.compare.public import refuse_unless_public, statements
from fedmentor_core.compare.records import Cell
from fedmentor_core.compare.settings import CompareSettings
from fedmentor_core.config import StudyConfig
from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import ConfigError
from flows.compare_cli import settings_of


@pytest.fixture
def study(tiny_study: dict[str, Any]) -> StudyConfig:
    tiny_study["adaptation"] = {"rule": "decreasing", "gamma": 0.9}
    tiny_study["privacy"] = {"clip_norm": 0.5}
    return validate_config(tiny_study)


def changed(config: StudyConfig, base: StudyConfig) -> dict[str, Any]:
    """Every field in which two studies differ, by dotted name."""

    def flat(value: Any, prefix: str) -> dict[str, Any]:
        if isinstance(value, dict):
            return {k: v for name, part in value.items() for k, v in flat(part, f"{prefix}{name}.").items()}
        return {prefix[:-1]: value}

    def plain(one: StudyConfig) -> dict[str, Any]:
        raw = one.model_dump(mode="json")
        raw["domains"] = {domain["name"]: domain for domain in raw["domains"]}
        return flat(raw, "")

    ours, theirs = plain(config), plain(base)
    return {name: ours.get(name) for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)}


def test_every_arm_changes_only_what_its_title_says(study: StudyConfig) -> None:
    common = {"evaluation.thresholds": [], "execution.isolation": "none"}
    golden = {
        "base": {"name": "base", "privacy.mode": "none"},
        "local": {"name": "local", "privacy.mode": "none"},
        "federated": {"name": "federated", "privacy.mode": "none"},
        "uniform": {
            "name": "uniform",
            "adaptation.rule": "fixed",
            "domains.one.epsilon": 4.0,
            "domains.two.epsilon": 4.0,
            "domains.two.sensitivity": None,
        },
        "fedmentor-fixed": {"name": "fedmentor-fixed", "adaptation.rule": "fixed"},
        "fedmentor": {"name": "fedmentor"},
    }
    for name, expected in golden.items():
        assert changed(cell_config(study, find_arm(name), study.seed), study) == common | expected, name
    assert {*golden, "centralized"} == set(ARM_NAMES)

    pooled = cell_config(study, find_arm("centralized"), study.seed)
    assert [domain.name for domain in pooled.domains] == [POOLED]
    assert pooled.training.batch_size == 2 * study.training.batch_size
    assert pooled.training.steps_per_round == study.training.steps_per_round
    assert pooled.privacy.mode == "none"


def test_adaptive_means_adaptive(study: StudyConfig) -> None:
    fixed = study.model_copy(update={"adaptation": study.adaptation.model_copy(update={"rule": "fixed"})})
    assert cell_config(fixed, find_arm("fedmentor"), 0).adaptation.rule == "paper"
    assert cell_config(study, find_arm("fedmentor"), 0).adaptation.rule == "decreasing"


def test_every_derived_study_is_one_that_validation_admits(study: StudyConfig) -> None:
    for name in ARM_NAMES:
        derived = cell_config(study, find_arm(name), 5)
        assert StudyConfig.model_validate(derived.model_dump()) == derived


def test_noise_aware_weights_need_noise(tiny_study: dict[str, Any]) -> None:
    tiny_study["aggregation"] = {"weights": "noise-aware"}
    study = validate_config(tiny_study)
    assert cell_config(study, find_arm("federated"), 0).aggregation.weights == "units"
    assert cell_config(study, find_arm("fedmentor"), 0).aggregation.weights == "noise-aware"


def test_a_seed_changes_the_study_and_not_the_split(study: StudyConfig) -> None:
    one, two = (cell_config(study, find_arm("federated"), seed) for seed in (3, 4))
    assert changed(one, two) == {"seed": 3}


def test_the_grid_is_in_an_order_that_can_be_cut_short(study: StudyConfig) -> None:
    settings = CompareSettings(arms=("fedmentor", "federated", "uniform"), seeds=2, budgets=(8.0, 2.0, 4.0))
    assert [str(cell) for cell in plan_grid(study, settings)] == [
        "federated, seed 3", "uniform, seed 3", "fedmentor, seed 3",
        "federated, seed 4", "uniform, seed 4", "fedmentor, seed 4",
        "uniform at epsilon 2, seed 3", "uniform at epsilon 8, seed 3",  # 4 is the arm 'uniform' itself
    ]  # fmt: skip
    assert len(CompareSettings().budgets) >= 5
    assert len(plan_grid(study, CompareSettings())) == 7 * 3 + 4


def test_budgets_reach_the_domains(study: StudyConfig) -> None:
    settings = CompareSettings(uniform_epsilon=1.5)
    own = config_of(study, settings, Cell(arm="uniform", seed=0))
    point = config_of(study, settings, Cell(arm="uniform", seed=0, epsilon=2.5))
    assert [own.epsilon_of(domain) for domain in own.domains] == [1.5, 1.5]
    assert [point.epsilon_of(domain) for domain in point.domains] == [2.5, 2.5]
    cell = Cell(arm="fedmentor", seed=0, epsilon=2.5)
    derived = config_of(study, settings, cell)
    assert {derived.epsilon_of(domain) for domain in derived.domains} == {2.5}


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"arms": ("base", "federatd")}, "Did you mean 'federated'"),
        ({"arms": ("base", "local")}, "against 'federated' is not among the arms"),
        ({"arms": ("base", "base", "federated")}, "repeated: base"),
        ({"seeds": 0}, "--seeds"),
        ({"budgets": (0.0,)}, "--budgets"),
        ({"frontier_arm": "federated"}, "not a private federated arm"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError) as refused:
        settings_of(given)
    assert word in str(refused.value)


def _with(study: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *parents, last = path.split(".")
    node: Any = study
    for part in parents:
        node = node[int(part)] if part.isdigit() else node.setdefault(part, {})
    node[last] = value
    return study


CSV_SOURCE = {"kind": "csv", "path": "x.csv", "columns": {"post": "p", "response": "r", "question_text": "q?"}}


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        ("domains.0.source", CSV_SOURCE, "is the data of one public"),
        ("domains.0.policy_file", "policy.yaml", "policy of their own"),
        ("evaluation.gate_data", "private", "gate_data"),
        ("privacy.noise_seed", 1, "noise_seed"),
        ("privacy.ledger_url", "file:///ledgers", "lifetime accounts"),
        ("adaptation.relative_to", "reference", "relative_to"),
    ],
)
def test_what_must_not_be_compared_on_is_refused(tiny_study: dict[str, Any], path: str, value: Any, word: str) -> None:
    tiny_study["tracking"] = {"reference_run_id": "abc"}
    config = validate_config(_with(tiny_study, path, value))
    with pytest.raises(ConfigError) as refused:
        refuse_unless_public(config, stated=False)
    assert word in str(refused.value)
    may_be_stated = path in ("domains.0.source", "privacy.ledger_url")
    if may_be_stated:
        refuse_unless_public(config, stated=True)
        assert statements(config, stated=True), "and every output says so"
    else:
        with pytest.raises(ConfigError):
            refuse_unless_public(config, stated=True)


def test_data_at_sites_is_never_compared_on(tiny_study: dict[str, Any]) -> None:
    tiny_study["sites"] = {"north": {"public_key": "0" * 64}}
    tiny_study["domains"][0] |= {"source": {"kind": "site"}, "site": "north"}
    with pytest.raises(ConfigError, match="at sites"):
        refuse_unless_public(validate_config(tiny_study), stated=True)


def test_invented_text_and_known_corpora_need_no_statement(tiny_study: dict[str, Any]) -> None:
    tiny_study["domains"][0]["source"] = {"kind": "dreaddit"}
    config = validate_config(tiny_study)
    refuse_unless_public(config, stated=False)
    assert statements(config, stated=False) == ()
