"""The reference run's gate metrics: read from MLflow once, and kept in the run's store for every resume."""

from collections.abc import Iterable
from typing import Any

from fedmentor_core.errors import ConfigError
from fedmentor_core.records import UNRELEASED_METRICS, EvaluationMetrics, Metrics
from fedmentor_core.study_ref import StudyRef
from fedmentor_core.workspace import workspace_of
from tasks.mlflow_connection import first_line, mlflow_client, redact
from tasks.tracked_values import SCORES

_REFERENCE_METRICS = tuple(name for name in SCORES if name not in UNRELEASED_METRICS)


def fix_the_reference(ref: StudyRef, tracking_uri: str) -> EvaluationMetrics | None:
    """Gate metrics of ``tracking.reference_run_id``; None where none is configured.

    Raises:
        ConfigError: MLflow has no such finished run, or cannot be asked for it.
    """
    run_id = ref.config.tracking.reference_run_id
    if run_id is None:
        return None
    workspace = workspace_of(ref)
    key = workspace.key(f"references/{run_id}.json")
    if workspace.store.exists(key):
        return EvaluationMetrics.model_validate(workspace.store.get_json(key))
    found = reference_metrics(tracking_uri, run_id, [domain.name for domain in ref.config.domains])
    workspace.store.put_json(key, found)
    return found


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
    where = f"reference run {run_id!r} at {redact(tracking_uri)}"
    try:
        shown = client.get_run(run_id).data.metrics
    except MlflowException as error:
        raise ConfigError(f"{where} cannot be read: {first_line(error)}. {advice}") from None
    prefix = "final_gate/"
    final = {key.removeprefix(prefix): value for key, value in shown.items() if key.startswith(prefix)}
    found = sorted({key.rpartition("/")[0] for key in final} - {""})
    wanted = sorted({*found, *domains})
    needed = [*_REFERENCE_METRICS, *(f"{domain}/{name}" for domain in wanted for name in _REFERENCE_METRICS)]
    missing = [name for name in needed if name not in final]
    if missing:
        shown_names = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise ConfigError(f"{where} has no final gate score for: {shown_names}; its domains: {found}. {advice}")

    def of(scope: str) -> dict[str, Any]:
        values: dict[str, Any] = {name: final.get(scope + name) for name in SCORES}
        return values | {"n_examples": int(values["n_examples"])}

    by_domain = {domain: Metrics(**of(f"{domain}/")) for domain in wanted}
    return EvaluationMetrics(**of(""), by_domain=by_domain)
