"""A study at client level: charged once a round without amplification, noised as planned, warned about, joined."""

from pathlib import Path

import pytest
import torch

from fedmentor_core import rounds
from fedmentor_core.client_round import run_client
from fedmentor_core.config_io import validate_config
from fedmentor_core.rounds import RoundState, assignments_for
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import Workspace


@pytest.fixture
def workspace(tiny_study: dict, tmp_path: Path) -> Workspace:
    tiny_study["privacy"] = {"level": "client", "clip_norm": 0.5}
    return Workspace(open_study(validate_config(tiny_study), tmp_path / "out"))


def test_plan_prices_whole_updates_and_says_that_it_cannot_work(workspace: Workspace) -> None:
    plan = workspace.plan.domains[0]
    assert plan.privacy_level == "client"
    assert plan.noise_multiplier is not None
    assert 0.8 < plan.noise_multiplier < 1.0  # two Gaussian releases at epsilon 8; amplification would halve it
    assert plan.epsilon_planned_rdp is not None
    assert plan.epsilon_planned_rdp <= 8.0
    (told,) = plan.warnings
    assert "client-level privacy cannot work at this size" in told
    n_parameters = workspace.initial_adapter.n_trainable
    assert f"sqrt({n_parameters:,} parameters)" in told


def test_round_is_charged_as_one_release_and_its_noise_has_the_planned_size(workspace: Workspace) -> None:
    state = RoundState.first(workspace)
    assignments = assignments_for(workspace, state)
    updates = [run_client(workspace, assignment) for assignment in assignments]
    assert [update.status for update in updates] == ["trained", "trained"]
    charge = next(entry for entry in workspace.ledger("one").entries() if entry.kind == "charge")
    assert (charge.sample_rate, charge.steps, charge.privacy_level) == (1.0, 1, "client")
    assert charge.noise_multiplier == assignments[0].noise_multiplier

    base, left = workspace.get_adapter(state.adapter), workspace.get_adapter(updates[0].update)  # type: ignore[arg-type]
    moved = torch.cat([(left[name] - base[name]).flatten().double() for name in base])
    std = assignments[0].noise_multiplier * 2 * 0.5  # type: ignore[operator]
    assert float(moved.std()) == pytest.approx(std, rel=0.1)  # the clipped signal is a hundredth of it

    adapter, judged = rounds.aggregate(workspace, state.adapter, updates)
    assert adapter != state.adapter
    assert {update.status for update in judged} == {"trained"}


def test_honest_noise_is_not_mistaken_for_an_oversized_update(tiny_study: dict, tmp_path: Path) -> None:
    tiny_study["privacy"] = {"level": "client", "clip_norm": 0.5}
    tiny_study["aggregation"] = {"max_update_norm": 1.0}
    workspace = Workspace(open_study(validate_config(tiny_study), tmp_path / "out"))
    state = RoundState.first(workspace)
    updates = [run_client(workspace, assignment) for assignment in assignments_for(workspace, state)]
    _, judged = rounds.aggregate(workspace, state.adapter, updates)
    assert {update.status for update in judged} == {"trained"}
