"""MLflow tracking of a study: one parent run, a nested run per round, a nested run per client.

Always ``MlflowClient`` with explicit run ids: the active run of ``mlflow.log_metric`` is thread-local, so in
a mapped task it would silently open a new run. Everything here can be called again after a crash: runs are
found by their tags, and a round's metrics carry that round run's start time, so writing twice gives the same
rows.

Losing the tracking server must not lose a study. ``open_tracking`` and ``start_study_run`` raise, because
they run before any budget is spent; every later call is best effort and adds to ``Tracker.warnings`` instead.

Only what is in ``fedmentor_core.records`` is logged: public values, never rows or their profile.
"""

import functools
import json
import logging
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec
from urllib.parse import urlsplit, urlunsplit

from fedmentor_core.config import StudyConfig
from fedmentor_core.config_io import config_sha256
from fedmentor_core.errors import ConfigError
from fedmentor_core.records import (
    ClientSummary,
    DomainPlan,
    EvaluationMetrics,
    Metrics,
    RoundSummary,
    StudySummary,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_ID_TAG = "fedmentor.run_id"
ROLE_TAG = "fedmentor.role"
ROUND_TAG = "fedmentor.round"
CLIENT_TAG = "fedmentor.client"
PARENT_TAG = "mlflow.parentRunId"
MAX_PARAM_CHARS = 500
MAX_TAG_CHARS = 5000
_BATCH = 100  # MLflow's limit on the params or tags of one call
_DIGEST_CHARS = 36  # MLflow's limit on a dataset's digest
_REFERENCE_METRICS = tuple(name for name in Metrics.model_fields if name != "toxicity_max")

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
P = ParamSpec("P")


def mlflow_client(tracking_uri: str, *, must_exist: bool = False) -> "MlflowClient":
    """Return a client for ``tracking_uri``, with MLflow's telemetry and start-up chatter switched off.

    Args:
        tracking_uri: ``sqlite:////absolute/file.db``, another database URI, or an ``http(s)://`` server.
        must_exist: Refuse a sqlite file that is not there, rather than creating an empty database.

    Raises:
        ConfigError: the URI cannot be a tracking store.
    """
    _check_uri(tracking_uri, must_exist=must_exist)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # MLflow's 7 take minutes to give up
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")  # a uv.lock in the working folder is none of ours
    for name in ("alembic", "mlflow.store", "mlflow.tracking", "mlflow.models", "mlflow.pyfunc"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from mlflow import MlflowClient

    try:
        return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)  # opens a database at once
    except Exception as error:
        raise _unreachable(tracking_uri, error) from error


def _unreachable(tracking_uri: str, error: BaseException) -> ConfigError:
    return ConfigError(
        f"MLflow at {_redact(tracking_uri)} cannot be used: {_first_line(error)}. "
        "Check the tracking URI, or run with --set tracking.enabled=false."
    )


def sqlite_path(tracking_uri: str) -> Path | None:
    """The file behind a sqlite URI; None for any other store."""
    prefix = "sqlite:///"
    return Path(tracking_uri.removeprefix(prefix)) if tracking_uri.startswith(prefix) else None


def _check_uri(tracking_uri: str, *, must_exist: bool) -> None:
    if not re.match(r"^(https?|sqlite|postgresql|mysql|mssql)(\+\w+)?:", tracking_uri):
        raise ConfigError(
            f"tracking.uri {_redact(tracking_uri)!r} is not supported: MLflow 3 has no plain-folder store. "
            "Give sqlite:////absolute/path/mlflow.db, another database, or http(s)://server."
        )
    path = sqlite_path(tracking_uri)
    if path is not None and must_exist and not path.is_file():
        raise ConfigError(
            f"no MLflow database at {path}. Give --tracking-uri of the study that registered the model, "
            "as printed at the end of 'fedmentor run'."
        )


def _redact(url: str) -> str:
    """``url`` without user name and password."""
    parts = urlsplit(url)
    if "@" not in parts.netloc:
        return url
    return urlunsplit(parts._replace(netloc="***@" + parts.netloc.rpartition("@")[2]))


def open_tracking(config: StudyConfig, tracking_uri: str, artifact_root: Path | None = None) -> "Tracker":
    """Create the database and the experiment, once, before any task starts.

    Several first uses of one sqlite file would race on its schema migration.

    Args:
        config: the study.
        tracking_uri: where MLflow keeps its runs.
        artifact_root: folder for artifacts of a new experiment; default for sqlite: ``mlartifacts`` beside
            the database; for a server: the server's own.

    Raises:
        ConfigError: the store cannot be opened. Nothing has been spent yet.
    """
    path = sqlite_path(tracking_uri)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        artifact_root = artifact_root or path.absolute().parent / "mlartifacts"
    client = mlflow_client(tracking_uri)
    try:
        experiment_id = _experiment(client, config.tracking.experiment, artifact_root)
    except ConfigError:
        raise
    except Exception as error:
        raise _unreachable(tracking_uri, error) from error
    return Tracker(tracking_uri=tracking_uri, experiment_id=experiment_id)


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


def _best_effort(
    method: "Callable[Concatenate[Tracker, P], None]",
) -> "Callable[Concatenate[Tracker, P], None]":
    """Turn any failure into a line of ``Tracker.warnings``: a study outlives its tracking server."""

    @functools.wraps(method)
    def guarded(self: "Tracker", /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.warnings.append(f"MLflow {method.__name__} failed: {_first_line(error)}")

    return guarded


@dataclass
class Tracker:
    """Writes one study into MLflow. Small and picklable: it holds strings, and no connection.

    Attributes:
        tracking_uri: where MLflow keeps its runs.
        experiment_id: the experiment's id.
        study_run_id: FedMentor's own id of the study run; set by ``start_study_run``.
        run_id: MLflow's id of the parent run; set by ``start_study_run``.
        warnings: what could not be logged, for ``summary.json`` and the report.
    """

    tracking_uri: str
    experiment_id: str
    study_run_id: str = ""
    run_id: str = ""
    warnings: list[str] = field(default_factory=list)

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
            MLflow's run id.

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
            key: _cut(str(value), MAX_PARAM_CHARS) for key, value in (facts or {}).items()
        }
        try:
            client = mlflow_client(self.tracking_uri)
            run = self._find(client, {RUN_ID_TAG: study_run_id, ROLE_TAG: "study"})
            if run is None:
                run = client.create_run(self.experiment_id, run_name=config.name, tags=tags)
            else:
                client.update_run(run.info.run_id, status="RUNNING")
                _log_tags(client, run.info.run_id, tags)
            missing = {key: value for key, value in params.items() if key not in run.data.params}
            _log_params(client, run.info.run_id, missing)
        except Exception as error:
            raise _unreachable(self.tracking_uri, error) from error
        self.study_run_id, self.run_id = study_run_id, run.info.run_id
        return self.run_id

    @_best_effort
    def log_datasets(self, domains: Iterable[DomainPlan]) -> None:
        """Describe each domain's data: name, fingerprint, unit count. Never rows, a schema or a profile."""
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

    @_best_effort
    def log_baseline(self, baseline: EvaluationMetrics, baseline_gate: EvaluationMetrics) -> None:
        """Log the untrained backbone's scores as ``baseline/*`` (test set) and ``baseline_gate/*``."""
        values = _scores("baseline", baseline) | _scores("baseline_gate", baseline_gate)
        self._log_changed(mlflow_client(self.tracking_uri), values)

    @_best_effort
    def log_round(self, summary: RoundSummary) -> None:
        """Log one committed round on the parent (step = round index) and as nested runs of its own.

        Guarantees:
            Logging the same round again, after a resume, adds nothing.
        """
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
        verdict = {
            "fedmentor.gate": "passed" if summary.gate.passed else "failed",
            "fedmentor.gate_reasons": "; ".join(summary.gate.reasons) or "every threshold passed",
            "fedmentor.noise_changes": "; ".join(
                f"{change.domain}: {change.from_:.4g} -> {change.to:.4g} ({change.reason})"
                for change in summary.noise_changes
            )
            or "none",
        }
        _log_tags(client, run.info.run_id, verdict)
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
        values = {
            key: float(value)
            for key, value in one.model_dump().items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        _log_metrics(client, run.info.run_id, values, round_index, run.info.start_time)
        _log_tags(client, run.info.run_id, {"fedmentor.status": one.status, "fedmentor.reason": one.reason})
        status = "FAILED" if one.status in ("failed", "rejected") else "FINISHED"
        end = run.info.start_time + int(one.seconds * 1000)
        client.set_terminated(run.info.run_id, status=status, end_time=end)

    @_best_effort
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
        client, parent = mlflow_client(self.tracking_uri), self._parent()
        values = _scores("baseline", summary.baseline) | _scores("baseline_gate", summary.baseline_gate)
        values["final/seconds_total"] = summary.seconds_total
        if summary.final is not None:
            values |= _scores("final", summary.final)
        selected = [one for one in summary.rounds if one.round_index == summary.selected_round]
        if selected:
            values |= _scores("final_gate", selected[0].metrics)
        self._log_changed(client, values)
        model = f"{summary.model.name}/{summary.model.version}" if summary.model else "none"
        _log_tags(
            client,
            parent,
            {
                "fedmentor.status": summary.status,
                "fedmentor.private": "true" if summary.private else "false",
                "fedmentor.selected_round": str(summary.selected_round),
                "fedmentor.model": model,
                "fedmentor.backbone_sha256": summary.backbone.sha256,
                "fedmentor.scorers": summary.scorers.model_dump_json(),
            },
        )
        client.log_text(parent, summary.model_dump_json(by_alias=True, indent=2), "summary.json")
        if config_yaml is not None:
            client.log_text(parent, config_yaml, "config.yaml")
        if ledger is not None:
            client.log_dict(parent, dict(ledger), "ledger.json")
        if report is not None:
            client.log_text(parent, Path(report).read_text(encoding="utf-8"), "report.html")

    @_best_effort
    def end_study_run(self, status: RunStatus) -> None:
        """Close the parent run, and as KILLED any nested run that a crash left open."""
        client, parent = mlflow_client(self.tracking_uri), self._parent()
        for run in self._search(client, {RUN_ID_TAG: self.study_run_id}):
            if run.info.status == "RUNNING" and run.info.run_id != parent:
                client.set_terminated(run.info.run_id, status="KILLED")
        client.set_terminated(parent, status=status)

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
        runs = self._search(client, tags)
        return min(runs, key=lambda run: run.info.start_time) if runs else None

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


def reference_metrics(tracking_uri: str, run_id: str, domains: Iterable[str] = ()) -> EvaluationMetrics:
    """Final gate scores of another study's parent run, overall and by domain.

    Args:
        tracking_uri: where that run is.
        run_id: MLflow's id of its parent run.
        domains: domains that must be there.

    Raises:
        ConfigError: there is no such run, or it lacks a score that is needed.
    """
    from mlflow.exceptions import MlflowException

    client = mlflow_client(tracking_uri, must_exist=True)
    advice = "Give the MLflow run id of a finished FedMentor study in tracking.reference_run_id."
    where = f"reference run {run_id!r} at {_redact(tracking_uri)}"
    try:
        shown = client.get_run(run_id).data.metrics
    except MlflowException as error:
        raise ConfigError(f"{where} cannot be read: {_first_line(error)}. {advice}") from None
    prefix = "final_gate/"
    scores = {key.removeprefix(prefix): value for key, value in shown.items() if key.startswith(prefix)}
    found = sorted({key.rpartition("/")[0] for key in scores} - {""})
    wanted = sorted({*found, *domains})
    needed = [*_REFERENCE_METRICS, *(f"{domain}/{name}" for domain in wanted for name in _REFERENCE_METRICS)]
    missing = [name for name in needed if name not in scores]
    if missing:
        shown_names = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise ConfigError(f"{where} has no final gate score for: {shown_names}; its domains: {found}. {advice}")

    def of(scope: str) -> dict[str, Any]:
        values: dict[str, Any] = {name: scores.get(scope + name) for name in Metrics.model_fields}
        return values | {"n_examples": int(values["n_examples"])}

    by_domain = {domain: Metrics(**of(f"{domain}/")) for domain in wanted}
    return EvaluationMetrics(**of(""), by_domain=by_domain)


def round_metrics(summary: RoundSummary) -> dict[str, float]:
    """The public numbers of one round under their MLflow names."""
    values = _scores("gate", summary.metrics)
    values["gate/passed"] = float(summary.gate.passed)
    values["bytes_total"] = float(summary.bytes_total)
    values["round_seconds"] = summary.seconds
    values["clients_trained"] = float(sum(one.status == "trained" for one in summary.clients))
    for one in summary.clients:
        for name in ("epsilon_spent", "epsilon_budget", "noise_multiplier"):
            value = getattr(one, name)
            if value is not None:
                values[f"privacy/{one.domain}/{name}"] = value
        values[f"traffic/{one.domain}/bytes_up"] = float(one.bytes_up)
        values[f"traffic/{one.domain}/bytes_down"] = float(one.bytes_down)
    return values


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as ``{"a.b.0": "text"}``; a list item that has a name goes by its name."""
    if isinstance(value, Mapping) and value:
        items: Iterable[tuple[str, Any]] = ((str(key), item) for key, item in value.items())
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        items = (
            (str(item["name"]) if isinstance(item, Mapping) and "name" in item else str(index), item)
            for index, item in enumerate(value)
        )
    else:
        text = _redact(value) if isinstance(value, str) and "://" in value else value
        shown = text if isinstance(text, str) else json.dumps(text)
        return {prefix: _cut(shown, MAX_PARAM_CHARS)}
    flat: dict[str, str] = {}
    for key, item in items:
        flat |= flatten(item, f"{prefix}.{key}" if prefix else key)
    return flat


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


def quoted(value: str) -> str:
    """``value`` as a string literal of MLflow's search language."""
    if "'" in value:
        raise ConfigError(f"an id or name used in MLflow must not hold a single quote, got {value!r}.")
    return f"'{value}'"


def _scores(prefix: str, metrics: EvaluationMetrics) -> dict[str, float]:
    values: dict[str, float] = {}
    for scope, scores in (("", metrics), *((f"{name}/", one) for name, one in metrics.by_domain.items())):
        for name in Metrics.model_fields:
            value = getattr(scores, name)
            if value is not None:
                values[f"{prefix}/{scope}{name}"] = float(value)
    return values


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

    client.log_batch(run_id, tags=[RunTag(key, _cut(value, MAX_TAG_CHARS)) for key, value in values.items()])


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _first_line(error: BaseException) -> str:
    """Class and first line of ``error``, short enough for a message, without credentials."""
    line = (str(error).strip().splitlines() or [""])[0]
    line = re.sub(r"//[^/@\s]+@", "//***@", line)
    return f"{type(error).__name__}: {_cut(line, 300)}".rstrip(".")
