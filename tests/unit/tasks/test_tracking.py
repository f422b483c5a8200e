"""Tracking against the real MLflow on sqlite."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedmentor_core.config_io import config_sha256
from fedmentor_core.errors import ConfigError
from tasks.debts import Debt
from tasks.mlflow_connection import mlflow_client, sqlite_path
from tasks.reference import reference_metrics
from tasks.tracked_values import flatten, round_metrics
from tasks.tracking import PARENT_TAG, Tracker, open_tracking


def runs(tracker: Tracker, query: str = ""):
    return list(mlflow_client(tracker.tracking_uri).search_runs([tracker.experiment_id], query))


def test_parent_run_has_flat_params_and_tags(tracker, study):
    server = study.config.tracking.model_copy(update={"uri": "postgresql://key:secret@localhost:5432/mlflow"})
    config = study.config.model_copy(update={"tracking": server})
    run_id = tracker.start_study_run(config, "run-1", flow_run_id="flow-9", facts={"backbone.sha256": "ab"})
    run = mlflow_client(tracker.tracking_uri).get_run(run_id)
    assert run.info.run_name == "tiny-study"
    assert run.data.params["domains.sleep.epsilon"] == "8.0"
    assert run.data.params["training.batch_size"] == "64"
    assert run.data.params["backbone.sha256"] == "ab"
    assert run.data.params["storage.endpoint_url"] == "http://localhost:9000"
    assert run.data.params["tracking.uri"] == "postgresql://***@localhost:5432/mlflow"
    assert run.data.tags["fedmentor.config_sha256"] == config_sha256(config)
    assert run.data.tags["fedmentor.private"] == "true"
    assert run.data.tags["prefect.flow_run_id"] == "flow-9"


def test_same_study_run_resumes_and_another_does_not(tracker, study):
    first = tracker.start_study_run(study.config, "run-1")
    tracker.end_study_run("FAILED")
    again = Tracker(tracker.tracking_uri, tracker.experiment_id)
    assert again.start_study_run(study.config, "run-1") == first
    client = mlflow_client(tracker.tracking_uri)
    assert client.get_run(first).info.status == "RUNNING"
    assert again.start_study_run(study.config, "run-2") != first


def test_round_is_nested_and_logging_it_twice_adds_nothing(tracker, study):
    parent = tracker.start_study_run(study.config, "run-1")
    for _ in range(2):
        tracker.log_round(study.round(0))
    tracker.log_round(study.round(1))
    assert tracker.warnings == ()
    assert len(runs(tracker)) == 1 + 2 + 4
    client = mlflow_client(tracker.tracking_uri)
    history = client.get_metric_history(parent, "gate/bertscore_f1")
    assert [(one.step, one.value) for one in history] == [(0, 0.5), (1, 0.6)]
    (round_run,) = runs(tracker, "tags.`fedmentor.role` = 'round' and tags.`fedmentor.round` = '1'")
    assert round_run.data.tags["mlflow.parentRunId"] == parent
    assert round_run.data.tags["fedmentor.gate"] == "passed"
    assert "sleep: 1 -> 0.95" in round_run.data.tags["fedmentor.noise_changes"]
    assert round_run.info.end_time - round_run.info.start_time == 1500
    clients = runs(tracker, f"tags.`mlflow.parentRunId` = '{round_run.info.run_id}'")
    assert {one.data.tags["fedmentor.client"] for one in clients} == {"stress", "sleep"}
    assert clients[0].data.metrics["epsilon_spent"] == 2.0
    assert {one.info.status for one in clients} == {"FINISHED"}


def test_round_cut_off_by_a_crash_is_completed_without_duplicates(tracker, study, monkeypatch):
    parent = tracker.start_study_run(study.config, "run-1")

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "_log_client", crash)
        with pytest.raises(KeyboardInterrupt):
            tracker.log_round(study.round(0))
    Tracker(tracker.tracking_uri, tracker.experiment_id, "run-1", parent).end_study_run("KILLED")
    resumed = Tracker(tracker.tracking_uri, tracker.experiment_id)
    resumed.start_study_run(study.config, "run-1")
    resumed.log_round(study.round(0))
    assert len(runs(tracker)) == 1 + 1 + 2
    assert {one.info.status for one in runs(tracker, "tags.`fedmentor.role` = 'round'")} == {"FINISHED"}
    assert len(mlflow_client(tracker.tracking_uri).get_metric_history(parent, "gate/rouge_l")) == 1


def test_metric_names_and_only_public_values(study):
    values = round_metrics(study.round(1))
    assert values["gate/sleep/label_f1"] == 0.6
    assert values["privacy/stress/epsilon_spent"] == 2.0
    assert values["privacy/sleep/noise_multiplier"] == 0.95
    assert values["bytes_total"] == 6000
    assert values["gate/passed"] == 1.0
    assert not [name for name in values if "loss" in name]


def test_round_without_privacy_has_no_privacy_metrics(study):
    plain = {"noise_multiplier": None, "epsilon_spent": None, "epsilon_budget": None, "delta": None}
    clients = tuple(one.model_copy(update=plain) for one in study.round(0).clients)
    values = round_metrics(study.round(0).model_copy(update={"clients": clients}))
    assert not [name for name in values if name.startswith("privacy/")]


def test_datasets_are_descriptors(tracker, study):
    run_id = tracker.start_study_run(study.config, "run-1")
    for _ in range(2):
        tracker.log_datasets(study.plan().domains)
    assert tracker.warnings == ()
    inputs = mlflow_client(tracker.tracking_uri).get_run(run_id).inputs.dataset_inputs
    assert {one.dataset.name for one in inputs} == {"stress", "sleep"}
    assert len(inputs) == 2
    for one in inputs:
        assert not one.dataset.schema
        assert not one.dataset.profile
        source = json.loads(one.dataset.source)
        assert set(source) == {"fingerprint", "n_units"}
        assert source["fingerprint"].startswith(one.dataset.digest)


def test_final_scores_files_and_status(tracker, study, tmp_path):
    run_id = tracker.start_study_run(study.config, "run-1")
    report = tmp_path / "anything.html"
    report.write_text("<p>é</p>", encoding="utf-8")
    for _ in range(2):
        tracker.log_baseline(study.metrics(0.2), study.metrics(0.25))
        tracker.log_final(study.summary(), config_yaml="name: x\n", report=report, ledger={"verified": True})
    tracker.end_study_run("FINISHED")
    assert tracker.warnings == ()
    client = mlflow_client(tracker.tracking_uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["final/bertscore_f1"] == 0.55
    assert run.data.metrics["final/sleep/label_f1"] == 0.55
    assert run.data.metrics["baseline/rouge_l"] == 0.1
    assert len(client.get_metric_history(run_id, "final/bertscore_f1")) == 1
    assert run.data.tags["fedmentor.status"] == "promoted"
    names = {one.path for one in client.list_artifacts(run_id)}
    assert names == {"config.yaml", "summary.json", "report.html", "ledger.json"}
    summary = json.loads(Path(client.download_artifacts(run_id, "summary.json", str(tmp_path))).read_text())
    assert summary["rounds"][0]["noise_changes"][0]["from"] == 1.0


def test_end_kills_runs_left_open(tracker, study):
    tracker.start_study_run(study.config, "run-1")
    tracker._nested(mlflow_client(tracker.tracking_uri), name="torn", tags={"fedmentor.role": "round"}, start=1)
    tracker.end_study_run("KILLED")
    assert {one.info.status for one in runs(tracker)} == {"KILLED"}


def test_reference_metrics_are_the_selected_rounds_gate_scores(tracker, study):
    run_id = tracker.start_study_run(study.config, "run-1")
    tracker.log_final(study.summary())
    found = reference_metrics(tracker.tracking_uri, run_id, domains=("sleep",))
    assert found == study.round(1).metrics


@pytest.mark.parametrize(
    ("given", "message"),
    [("nosuchrun", "cannot be read"), (None, "no final gate score for: bertscore_f1")],
)
def test_reference_run_missing_or_unfinished(tracker, study, given, message):
    run_id = tracker.start_study_run(study.config, "run-1")
    with pytest.raises(ConfigError, match=message):
        reference_metrics(tracker.tracking_uri, given or run_id)


def test_reference_run_without_a_needed_domain(tracker, study):
    run_id = tracker.start_study_run(study.config, "run-1")
    tracker.log_final(study.summary())
    with pytest.raises(ConfigError, match="anxiety/bertscore_f1"):
        reference_metrics(tracker.tracking_uri, run_id, domains=("sleep", "anxiety"))


def test_reference_from_a_database_that_is_not_there_creates_none(tmp_path):
    with pytest.raises(ConfigError, match="no MLflow database"):
        reference_metrics(f"sqlite:///{tmp_path}/typo.db", "x")
    assert list(tmp_path.iterdir()) == []


def test_what_mlflow_refuses_is_kept_and_the_rest_goes_on(tracker, study):
    parent = tracker.start_study_run(study.config, "run-1")
    tracker.run_id = "gone"
    tracker.log_round(study.round(0))
    assert tracker.owed == ("round 0",)
    tracker.run_id = parent
    tracker.log_round(study.round(1))
    assert (tracker.owed, tracker.warnings) == ((), ())
    history = mlflow_client(tracker.tracking_uri).get_metric_history(parent, "gate/rouge_l")
    assert sorted(one.step for one in history) == [0, 1]


def test_a_server_that_is_not_there_is_no_error_and_is_asked_once_a_minute(study):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # nobody listens on it, and nobody else gets it
        uri = f"http://key:secret@127.0.0.1:{held.getsockname()[1]}"
        tracker = open_tracking(study.config, uri)
        tracker.debts.clock = lambda: now
        now = 1e12
        assert tracker.start_study_run(study.config, "run-1") == ""
        asked = []
        tracker.debts._waiting.insert(0, Debt("a probe", lambda: asked.append(now) or refuse()))
        tracker.log_round(study.round(0))
        tracker.log_round(study.round(1))
        now += 59
        assert not tracker.catch_up()
        assert len(asked) == 1
        now += 2
        assert not tracker.catch_up()
        assert not tracker.catch_up(at_once=True)
        assert len(asked) == 3
    assert tracker.owed == ("a probe", "the experiment", "the study's run", "round 0", "round 1")
    (said,) = tracker.warnings
    assert "fedmentor track" in said
    assert "secret" not in said


def refuse():
    raise ConnectionRefusedError("nobody is there")


def test_a_second_run_of_the_same_thing_is_deleted(tracker, study):
    """As a request leaves it that was sent again because its answer was lost."""
    tracker.start_study_run(study.config, "run-1")
    tracker.log_round(study.round(0))
    (first,) = runs(tracker, "tags.`fedmentor.role` = 'round'")
    client = mlflow_client(tracker.tracking_uri)
    tags = {key: value for key, value in first.data.tags.items() if key.startswith("fedmentor.") or key == PARENT_TAG}
    client.create_run(tracker.experiment_id, start_time=first.info.start_time + 1, tags=tags)
    tracker.end_study_run("FINISHED")
    assert [one.info.run_id for one in runs(tracker, "tags.`fedmentor.role` = 'round'")] == [first.info.run_id]
    assert len(runs(tracker)) == 1 + 1 + 2


@pytest.mark.parametrize("uri", ["./mlruns", "file:///somewhere", "databricks"])
def test_store_that_mlflow_3_refuses(study, uri):
    with pytest.raises(ConfigError, match="is not supported"):
        open_tracking(study.config, uri)


def test_store_that_cannot_be_opened(study, tmp_path):
    (tmp_path / "mlflow.db").write_text("this is no database, only some text" * 100)
    with pytest.raises(ConfigError, match="cannot be used"):
        open_tracking(study.config, f"sqlite:///{tmp_path}/mlflow.db")


def test_deleted_experiment_is_named(tracker, study):
    mlflow_client(tracker.tracking_uri).delete_experiment(tracker.experiment_id)
    with pytest.raises(ConfigError, match="was deleted"):
        open_tracking(study.config, tracker.tracking_uri)


def test_artifacts_lie_beside_the_database(tracker, study):
    tracker.start_study_run(study.config, "run-1")
    tracker.log_round(study.round(0))
    folder = sqlite_path(tracker.tracking_uri).parent / "mlartifacts"
    assert list(folder.rglob("round.json"))
    assert open_tracking(study.config, tracker.tracking_uri).experiment_id == tracker.experiment_id


def test_threads_log_rounds_without_an_active_run(tracker, study):
    tracker.start_study_run(study.config, "run-1")
    threads = [threading.Thread(target=tracker.log_round, args=(study.round(index),)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tracker.warnings == ()
    assert len(runs(tracker)) == 1 + 4 * 3


def test_flatten_cuts_and_names():
    flat = flatten({"a": {"b": [1, 2]}, "list": [{"name": "x", "v": None}, {"v": "long" * 500}]})
    assert flat["a.b"] == "[1, 2]"
    assert flat["list.x.v"] == "null"
    assert len(flat["list.1.v"]) == 500


def test_importing_is_light_and_leaves_mlflow_out():
    code = "import sys, tasks.tracking, tasks.registry, flows.generate; print('mlflow' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert answer.stdout.strip() == "False"
