"""MLflow tracking of a study: one parent run, a nested run per round, a nested run per client.

Always ``MlflowClient`` with explicit run ids: the active run of ``mlflow.log_metric`` is thread-local, so in
a mapped task it would silently open a new run. Everything here can be called again after a crash: runs are
found by their tags, and a round's metrics carry that round run's start time, so writing twice gives the same
rows.

Losing the tracking server must not lose a study. What MLflow does not take is owed: it is kept, in order, and tried
again with whatever is logged next, so that a server that comes back gets all it has missed. What is still owed when the
study ends is logged from its store by ``flows/track.py``.

Only what is in ``fedmentor_core.records`` is logged: public values, never rows or their profile.
"""

import functools
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedmentor_core.config import StudyConfig
from fedmentor_core.config_io import config_sha256
from fedmentor_core.errors import ConfigError
from fedmentor_core.records import (
    ClientSummary,
    DomainPlan,
    EvaluationMetrics,
    RoundSummary,
    StudySummary,
)
from tasks.debts import Debts
from tasks.mlflow_connection import cut, redact, unusable
from tasks.mlflow_connection import mlflow_client as mlflow_client
from tasks.mlflow_connection import quoted as quoted
from tasks.mlflow_connection import sqlite_path as sqlite_path
from tasks.tracked_values import (
    MAX_PARAM_CHARS,
    client_metrics,
    final_metrics,
    final_tags,
    flatten,
    round_metrics,
    round_tags,
    scores,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_ID_TAG = "fedmentor.run_id"
ROLE_TAG = "fedmentor.role"
ROUND_TAG = "fedmentor.round"
CLIENT_TAG = "fedmentor.client"
PARENT_TAG = "mlflow.parentRunId"
MAX_TAG_CHARS = 5000
BEHIND = "tracking is behind"
"""How the warning begins that something is owed to MLflow."""
_BATCH = 100  # MLflow's limit on the params or tags of one call
_DIGEST_CHARS = 36  # MLflow's limit on a dataset's digest

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


def open_tracking(config: StudyConfig, tracking_uri: str, artifact_root: Path | None = None) -> "Tracker":
    """Create the database and the experiment, once, before any task starts.

    Several first uses of one sqlite file would race on its schema migration.

    Args:
        config: the study.
        tracking_uri: where MLflow keeps its runs.
        artifact_root: folder for artifacts of a new experiment; default for sqlite: ``mlartifacts`` beside
            the database; for a server: the server's own.

    Returns:
        The tracker; it is behind from the start where a server does not answer.

    Raises:
        ConfigError: the store refused, or a database cannot be opened. Nothing has been spent yet.
    """
    path = sqlite_path(tracking_uri)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        artifact_root = artifact_root or path.absolute().parent / "mlartifacts"
    tracker = Tracker(tracking_uri=tracking_uri)
    tracker.open_experiment(config.tracking.experiment, artifact_root)
    return tracker


def _experiment(client: "MlflowClient", name: str, artifact_root: Path | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        location = None if artifact_root is None else artifact_root.absolute().as_uri()
        try:
            # without its kind MLflow opens an experiment on its page for traces, where a study shows nothing
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return client.create_experiment(name, artifact_location=location, tags=kind)
        except MlflowException:  # another process was faster
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise ConfigError(
            f"MLflow experiment {name!r} was deleted. Restore it ('mlflow experiments restore -x "
            f"{found.experiment_id}') or give another name in tracking.experiment."
        )
    return str(found.experiment_id)


@dataclass
class Tracker:
    """Writes one study into MLflow, now or, where MLflow does not answer, later. Thread-safe; holds no connection.

    Attributes:
        tracking_uri: where MLflow keeps its runs.
        experiment_id: the experiment's id; empty until MLflow has answered once.
        study_run_id: FedMentor's own id of the study run; set by ``start_study_run``.
        run_id: MLflow's id of the parent run; empty until MLflow has answered once.
        debts: what MLflow has not taken yet.
    """

    tracking_uri: str
    experiment_id: str = ""
    study_run_id: str = ""
    run_id: str = ""
    debts: Debts = field(default_factory=Debts)

    @property
    def owed(self) -> tuple[str, ...]:
        """What MLflow has not taken yet, in order."""
        return self.debts.owed

    @property
    def warnings(self) -> tuple[str, ...]:
        """What every output must say of it; empty when nothing is owed."""
        if not self.owed:
            return ()
        said = f"MLflow at {redact(self.tracking_uri)} has not taken {', '.join(self.owed)} ({self.debts.problem})"
        return (f"{BEHIND}: {said}. 'fedmentor track --out DIR' logs what is missing once it answers.",)

    def catch_up(self, *, at_once: bool = False) -> bool:
        """Try what is owed; see ``Debts.settle``. Whether nothing is owed any more."""
        return self.debts.settle(at_once=at_once)

    def _begin(self, what: str, pay: Callable[[], None]) -> None:
        """The first steps, before anything is spent: only a server that does not answer is waited for.

        Raises:
            ConfigError: anything else went wrong.
        """
        try:
            self.debts.begin(what, pay, wait=sqlite_path(self.tracking_uri) is None)
        except ConfigError:
            raise
        except Exception as error:
            raise unusable(self.tracking_uri, error) from error

    # --- what is logged -----------------------------------------------------------------------------------------

    def open_experiment(self, name: str, artifact_root: Path | None) -> None:
        """Find or create the experiment.

        Raises:
            ConfigError: it was deleted, or the store refused.
        """

        def pay() -> None:
            self.experiment_id = _experiment(mlflow_client(self.tracking_uri), name, artifact_root)

        self._begin("the experiment", pay)

    def start_study_run(
        self,
        config: StudyConfig,
        study_run_id: str,
        *,
        flow_run_id: str | None = None,
        facts: Mapping[str, str | int | float] | None = None,
    ) -> str:
        """Start the parent run, or resume it when this study run already has one.

        Args:
            config: logged as flat parameters, long values cut, passwords in URLs hidden.
            study_run_id: FedMentor's id, the same over every resume.
            flow_run_id: Prefect's, when there is one.
            facts: more parameters, such as the backbone's digest and parameter count.

        Returns:
            MLflow's run id; empty while MLflow does not answer.

        Raises:
            ConfigError: the tracking store refused; nothing has been spent yet.
        """
        tags = {
            RUN_ID_TAG: study_run_id,
            ROLE_TAG: "study",
            "fedmentor.study": config.name,
            "fedmentor.config_sha256": config_sha256(config),
            "fedmentor.private": "true" if config.is_private else "false",
        }
        if (sha := git_sha()) is not None:
            tags["mlflow.source.git.commit"] = sha
        if flow_run_id is not None:
            tags["prefect.flow_run_id"] = flow_run_id
        params = flatten(config.model_dump(mode="json")) | {
            key: cut(str(value), MAX_PARAM_CHARS) for key, value in (facts or {}).items()
        }
        self.study_run_id = study_run_id
        self._begin("the study's run", partial(self._start, config.name, tags, params))
        return self.run_id

    def _start(self, name: str, tags: Mapping[str, str], params: Mapping[str, str]) -> None:
        client = mlflow_client(self.tracking_uri)
        run = self._find(client, {RUN_ID_TAG: self.study_run_id, ROLE_TAG: "study"})
        if run is None:
            run = client.create_run(self.experiment_id, run_name=name, tags=dict(tags))
        else:
            client.update_run(run.info.run_id, status="RUNNING")
            _log_tags(client, run.info.run_id, tags)
        missing = {key: value for key, value in params.items() if key not in run.data.params}
        _log_params(client, run.info.run_id, missing)
        self.run_id = run.info.run_id

    def log_datasets(self, domains: Iterable[DomainPlan]) -> None:
        """Describe each domain's data: name, fingerprint, unit count. Never rows, a schema or a profile."""
        self.debts.owe("the datasets", partial(self._log_datasets, tuple(domains)))

    def _log_datasets(self, domains: Iterable[DomainPlan]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for plan in domains:
            source = {"fingerprint": plan.dataset_fingerprint, "n_units": plan.n_units}
            dataset = Dataset(
                name=plan.domain,
                digest=plan.dataset_fingerprint[:_DIGEST_CHARS],
                source_type="fedmentor_descriptor",
                source=json.dumps(source, sort_keys=True),
            )
            tags = {"mlflow.data.context": "train", "fedmentor.n_units": str(plan.n_units)}
            inputs.append(DatasetInput(dataset, tags=[InputTag(key, value) for key, value in tags.items()]))
        mlflow_client(self.tracking_uri).log_inputs(self._parent(), datasets=inputs)

    def log_baseline(self, baseline: EvaluationMetrics, baseline_gate: EvaluationMetrics) -> None:
        """Log the untrained backbone's scores as ``baseline/*`` (test set) and ``baseline_gate/*``."""
        values = scores("baseline", baseline) | scores("baseline_gate", baseline_gate)
        self.debts.owe("the baseline", lambda: self._log_changed(mlflow_client(self.tracking_uri), values))

    def log_round(self, summary: RoundSummary) -> None:
        """Log one committed round on the parent (step = round index) and as nested runs of its own.

        Guarantees:
            Logging the same round again, after a resume, adds nothing.
        """
        self.debts.owe(f"round {summary.round_index}", partial(self._log_round, summary))

    def _log_round(self, summary: RoundSummary) -> None:
        client, parent = mlflow_client(self.tracking_uri), self._parent()
        now = int(time.time() * 1000)
        start = now - int(summary.seconds * 1000)
        run = self._nested(
            client,
            name=f"round {summary.round_index}",
            tags={PARENT_TAG: parent, ROLE_TAG: "round", ROUND_TAG: str(summary.round_index)},
            start=start,
        )
        if run.info.status == "FINISHED":
            return
        values = round_metrics(summary)
        _log_metrics(client, parent, values, summary.round_index, run.info.start_time)
        _log_metrics(client, run.info.run_id, values, summary.round_index, run.info.start_time)
        _log_tags(client, run.info.run_id, round_tags(summary))
        client.log_dict(run.info.run_id, summary.model_dump(mode="json", by_alias=True), "round.json")
        for one in summary.clients:
            self._log_client(client, one, run, summary.round_index)
        end = run.info.start_time + int(summary.seconds * 1000)
        client.set_terminated(run.info.run_id, status="FINISHED", end_time=end)

    def _log_client(self, client: "MlflowClient", one: ClientSummary, round_run: "Run", round_index: int) -> None:
        run = self._nested(
            client,
            name=f"{one.domain} round {round_index}",
            tags={
                PARENT_TAG: round_run.info.run_id,
                ROLE_TAG: "client",
                ROUND_TAG: str(round_index),
                CLIENT_TAG: one.domain,
            },
            start=round_run.info.start_time,
        )
        if run.info.status in ("FINISHED", "FAILED"):
            return
        _log_metrics(client, run.info.run_id, client_metrics(one), round_index, run.info.start_time)
        _log_tags(client, run.info.run_id, {"fedmentor.status": one.status, "fedmentor.reason": one.reason})
        status = "FAILED" if one.status in ("failed", "rejected") else "FINISHED"
        end = run.info.start_time + int(one.seconds * 1000)
        client.set_terminated(run.info.run_id, status=status, end_time=end)

    def log_final(
        self,
        summary: StudySummary,
        *,
        config_yaml: str | None = None,
        report: Path | None = None,
        ledger: Mapping[str, Any] | None = None,
    ) -> None:
        """Log the study's result: ``final/*`` (test set), ``final_gate/*`` (gate set), and the files.

        ``final_gate/*`` are the selected round's gate scores: what ``reference_metrics`` reads for another
        study's 'reference' thresholds.

        Args:
            summary: becomes ``summary.json``.
            config_yaml: becomes ``config.yaml``.
            report: the HTML file; becomes ``report.html``.
            ledger: the ledgers' snapshot, as ``fedmentor ledger --json`` prints it; becomes ``ledger.json``.
        """
        self.debts.owe("the result", partial(self._log_final, summary, config_yaml, report, ledger), at_once=True)

    def _log_final(
        self, summary: StudySummary, config_yaml: str | None, report: Path | None, ledger: Mapping[str, Any] | None
    ) -> None:
        client, parent = mlflow_client(self.tracking_uri), self._parent()
        self._log_changed(client, final_metrics(summary))
        _log_tags(client, parent, final_tags(summary))
        client.log_text(parent, summary.model_dump_json(by_alias=True, indent=2), "summary.json")
        if config_yaml is not None:
            client.log_text(parent, config_yaml, "config.yaml")
        if ledger is not None:
            client.log_dict(parent, dict(ledger), "ledger.json")
        if report is not None:
            client.log_text(parent, Path(report).read_text(encoding="utf-8"), "report.html")

    def end_study_run(self, status: RunStatus) -> None:
        """Close the parent run, and as KILLED any nested run that a crash left open.

        A request whose answer was lost is sent again, and may have made a second run of one round or client: all but
        the first, which holds the values, are deleted.
        """
        self.debts.owe("the end", partial(self._end, status))

    def _end(self, status: RunStatus) -> None:
        client, parent = mlflow_client(self.tracking_uri), self._parent()
        seen = {self._identity(client.get_run(parent))}
        for run in sorted(self._search(client, {RUN_ID_TAG: self.study_run_id}), key=_by_age):
            if run.info.run_id == parent:
                continue
            if self._identity(run) in seen:
                client.delete_run(run.info.run_id)
            elif run.info.status == "RUNNING":
                client.set_terminated(run.info.run_id, status="KILLED")
            seen.add(self._identity(run))
        client.set_terminated(parent, status=status)

    @staticmethod
    def _identity(run: "Run") -> tuple[str, ...]:
        """What a run is of; there is one run of each."""
        return tuple(run.data.tags.get(tag, "") for tag in (ROLE_TAG, ROUND_TAG, CLIENT_TAG))

    def _parent(self) -> str:
        if not self.run_id:
            raise RuntimeError("start_study_run comes first")
        return self.run_id

    def _log_changed(self, client: "MlflowClient", values: Mapping[str, float]) -> None:
        """Log at step 0 those values that the parent does not show already."""
        shown = client.get_run(self._parent()).data.metrics
        changed = {key: value for key, value in values.items() if shown.get(key) != value}
        _log_metrics(client, self._parent(), changed, 0, int(time.time() * 1000))

    def _nested(self, client: "MlflowClient", *, name: str, tags: Mapping[str, str], start: int) -> "Run":
        identity = {RUN_ID_TAG: self.study_run_id, **tags}
        found = self._find(client, identity)
        if found is not None:
            return found
        return client.create_run(self.experiment_id, start_time=start, run_name=name, tags=identity)

    def _find(self, client: "MlflowClient", tags: Mapping[str, str]) -> "Run | None":
        return min(self._search(client, tags), key=_by_age, default=None)

    def _search(self, client: "MlflowClient", tags: Mapping[str, str]) -> "list[Run]":
        query = " and ".join(f"tags.`{key}` = {quoted(value)}" for key, value in tags.items())
        runs: list[Run] = []
        token = None
        while True:
            page = client.search_runs([self.experiment_id], query, max_results=1000, page_token=token)
            runs.extend(page)
            token = page.token
            if not token:
                return runs


@functools.cache
def git_sha() -> str | None:
    """Commit of the source tree this module lies in; None when it is not in one."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    sha = answer.stdout.strip()
    return sha if answer.returncode == 0 and re.fullmatch(r"[0-9a-f]{40,64}", sha) else None


def _by_age(run: "Run") -> tuple[int, str]:
    return run.info.start_time, run.info.run_id


def _log_metrics(client: "MlflowClient", run_id: str, values: Mapping[str, float], step: int, timestamp: int) -> None:
    from mlflow.entities import Metric

    metrics = [Metric(key, value, timestamp, step) for key, value in values.items()]
    for first in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[first : first + 1000])


def _log_params(client: "MlflowClient", run_id: str, values: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    params = [Param(key, value) for key, value in values.items()]
    for first in range(0, len(params), _BATCH):
        client.log_batch(run_id, params=params[first : first + _BATCH])


def _log_tags(client: "MlflowClient", run_id: str, values: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(key, cut(value, MAX_TAG_CHARS)) for key, value in values.items()])
