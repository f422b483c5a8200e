"""SIGKILL of the whole Prefect flow between writes of store, MLflow and registry, and of the Prefect server under it.

One study, started again and again: each start dies at a later place, and the last one finishes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from flaky_mlflow import held_by
from running_stack import free_ports
from test_kill_the_server_side import ROUNDS, Starts, charges, deaths, run_id

from flows.finishing import read_state
from flows.prefect_database import put_database
from flows.track import catch_up, is_behind
from tasks.mlflow_connection import mlflow_client
from tasks.tracked_values import round_metrics

pytestmark = pytest.mark.slow

DEATHS = [
    (r"store/runs/.*/adapters/", 3),  # the first round's aggregate, after the two that a study begins with
    (r"rounds/0000/manifest\.json", 1),
    (r"mlflow set_terminated", 1),  # the first client's run of round 0 is open
    (r"mlflow create_model_version", 1),  # after round 1, which dies nowhere
    (r"mlflow set_registered_model_alias", 2),  # challenger, but not yet champion
    (r"^summary\.json", 1),
    (r"mlflow log_text", 1),  # the study is finished, and MLflow has not all of it
]


class PrefectServer:
    """A real Prefect server that can be killed and started again on its port and database."""

    def __init__(self, home: Path) -> None:
        (port,) = free_ports(1)
        self.api = f"http://127.0.0.1:{port}/api"
        self._home = home
        self._command = [
            sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port),
            "--analytics-off", "--no-services",
        ]  # fmt: skip
        put_database(home)
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "PREFECT_HOME": str(self._home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        environment.pop("PREFECT_API_URL", None)
        with (self._home / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                self._command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        for _ in range(900):
            assert self.process.poll() is None, (self._home / "server.log").read_text()[-2000:]
            try:
                if httpx.get(f"{self.api}/health", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise AssertionError("Prefect did not start")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    server = PrefectServer(tmp_path_factory.mktemp("prefect"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def flows(prefect: PrefectServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starts]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", prefect.api)
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("client")))
        patch.setenv("PREFECT_CLIENT_MAX_RETRIES", "2")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        started = Starts("--flow")
    yield started
    started.close()


@pytest.fixture
def tracked(tiny_study: dict[str, Any]) -> dict[str, Any]:
    tiny_study["training"]["steps_per_round"] = 1
    tiny_study["tracking"] = {}
    return tiny_study


def test_the_flow_dies_at_seven_places_and_ends_as_if_it_had_not(flows, tracked, tmp_path):
    out = tmp_path / "out"
    for place, nth in DEATHS:
        code = flows.run(tracked, out, at=place, nth=nth, flow=True)
        assert code == -signal.SIGKILL, f"{place}: {code}"
    assert len(deaths(out)) == len(DEATHS)
    assert is_behind(out)
    assert "MLflow has all of" in catch_up(out)

    once = ["plan"] + ROUNDS * ["charge", "release"]
    for name in ("one", "two"):
        entries = [entry for entry in charges(out) if entry["domain"] == name]
        assert [entry["kind"] for entry in entries] == once, "nothing was charged or released twice"
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["status"], summary["warnings"]) == ("promoted", [])
    in_mlflow_as_in_the_manifests(out)
    client = mlflow_client(summary["tracking_uri"])
    versions = client.search_model_versions("name = 'fedmentor-adapter'")
    assert [version.version for version in versions] in (["1"], [1])
    assert set(client.get_registered_model("fedmentor-adapter").aliases) == {"champion", "challenger"}


def in_mlflow_as_in_the_manifests(out: Path) -> None:
    """One run of each thing, every round's numbers once and at its step."""
    from fedmentor_core.records import StudySummary

    summary = StudySummary.model_validate_json((out / "summary.json").read_text())
    assert summary.tracking_uri is not None
    held = held_by(summary.tracking_uri, summary.run_id, "fedmentor", out / "mlflow.db")
    assert len(held) == 1 + ROUNDS + 2 * ROUNDS
    assert {one["status"] for one in held.values()} == {"FINISHED"}
    rows = held["study", "", ""]["metrics"]
    for one in summary.rounds:
        expected = {key: value for key, value in round_metrics(one).items() if key != "round_seconds"}
        logged = {key: value for key, step, value in rows if step == one.round_index and key in expected}
        assert logged == expected
    assert read_state(out).complete


def test_the_server_dies_under_a_round_and_the_next_start_resumes(flows, prefect, tracked, tmp_path):
    out = tmp_path / "out"
    code = flows.run(tracked, out, at=r"rounds/0001/manifest\.json", nth=1, kill=prefect.process.pid, flow=True)
    prefect.process.wait()
    assert deaths(out) == [f"store/runs/{run_id(out)}/rounds/0001/manifest.json"]
    assert code in (0, 1)
    before = charges(out)
    prefect.start()
    assert flows.run(tracked, out, flow=True) == 0
    assert charges(out) == before, "the round that was committed is not trained again"
    assert json.loads((out / "summary.json").read_text())["status"] == "promoted"
    in_mlflow_as_in_the_manifests(out)


def test_the_server_dies_before_anything_is_aggregated(flows, prefect, tracked, tmp_path):
    out = tmp_path / "out"
    code = flows.run(tracked, out, at=r"clients/one/update\.json", nth=1, kill=prefect.process.pid, flow=True)
    prefect.process.wait()
    assert code in (0, 1)
    prefect.start()
    assert flows.run(tracked, out, flow=True) == 0
    for name in ("one", "two"):
        kinds = [entry["kind"] for entry in charges(out) if entry["domain"] == name]
        attempts = {(entry["round_index"], entry["attempt"]) for entry in charges(out) if entry["kind"] == "charge"}
        assert kinds.count("release") == ROUNDS
        assert kinds.count("charge") >= ROUNDS
        assert all(attempt == 0 for _, attempt in attempts), "what was finished is handed out again"
    in_mlflow_as_in_the_manifests(out)
