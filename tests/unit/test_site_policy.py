"""The site is sovereign: each limit of its policy holds in the plan and again before every round."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedmentor_core import client_round
from fedmentor_core.client_round import run_client
from fedmentor_core.config import AdapterConfig
from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import BudgetError, ConfigError
from fedmentor_core.privacy.policy import AllowedAdapters, SitePolicy, load_policy, policy_refusal, study_refusals
from fedmentor_core.records import ClientAssignment, DomainPlan
from fedmentor_core.rounds import RoundState, assignments_for
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
BACKBONE = "b" * 64


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("fedmentor_core.privacy.plan.epsilon_prv", lambda *_: 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def policy(**changes: Any) -> SitePolicy:
    """One that allows exactly what ``plan`` and ``adapter`` below ask for."""
    limits: dict[str, Any] = {
        "domain": "one", "epsilon": 8.0, "delta": 1e-5, "validation_epsilon": 1.0, "min_noise_multiplier": 0.7,
        "clip_norm": 0.5, "max_sample_rate": 0.1, "max_steps_per_round": 4, "allowed_backbones": [BACKBONE],
        "allowed_adapters": {"train": ["b"], "max_rank": 8, "target_modules": ["q_proj", "v_proj"]},
    }  # fmt: skip
    return SitePolicy.model_validate(limits | changes)


def plan(**changes: Any) -> DomainPlan:
    asked: dict[str, Any] = {
        "domain": "one", "n_units": 100, "sample_rate": 0.1, "steps_per_round": 4, "rounds": 2,
        "noise_multiplier": 0.8, "min_noise_multiplier": 0.7, "clip_norm": 0.5, "delta": 1e-5, "sensitivity": None,
        "epsilon_budget": 8.0, "epsilon_planned_rdp": 7.0, "epsilon_planned_prv": 6.0, "rdp_order": 4.0,
        "rdp_budget": 3.0, "reserve_fraction": 0.1, "dataset_fingerprint": "f" * 64, "bytes_up_per_round": 1,
        "bytes_down_per_round": 1,
    }  # fmt: skip
    return DomainPlan.model_validate(asked | changes)


def assignment(**changes: Any) -> ClientAssignment:
    asked: dict[str, Any] = {
        "run_id": "run", "round_index": 0, "domain": "one", "noise_multiplier": 0.8, "sample_rate": 0.1, "steps": 4,
        "clip_norm": 0.5, "global_adapter": {"key": "k", "sha256": "a" * 64, "n_bytes": 1},
    }  # fmt: skip
    return ClientAssignment.model_validate(asked | changes)


ADAPTER = AdapterConfig(rank=8, train="b", target_modules=("q_proj", "v_proj"))


def test_what_the_policy_allows_to_the_letter_is_admitted() -> None:
    assert study_refusals(policy(), plan(), BACKBONE, ADAPTER, is_private=True) == ()
    assert policy_refusal(policy(), plan(), assignment(), BACKBONE, ADAPTER, is_private=True) is None
    assert (
        policy_refusal(policy(), plan(), assignment(noise_multiplier=0.7), BACKBONE, ADAPTER, is_private=True) is None
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epsilon": 7.9}, "epsilon 8 asked for, the site allows 7.9"),
        ({"delta": 9e-6}, "delta 1e-05 asked for"),
        ({"clip_norm": 0.4}, "clip norm 0.5 asked for"),
        ({"max_sample_rate": 0.09}, "sample rate 0.1 asked for"),
        ({"max_steps_per_round": 3}, "steps a round 4 asked for"),
        ({"allowed_backbones": ["c" * 64]}, "backbone bbbbbbbbbbbb asked for"),
        ({"allowed_adapters": {"train": ["both"]}}, "adapter.train 'b' asked for"),
        ({"allowed_adapters": {"max_rank": 4}}, "adapter.rank 8 asked for"),
        ({"allowed_adapters": {"target_modules": ["q_proj"]}}, "adapter.target_modules v_proj asked for"),
        ({"privacy_level": "client"}, "the site demands 'client'"),
    ],
    ids=str,
)
def test_each_limit_refuses_a_study_by_itself(changes: dict, said: str) -> None:
    refusals = study_refusals(policy(**changes), plan(), BACKBONE, ADAPTER, is_private=True)
    assert len(refusals) == 1
    assert said in refusals[0]
    assert policy_refusal(policy(**changes), plan(), assignment(), BACKBONE, ADAPTER, is_private=True) == refusals[0]


def test_validation_budgets_runs_without_privacy_and_unnamed_modules_are_limited_too() -> None:
    gate = {
        "account": "one.gate", "split": "gate", "n_units": 9, "releases": 3, "noise_multiplier": 5.0, "metric_std": 0.1,
        "epsilon_budget": 1.5, "delta": 1e-5, "epsilon_spent_before": 0.0, "epsilon_planned": 1.0, "rdp_order": 4.0,
        "rdp_budget": 0.5, "run_rdp_budget": 0.5, "dataset_fingerprint": "e" * 64,
    }  # fmt: skip
    asked = plan(validation=[gate])
    assert "one.gate" in study_refusals(policy(), asked, BACKBONE, ADAPTER, is_private=True)[0]
    assert study_refusals(policy(validation_epsilon=None), asked, BACKBONE, ADAPTER, is_private=True) == ()
    assert "not private" in study_refusals(policy(), plan(), BACKBONE, ADAPTER, is_private=False)[0]
    assert study_refusals(policy(allow_not_private=True), plan(), BACKBONE, ADAPTER, is_private=False) == ()
    everything = ADAPTER.model_copy(update={"target_modules": "all-linear"})
    assert "all-linear" in study_refusals(policy(), plan(), BACKBONE, everything, is_private=True)[0]
    free = policy(allowed_adapters=AllowedAdapters(), allowed_backbones=None)
    assert study_refusals(free, plan(), "anything", everything, is_private=True) == ()


@pytest.mark.parametrize(
    "wish",
    [
        {"noise_multiplier": None}, {"noise_multiplier": 0.0}, {"noise_multiplier": 0.69},
        {"noise_multiplier": math.nan}, {"noise_multiplier": math.inf}, {"sample_rate": 0.05}, {"sample_rate": 0.2},
        {"clip_norm": 0.6}, {"clip_norm": 0.1}, {"steps": 5}, {"steps": 0}, {"steps": -1},
    ],
    ids=str,
)  # fmt: skip
def test_a_round_must_be_the_one_that_was_planned(wish: dict) -> None:
    refusal = policy_refusal(policy(), plan(), assignment(**wish), BACKBONE, ADAPTER, is_private=True)
    assert refusal is not None
    assert "asked for" in refusal


def test_the_higher_of_two_floors_holds() -> None:
    low, high = policy(min_noise_multiplier=0.1), policy(min_noise_multiplier=0.9)
    asked = assignment(noise_multiplier=0.6)
    assert "floor is 0.7" in str(policy_refusal(low, plan(), asked, BACKBONE, ADAPTER, is_private=True))
    assert "floor is 0.9" in str(policy_refusal(high, plan(), assignment(), BACKBONE, ADAPTER, is_private=True))


def test_digest_names_what_the_policy_says_not_how_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("domain: one\nepsilon: 4\n", encoding="utf-8")
    other = tmp_path / "other.yaml"
    other.write_text("# the same\nepsilon: 4.0\ndomain: one\nallow_not_private: false\n", encoding="utf-8")
    assert load_policy(path, "one").sha256 == load_policy(other, "one").sha256
    other.write_text("epsilon: 4.1\ndomain: one\n", encoding="utf-8")
    assert load_policy(path, "one").sha256 != load_policy(other, "one").sha256


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "policy file of domain 'one' not found"),
        ("epsilon: [", "is not valid YAML"),
        ("- 1", "must hold a mapping"),
        ("domain: one", "epsilon: is required and missing"),
        ("domain: one\nepsilon: 0", "greater than 0"),
        ("domain: one\nepsilon: 4\nmax_sample_rat: 0.1", "did you mean 'max_sample_rate'"),
        ("domain: one\nepsilon: 4\nallowed_adapters: {rank: 4}", "allowed_adapters.rank: unknown key"),
        ("domain: one\nepsilon: .nan", "finite number"),
        ("domain: two\nepsilon: 4", "is the policy of domain 'two'"),
    ],
)
def test_policy_file_that_cannot_be_used_says_why(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "policy.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        load_policy(path, "one")
    assert said in str(refused.value)


def test_example_policy_is_valid_and_gives_every_field() -> None:
    path = ROOT / "infra" / "policies" / "site_policy_example.yaml"
    load_policy(path, "crisis-line")
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) == set(SitePolicy.model_fields)


# --- through the plan and a real round ----------------------------------------------------------------------------


def spaced(study: dict, tmp_path: Path, name: str = "out", **limits: Any) -> Workspace:
    """The study with a policy file for its domain 'one'."""
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump({"domain": "one", "epsilon": 8.0} | limits), encoding="utf-8")
    study["domains"][0]["policy_file"] = str(path)
    return Workspace(open_study(validate_config(study), tmp_path / name))


def entries(workspace: Workspace) -> list[dict]:
    folder = Path(workspace.ref.out_dir) / "store" / "ledgers" / "one"
    return [json.loads(path.read_bytes()) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []


def first(workspace: Workspace) -> ClientAssignment:
    return assignments_for(workspace, RoundState.first(workspace))[0]


def test_refused_study_is_refused_in_the_plan_and_nothing_is_trained_or_written(
    tiny_study: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_round, "train_locally", None)
    workspace = spaced(tiny_study, tmp_path, epsilon=4.0, allowed_backbones=["c" * 64])
    made = workspace.plan
    one, two = made.domains
    assert len(one.refusals) == 2
    assert any("epsilon 8 asked for, the site allows 4" in refusal for refusal in made.refusals)
    assert any("backbone" in refusal for refusal in made.refusals)
    assert (one.noise_multiplier, one.rdp_order, one.noise_schedule, one.reductions) == (None, None, (), ())
    assert two.refusals == ()
    assert two.noise_multiplier is not None
    update = run_client(workspace, first(workspace))
    assert update.status == "rested"
    assert "the site's policy refuses" in update.reason
    assert entries(workspace) == []


def test_a_study_that_every_site_refuses_does_not_begin(tiny_study: dict, tmp_path: Path) -> None:
    tiny_study["domains"] = tiny_study["domains"][:1]
    with pytest.raises(BudgetError, match="policy refuses: clip norm 1 asked for"):
        spaced(tiny_study, tmp_path, clip_norm=0.5).preflight()


def test_floor_of_the_policy_is_planned_with_and_its_digest_is_in_plan_and_ledger(
    tiny_study: dict, tmp_path: Path
) -> None:
    workspace = spaced(tiny_study, tmp_path, min_noise_multiplier=3.0)
    planned = workspace.plan.domains[0]
    assert planned.min_noise_multiplier == 3.0
    assert planned.noise_multiplier is not None
    assert planned.noise_multiplier >= 3.0
    assert planned.policy_sha256 == load_policy(tmp_path / "policy.yaml", "one").sha256
    assert run_client(workspace, first(workspace)).status == "trained"
    assert entries(workspace)[0]["policy_sha256"] == planned.policy_sha256
    assert [entry["kind"] for entry in entries(workspace)] == ["plan", "charge", "release"]


def test_policy_that_became_stricter_since_the_plan_refuses_the_next_round(
    tiny_study: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = spaced(tiny_study, tmp_path)
    asked = first(workspace)
    (tmp_path / "policy.yaml").write_text("domain: one\nepsilon: 8\nmax_sample_rate: 0.01\n", encoding="utf-8")
    monkeypatch.setattr(client_round, "train_locally", None)
    update = run_client(workspace, asked)
    assert update.status == "rested"
    assert "sample rate" in update.reason
    kinds = [entry["kind"] for entry in entries(workspace)]
    assert kinds == ["plan", "refusal"]
    assert entries(workspace)[0]["policy_sha256"] == load_policy(tmp_path / "policy.yaml", "one").sha256
    assert entries(workspace)[1]["reason"] == update.reason


@pytest.mark.parametrize("privacy", [{"mode": "none"}, {"noise_seed": 3}], ids=str)
def test_site_with_a_policy_trains_nothing_that_is_not_private(
    tiny_study: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, privacy: dict
) -> None:
    monkeypatch.setattr(client_round, "train_locally", None)
    tiny_study["privacy"] = privacy
    workspace = spaced(tiny_study, tmp_path)
    assert "not private" in workspace.plan.refusals[0]
    update = run_client(workspace, first(workspace))
    assert update.status == "rested"
    assert "not private" in update.reason
    assert entries(workspace) == []
