"""The next round trains while this one is evaluated, where that cannot change its noise; and nothing else changes."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fedmentor_core.config_io import validate_config
from fedmentor_core.records import RoundManifest
from fedmentor_core.rounds import find_manifest
from fedmentor_core.study import run_study
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import workspace_of

ROUNDS = 3
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def prefect_server():
    """A throw-away Prefect server and database."""
    from prefect_harness import throwaway_prefect

    with throwaway_prefect():
        yield


def study(base: dict[str, Any], name: str, rule: str, overlap: str) -> Any:
    """Three short rounds with seeded noise; room for two clients and two evaluations at once."""
    return validate_config(
        base
        | {
            "name": name,
            "rounds": ROUNDS,
            "training": base["training"] | {"steps_per_round": 1},
            "evaluation": base["evaluation"] | {"max_gate_examples": 2, "max_test_examples": 2, "max_new_tokens": 4},
            "privacy": {"noise_seed": 5},
            "adaptation": {"rule": rule},
            "execution": {"overlap_rounds": overlap, "max_parallel_clients": 4},
        }
    )


def manifests(config: Any, out: Path) -> list[RoundManifest]:
    workspace = workspace_of(open_study(config, out))
    found = [find_manifest(workspace, index) for index in range(ROUNDS)]
    return [one for one in found if one is not None]


def charges(config: Any, out: Path, domain: str) -> list[tuple[int | None, int | None]]:
    entries = workspace_of(open_study(config, out)).ledger(domain).entries()
    return [(entry.round_index, entry.attempt) for entry in entries if entry.kind == "charge"]


def where_clients_trained(study_name: str) -> dict[str, set[str]]:
    """Names of the client tasks under each round of the study's flow runs."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    async def read() -> dict[str, set[str]]:
        async with get_client() as client:
            runs = await client.read_flow_runs(limit=200)
            tasks = await client.read_task_runs(limit=200)
            parents = {run.id for run in runs if run.name == study_name}
            of_study = {task.id for task in tasks if task.flow_run_id in parents}
            found: dict[str, set[str]] = {}
            for run in runs:
                if run.name.startswith("round ") and run.parent_task_run_id in of_study:
                    under = await client.read_task_runs(
                        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])), limit=200
                    )
                    found[run.name] = {task.name for task in under if task.name.startswith("train ")}
            return found

    return asyncio.run(read())


@pytest.mark.parametrize("rule", ["fixed", "decreasing"])
def test_an_overlapped_study_is_the_same_study(tiny_study, tmp_path, rule):
    from flows.federated_training import federated_training

    config = study(tiny_study, f"over-{rule}", rule, "always")
    plain = run_study(open_study(config, tmp_path / "core"))
    summary = federated_training(config, str(tmp_path / "prefect"))

    expected, found = manifests(config, tmp_path / "core"), manifests(config, tmp_path / "prefect")
    assert [one.adapter.sha256 for one in found] == [one.adapter.sha256 for one in expected]
    assert [one.next_noise for one in found] == [one.next_noise for one in expected]
    assert [one.summary.noise_decisions for one in found] == [one.summary.noise_decisions for one in expected]
    assert summary.final == plain.final
    for domain in ("one", "two"):
        assert charges(config, tmp_path / "prefect", domain) == [(0, 0), (1, 0), (2, 0)], "each round once"
    assert where_clients_trained(config.name) == {
        "round 0": {f"train {domain} round {index}" for domain in ("one", "two") for index in (0, 1)},
        "round 1": {f"train {domain} round 2" for domain in ("one", "two")},
        "round 2": set(),
    }


def test_a_rule_that_watches_utility_waits_for_it(tiny_study, tmp_path):
    from flows.federated_training import federated_training

    config = study(tiny_study, "watching", "paper", "always")
    federated_training(config, str(tmp_path / "out"))
    assert where_clients_trained(config.name) == {
        f"round {index}": {f"train {domain} round {index}" for domain in ("one", "two")} for index in range(ROUNDS)
    }


def test_a_death_after_training_ahead_repeats_no_charge(tiny_study, tmp_path, monkeypatch):
    from flows.federated_training import federated_training
    from tasks import evaluation

    config = study(tiny_study, "dying", "fixed", "always")
    plain = run_study(open_study(config, tmp_path / "core"))
    original = evaluation.evaluate_one
    untrained = workspace_of(open_study(config, tmp_path / "core")).untrained_adapter

    def dies(workspace, adapter, *rest):
        if adapter.sha256 != untrained.sha256:
            raise RuntimeError("the machine went away")
        return original(workspace, adapter, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate_one", dies)
        with pytest.raises(Exception, match="RuntimeError"):
            federated_training(config, str(tmp_path / "out"))
    assert manifests(config, tmp_path / "out") == [], "no round was committed"
    assert charges(config, tmp_path / "out", "one") == [(0, 0), (1, 0)], "the next round trained and was charged"

    summary = federated_training(config, str(tmp_path / "out"))
    assert [one.adapter.sha256 for one in manifests(config, tmp_path / "out")] == [
        one.adapter.sha256 for one in manifests(config, tmp_path / "core")
    ]
    assert charges(config, tmp_path / "out", "one") == [(0, 0), (1, 0), (2, 0)]
    assert summary.final == plain.final
