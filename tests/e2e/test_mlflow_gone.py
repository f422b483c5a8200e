"""An MLflow server that is gone at the start, in the middle or for good: training goes on, and tracking catches up."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from flaky_mlflow import FlakyMlflow, Mode, held_by

from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import ConfigError
from fedmentor_core.privacy.ledger import Ledger
from fedmentor_core.progress import ProgressEvent
from fedmentor_core.storage.local import LocalStore
from flows import cli
from flows.finishing import read_state
from flows.track import catch_up, is_behind, try_to_catch_up
from tasks.mlflow_connection import TrackingError, mlflow_client
from tasks.tracking import open_tracking

EXPERIMENT = "gone"
MODEL = "gone-adapter"
PATIENT = "90"  # seconds: machines that run tests may be busy
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlakyMlflow]:
    """An MLflow server that starts while Prefect's does."""
    from prefect_harness import throwaway_prefect

    started = FlakyMlflow(tmp_path_factory.mktemp("mlflow"))
    try:
        with throwaway_prefect():
            yield started.wait()
    finally:
        started.close()


@pytest.fixture
def mlflow(server: FlakyMlflow, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyMlflow]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", PATIENT)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield server
    server.mode = "pass"


@pytest.fixture
def study(tiny_study, mlflow) -> dict:
    tiny_study["training"]["steps_per_round"] = 1
    tiny_study["tracking"] = {"uri": mlflow.uri, "experiment": EXPERIMENT, "registered_model": MODEL}
    return tiny_study


def run(study: dict, out: Path, mlflow: FlakyMlflow, **changes: Mode):
    """Run the flow; MLflow's mode changes as each named moment is reported, such as ``aggregate_0``."""
    from flows.federated_training import federated_training
    from tasks.listening import listening

    told: list[str] = []

    def listen(event: ProgressEvent) -> None:
        told.append(event.message)
        moment = event.stage if event.round_index is None else f"{event.stage}_{event.round_index}"
        mlflow.mode = changes.get(moment, mlflow.mode)
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "2" if mlflow.mode == "swallow" else PATIENT

    with listening(listen):
        return federated_training(validate_config(study), str(out)), told


def like_undisturbed(out: Path, summary, mlflow: FlakyMlflow) -> None:
    """What the server holds equals what an MLflow holds that was never away."""
    database = out.parent / "quiet.db"
    other = f"sqlite:///{database}"
    held = held_by(mlflow.uri, summary.run_id, EXPERIMENT, mlflow.database)
    before = (out / "summary.json").read_text()
    catch_up(out, other)
    quiet = held_by(other, summary.run_id, EXPERIMENT, database)
    assert held == quiet
    assert len(held) == 1 + 2 + 4
    parent = held["study", "", ""]
    assert parent["status"] == "FINISHED"
    assert [row[1] for row in parent["metrics"] if row[0] == "gate/bertscore_f1"] == [0, 1]
    assert parent["files"] == ["config.yaml", "ledger.json", "report.html", "summary.json"]
    assert [name for name, _ in parent["data"]] == ["one", "two"]
    (out / "summary.json").write_text(before)


def charges(out: Path) -> list[str]:
    return [entry.kind for name in ("one", "two") for entry in Ledger(LocalStore(out / "store"), name).entries()]


def test_gone_at_the_start_and_back_in_the_middle(study, mlflow, tmp_path):
    out = tmp_path / "out"
    mlflow.mode = "refuse"
    summary, told = run(study, out, mlflow, aggregate_1="pass")
    assert "MLflow does not answer; training goes on" in told
    assert (summary.status, summary.warnings) == ("promoted", ())
    assert "champion" in summary.model.aliases
    assert read_state(out).complete
    like_undisturbed(out, summary, mlflow)


