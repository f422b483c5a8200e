"""Orchestration adds durability and nothing else: with seeded noise, Prefect and plain calls give the same adapters."""

from pathlib import Path

import pytest

from fedmentor_core.config_io import validate_config
from fedmentor_core.rounds import find_manifest
from fedmentor_core.study import run_study
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import workspace_of


@pytest.fixture(scope="module")
def prefect_server(tmp_path_factory):
    """A throw-away Prefect server and database."""
    from prefect_harness import throwaway_prefect

    with throwaway_prefect():
        yield


@pytest.fixture
def seeded(tiny_study):
    tiny_study["privacy"] = {"noise_seed": 5}
    return validate_config(tiny_study)


@pytest.mark.slow
def test_mapped_tasks_give_the_same_adapters_as_plain_calls(seeded, tmp_path, prefect_server):
    from flows.federated_training import federated_training

    plain = run_study(open_study(seeded, tmp_path / "core"))
    mapped = federated_training(seeded, str(tmp_path / "prefect"))

    assert _adapters(seeded, tmp_path / "core") == _adapters(seeded, tmp_path / "prefect")
    assert plain.final == mapped.final
    assert [r.metrics for r in plain.rounds] == [r.metrics for r in mapped.rounds]
    assert not plain.private, "seeded noise must mark the run"
    assert any("NOT PRIVATE" in warning for warning in mapped.warnings)


@pytest.mark.slow
def test_a_client_that_fails_for_good_is_a_fact_about_the_round(tiny_study, tmp_path, prefect_server, monkeypatch):
    from fedmentor_core import client_round
    from flows.federated_training import federated_training

    secret = "a sentence that only the private text holds"

    def explode(workspace, assignment, *rest):
        if assignment.domain == "two":
            raise ValueError(secret)
        return original(workspace, assignment, *rest)

    original = client_round._train
    monkeypatch.setattr(client_round, "_train", explode)
    tiny_study["rounds"] = 1
    tiny_study["execution"] = {"client_retries": 0}
    summary = federated_training(validate_config(tiny_study), str(tmp_path / "out"))

    by_domain = {client.domain: client for client in summary.rounds[0].clients}
    assert by_domain["one"].status == "trained"
    assert by_domain["two"].status == "failed"
    assert by_domain["two"].reason == "failed with ValueError"
    ledger = workspace_of(open_study(validate_config(tiny_study), tmp_path / "out")).ledger("two")
    assert [e.kind for e in ledger.entries()] == ["plan", "charge"], "the failed attempt stays charged"
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert left == []


def _adapters(config, out: Path) -> list[str]:
    workspace = workspace_of(open_study(config, out))
    return [find_manifest(workspace, index).adapter.sha256 for index in range(config.rounds)]
