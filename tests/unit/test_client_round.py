"""A client's round with deaths at every line: what left is charged, what is charged fits, bytes leave again free."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
import torch

from fedmentor_core import client_round
from fedmentor_core.adapters.lora import metadata_from_bytes, state_from_bytes, state_to_bytes
from fedmentor_core.client_round import run_client
from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import IntegrityError, LedgerError, StorageError
from fedmentor_core.hashing import sha256_bytes
from fedmentor_core.privacy.ledger import Ledger
from fedmentor_core.records import ClientAssignment, ClientUpdate
from fedmentor_core.rounds import RoundState, assignments_for
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import Workspace, find_update


class DeathError(Exception):
    """The process dies here."""


def die(*_: Any, **__: Any) -> None:
    raise DeathError


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One thread, and no PRV diagnostic: a second per domain that nothing here looks at."""
    monkeypatch.setattr("fedmentor_core.privacy.plan.epsilon_prv", lambda *_: 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def workspace(tiny_study: dict, tmp_path: Path) -> Workspace:
    return Workspace(open_study(validate_config(tiny_study), tmp_path / "out"))


def asked(workspace: Workspace, **changes: Any) -> ClientAssignment:
    assignment = assignments_for(workspace, RoundState.first(workspace))[0]
    return assignment.model_copy(update=changes)


def raw_entries(workspace: Workspace) -> list[dict]:
    """The ledger's files as they lie there, read without the ledger's code."""
    folder = Path(workspace.ref.out_dir) / "store" / "ledgers" / "one"
    return [json.loads(path.read_bytes()) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []


def kinds(workspace: Workspace) -> list[str]:
    return [entry["kind"] for entry in raw_entries(workspace)]


def independent_epsilon(workspace: Workspace) -> float:
    """Epsilon of all charged steps at the fixed order: dp_accounting's RDP, and the conversion written out."""
    entries = raw_entries(workspace)
    order, delta = entries[0]["rdp_order"], entries[0]["delta"]
    accountant = dp_accounting.rdp.RdpAccountant([order])
    charged = [entry for entry in entries if entry["kind"] == "charge"]
    for entry in charged:
        gaussian = dp_accounting.GaussianDpEvent(entry["noise_multiplier"])
        accountant.compose(dp_accounting.PoissonSampledDpEvent(entry["sample_rate"], gaussian), entry["steps"])
    if not charged:
        return 0.0
    rho = float(accountant._rdp[0])
    return rho - (math.log(delta) + math.log(order)) / (order - 1) + math.log((order - 1) / order)


def check_account(workspace: Workspace, update: ClientUpdate) -> None:
    """The epsilon told is the one that was really spent, and it is within the promise."""
    assert update.epsilon_spent is not None
    assert update.epsilon_budget is not None
    assert update.epsilon_spent == pytest.approx(max(0.0, independent_epsilon(workspace)), abs=0.05)
    assert update.epsilon_spent <= update.epsilon_budget
    assert Ledger(workspace.store, "one").view().epsilon_spent == pytest.approx(update.epsilon_spent)


def stored_updates(workspace: Workspace) -> dict[str, bytes]:
    keys = [key for key in workspace.store.list_keys("runs") if "/clients/" in key and key.endswith(".safetensors")]
    return {key.rsplit("/", 1)[1]: workspace.store.get_bytes(key) for key in keys}


def test_undisturbed_round_charges_once_before_it_releases(workspace: Workspace) -> None:
    steps: list[tuple[int, int]] = []
    update = run_client(workspace, asked(workspace), lambda done, total: steps.append((done, total)))
    assert (update.status, update.attempt, update.steps) == ("trained", 0, 2)
    assert steps == [(1, 2), (2, 2)]
    assert kinds(workspace) == ["plan", "charge", "release"]
    assert update.update is not None
    data = workspace.store.get(update.update)
    assert raw_entries(workspace)[2]["digest"] == update.update.sha256 == sha256_bytes(data)
    assert all("lora_B" in name for name in state_from_bytes(data))
    check_account(workspace, update)
    assert run_client(workspace, asked(workspace)) == update  # asked again: the same record, free
    assert kinds(workspace) == ["plan", "charge", "release"]


@pytest.mark.parametrize(
    ("where", "left_behind"),
    [("train_locally", set()), ("encode_update", set()), ("release", {"update-000.safetensors"})],
    ids=["after the charge", "after training", "after storing"],
)
def test_death_before_the_release_stays_charged_and_the_next_attempt_is_charged_anew(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, where: str, left_behind: set[str]
) -> None:
    assignment = asked(workspace)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger if where == "release" else client_round, where, die)
        with pytest.raises(DeathError):
            run_client(workspace, assignment)
    assert kinds(workspace) == ["plan", "charge"]
    assert set(stored_updates(workspace)) == left_behind
    assert find_update(workspace, 0, "one") is None

    update = run_client(workspace, assignment)
    assert (update.status, update.attempt) == ("trained", 1)
    assert kinds(workspace) == ["plan", "charge", "charge", "release"]
    assert [entry["attempt"] for entry in raw_entries(workspace)[1:]] == [0, 1, 1]
    assert set(stored_updates(workspace)) == left_behind | {"update-001.safetensors"}
    check_account(workspace, update)


@pytest.mark.parametrize("where", ["commit", "update.json"])
def test_death_after_the_release_hands_out_the_same_bytes_free(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    assignment = asked(workspace)
    with monkeypatch.context() as patch:
        if where == "commit":
            patch.setattr(client_round, "_commit", die)
        else:
            patch.setattr(workspace.store, "put_json", die)
        with pytest.raises(DeathError):
            run_client(workspace, assignment)
    before = stored_updates(workspace)
    assert kinds(workspace) == ["plan", "charge", "release"]
    assert find_update(workspace, 0, "one") is None

    with monkeypatch.context() as patch:
        patch.setattr(client_round, "train_locally", die)  # nothing may be trained
        update = run_client(workspace, assignment)
    assert (update.status, update.attempt) == ("trained", 0)
    assert stored_updates(workspace) == before
    assert update.update is not None
    assert workspace.store.get(update.update) == before["update-000.safetensors"]
    assert kinds(workspace) == ["plan", "charge", "release"]
    check_account(workspace, update)


def test_death_before_the_charge_costs_nothing(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    assignment = asked(workspace)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "charge", die)
        with pytest.raises(DeathError):
            run_client(workspace, assignment)
    assert kinds(workspace) == ["plan"]
    assert stored_updates(workspace) == {}


def test_released_bytes_that_were_changed_are_not_handed_out(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assignment = asked(workspace)
    with monkeypatch.context() as patch:
        patch.setattr(client_round, "_commit", die)
        with pytest.raises(DeathError):
            run_client(workspace, assignment)
    (path,) = (Path(workspace.ref.out_dir) / "store").rglob("update-000.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError):
        run_client(workspace, assignment)
    path.unlink()  # lost altogether: a new attempt, charged anew
    update = run_client(workspace, assignment)
    assert update.attempt == 1
    assert kinds(workspace).count("charge") == 2
    check_account(workspace, update)


def test_released_bytes_of_another_global_adapter_are_not_handed_out(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assignment = asked(workspace)
    with monkeypatch.context() as patch:
        patch.setattr(client_round, "_commit", die)
        with pytest.raises(DeathError):
            run_client(workspace, assignment)
    state = {name: tensor + 1 for name, tensor in workspace.get_adapter(assignment.global_adapter).items()}
    moved = assignment.model_copy(update={"global_adapter": workspace.put_adapter(state)})
    update = run_client(workspace, moved)
    assert update.attempt == 1
    assert update.base_adapter_sha256 == moved.global_adapter.sha256
    assert update.update is not None
    said = metadata_from_bytes(workspace.store.get(update.update))
    assert said["base_sha256"] == moved.global_adapter.sha256
    assert kinds(workspace).count("charge") == 2
    check_account(workspace, update)


def test_a_night_stays_within_its_share_whatever_fails(
    tiny_study: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempt after attempt dies: the night ends at its share, and the next night has as much as was planned."""
    tiny_study["privacy"] = {"planned_runs": 3}
    workspace = Workspace(open_study(validate_config(tiny_study), tmp_path / "out"))
    plan = workspace.plan.domains[0]
    assert plan.run_rdp_budget is not None
    assert plan.rdp_budget is not None
    assert plan.run_rdp_budget == pytest.approx(plan.rdp_budget / 3)
    monkeypatch.setattr(client_round, "_train", die)
    for _ in range(20):
        try:
            update = run_client(workspace, asked(workspace))
            break
        except DeathError:
            continue
    else:
        pytest.fail("the share never ran out")
    assert update.status == "rested"
    assert "tonight's share" in update.reason
    assert 0 < workspace.ledger("one").spent_rdp() <= plan.run_rdp_budget
    assert raw_entries(workspace)[0]["planned_runs"] == 3
    check_account(workspace, update)


def test_charges_say_level_and_seed(tiny_study: dict, tmp_path: Path) -> None:
    for seed in (None, 4):
        tiny_study["privacy"] = {"noise_seed": seed}
        workspace = Workspace(open_study(validate_config(tiny_study), tmp_path / f"out-{seed}"))
        run_client(workspace, asked(workspace))
        plan, charge = raw_entries(workspace)[:2]
        assert (plan["privacy_level"], plan["privacy_unit"]) == ("unit", "post")
        assert (charge["privacy_level"], charge["seeded"]) == ("unit", seed is not None)
        assert workspace.ledger("one").view().private is (seed is None)


def test_broken_ledger_stops_before_training(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    assignment = asked(workspace)
    run_client(workspace, assignment)
    (Path(workspace.ref.out_dir) / "store" / "ledgers" / "one" / "00000001.json").write_bytes(b"{}")
    monkeypatch.setattr(client_round, "train_locally", die)
    with pytest.raises(LedgerError):
        run_client(workspace, assignment.model_copy(update={"round_index": 1}))


@pytest.mark.parametrize(
    "wish",
    [
        {"noise_multiplier": None},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": 0.29},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"sample_rate": 1.0},
        {"sample_rate": 0.0},
        {"clip_norm": 1e6},
        {"steps": 3},
        {"steps": 0},
        {"steps": -1},
    ],
    ids=str,
)
def test_site_refuses_what_its_policy_does_not_allow(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, wish: dict
) -> None:
    monkeypatch.setattr(client_round, "train_locally", die)
    update = run_client(workspace, asked(workspace, **wish))
    assert update.status == "rested"
    assert update.reason
    assert (update.update, update.steps, update.bytes_up, update.epsilon_spent) == (None, 0, 0, 0.0)
    assert kinds(workspace) == ["plan", "refusal"]
    assert raw_entries(workspace)[1]["reason"] == update.reason
    assert stored_updates(workspace) == {}
    assert find_update(workspace, 0, "one") is None


def test_spent_budget_rests_and_changes_nothing_but_a_refusal(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_round, "_train", die)
    assignment = asked(workspace)
    for _ in range(20):
        try:
            update = run_client(workspace, assignment)
            break
        except DeathError:
            continue
    else:
        pytest.fail("the budget never ran out")
    assert update.status == "rested"
    assert "lifetime epsilon" in update.reason
    assert kinds(workspace)[-1] == "refusal"
    assert stored_updates(workspace) == {}
    check_account(workspace, update)


def test_next_run_goes_on_from_what_the_first_one_spent(
    tiny_study: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledgers = tmp_path / "ledgers"
    tiny_study["privacy"] = {"ledger_url": ledgers.as_uri()}

    def spaced(name: str, **changes: Any) -> Workspace:
        return Workspace(open_study(validate_config(tiny_study | changes), tmp_path / name))

    first = spaced("first")
    told = run_client(first, asked(first))
    second = spaced("second")
    plan = second.plan.domains[0]
    assert plan.epsilon_spent_before == pytest.approx(told.epsilon_spent)
    assert plan.noise_multiplier > first.plan.domains[0].noise_multiplier
    update = run_client(second, asked(second))
    assert told.epsilon_spent < update.epsilon_spent <= 8.0

    tiny_study["domains"][0]["epsilon"] = 20.0  # another promise for the same domain
    third = spaced("third")
    refused = run_client(third, asked(third, noise_multiplier=1.0))
    assert refused.status == "rested"
    assert "promised epsilon 8" in refused.reason
    assert refused.epsilon_spent == pytest.approx(update.epsilon_spent)
    assert third.ledger("one").spent_rdp() == second.ledger("one").spent_rdp()


def test_update_of_another_attempt_is_never_overwritten(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes at the same round: both are charged, one wins, nothing is replaced."""
    assignment = asked(workspace)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "release", die)
        with pytest.raises(DeathError):
            run_client(workspace, assignment)
        before = stored_updates(workspace)
        patch.setattr(Ledger, "next_attempt", lambda *_: 0)  # the second process counted before the first one charged
        with pytest.raises(StorageError):
            run_client(workspace, assignment)
    assert stored_updates(workspace) == before
    assert kinds(workspace).count("charge") == 2


def test_clients_trained_side_by_side_get_what_they_get_alone(tiny_study: dict, tmp_path: Path) -> None:
    tiny_study["privacy"] = {"noise_seed": 4}
    config = validate_config(tiny_study)

    def updates(name: str, workers: int) -> list[str]:
        workspace = Workspace(open_study(config, tmp_path / name))
        assignments = assignments_for(workspace, RoundState.first(workspace))
        with ThreadPoolExecutor(workers) as pool:
            refs = [update.update for update in pool.map(lambda a: run_client(workspace, a), assignments)]
        tensors = [state_from_bytes(workspace.store.get(ref)) for ref in refs if ref is not None]
        return [sha256_bytes(state_to_bytes(state)) for state in tensors]

    alone = updates("alone", 1)
    assert len(set(alone)) == 2
    for attempt in range(2):
        assert updates(f"together-{attempt}", 2) == alone


def test_run_without_privacy_charges_nothing_and_says_so(tiny_study: dict, tmp_path: Path) -> None:
    tiny_study["privacy"] = {"mode": "none"}
    workspace = Workspace(open_study(validate_config(tiny_study), tmp_path / "out"))
    update = run_client(workspace, asked(workspace))
    assert update.status == "trained"
    assert (update.epsilon_spent, update.noise_multiplier, update.delta) == (None, None, None)
    assert raw_entries(workspace) == []
    assert not workspace.config.is_private


def test_data_that_changed_since_the_plan_is_refused_before_any_charge(tiny_study, tmp_path):
    from dataclasses import replace

    from fedmentor_core.client_round import run_client
    from fedmentor_core.config_io import validate_config
    from fedmentor_core.errors import DataError
    from fedmentor_core.rounds import RoundState, assignments_for
    from fedmentor_core.study_ref import open_study
    from fedmentor_core.workspace import Workspace

    workspace = Workspace(open_study(validate_config(tiny_study), tmp_path / "out"))
    assignment = assignments_for(workspace, RoundState.first(workspace))[0]
    workspace.data[assignment.domain] = replace(workspace.data[assignment.domain], fingerprint="0" * 64)
    with pytest.raises(DataError, match="changed since this study was planned"):
        run_client(workspace, assignment)
    assert workspace.ledger(assignment.domain).entries() == []