def test_gone_for_good_then_the_command_catches_up(study, mlflow, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    summary, told = run(study, out, mlflow, aggregate_0="refuse")
    assert "MLflow does not answer; training goes on" in told
    assert (summary.status, summary.model) == ("held", None)
    assert len(summary.warnings) == 2
    assert "the adapter is not registered" in summary.warnings[0]
    assert "has not taken round 0, round 1" in summary.warnings[1]
    assert json.loads((out / "summary.json").read_text())["status"] == "held"
    assert "tracking is behind" in (out / "report.html").read_text()
    assert is_behind(out)
    charged = charges(out)

    with pytest.raises(TrackingError, match="nothing could be logged"):
        catch_up(out)
    assert "nothing could be logged" in try_to_catch_up(out)

    mlflow.mode = "pass"
    monkeypatch.setattr(sys, "argv", ["fedmentor", "track", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert f"2 rounds, the result, {MODEL} version" in capsys.readouterr().out
    found = json.loads((out / "summary.json").read_text())
    assert (found["status"], found["warnings"]) == ("promoted", [])
    assert set(found["model"]["aliases"]) == {"challenger", "champion"}
    assert "tracking is behind" not in (out / "report.html").read_text()
    assert not is_behind(out)
    assert try_to_catch_up(out) == ""
    assert charges(out) == charged, "catching up charges nothing"

    held = held_by(mlflow.uri, summary.run_id, EXPERIMENT, mlflow.database)
    versions = len(mlflow_client(mlflow.uri).search_model_versions(f"name = '{MODEL}'"))
    catch_up(out)
    assert held_by(mlflow.uri, summary.run_id, EXPERIMENT, mlflow.database) == held, "twice adds nothing"
    assert len(mlflow_client(mlflow.uri).search_model_versions(f"name = '{MODEL}'")) == versions
    like_undisturbed(out, summary, mlflow)


def test_an_undisturbed_run_holds_the_same_and_a_resumed_one_catches_up(study, mlflow, tmp_path, monkeypatch):
    """The measure of the other tests; and a study that died with MLflow away is whole after its next start."""
    from fedmentor_core import study as core

    out = tmp_path / "out"

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(core, "select_round", die)
        with pytest.raises(BaseException):  # noqa: B017, PT011  whatever Prefect makes of an interruption
            run(study, out, mlflow, aggregate_0="refuse")
    mlflow.mode = "pass"
    assert "the study is not finished" in catch_up(out)
    charged = charges(out)
    summary, _ = run(study, out, mlflow)
    assert (summary.status, summary.warnings) == ("promoted", ())
    assert charges(out) == charged
    like_undisturbed(out, summary, mlflow)


def test_a_server_that_swallows_requests_costs_a_round_a_bounded_number_of_them(study, mlflow, tmp_path):
    before = mlflow.connections["swallow"]
    summary, _ = run(study, tmp_path / "out", mlflow, aggregate_0="swallow")
    assert summary.status == "held"
    asked = mlflow.connections["swallow"] - before
    tries = 2  # one retry
    attempts = 2 + 3  # a round each, and at the end: what is owed, the registration, the result
    assert 0 < asked <= tries * attempts


def test_lost_answers_make_nothing_twice(study, mlflow, tmp_path):
    """The server did what was asked and nobody heard of it: the request is sent again. MLflow's registry cannot bear
    that (it refuses the second link of model and run), so that a lost answer there fails, and the next start mends it."""
    mlflow.mode = "lose answers"
    summary, _ = run(study, tmp_path / "out", mlflow, register="pass")
    try_to_catch_up(tmp_path / "out")
    held = held_by(mlflow.uri, summary.run_id, EXPERIMENT, mlflow.database)
    assert len(held) == 1 + 2 + 4
    assert {one["status"] for one in held.values()} == {"FINISHED"}


def test_a_server_that_refuses_is_an_error_before_anything_is_spent(study, mlflow):
    name = "was deleted"
    study["tracking"]["experiment"] = name
    config = validate_config(study)
    client = mlflow_client(mlflow.uri)
    client.delete_experiment(client.create_experiment(name))
    with pytest.raises(ConfigError, match="was deleted"):
        open_tracking(config, mlflow.uri)
