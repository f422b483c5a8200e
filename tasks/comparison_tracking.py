"""A comparison in MLflow: one run, with the table's numbers as ``ARM.METRIC`` and its files as artifacts."""

from collections.abc import Mapping
from pathlib import Path

from fedmentor_core.compare.outputs import CSV, JSON, MARKDOWN, PAGE
from fedmentor_core.compare.records import ComparisonFile, ComparisonTable
from fedmentor_core.config import StudyConfig
from fedmentor_core.discretion import failure_reason
from tasks.mlflow_connection import mlflow_client, quoted
from tasks.tracking import RUN_ID_TAG, open_tracking

ROLE = {"fedmentor.role": "comparison"}


def log_comparison(
    config: StudyConfig, file: ComparisonFile, table: ComparisonTable, out: Path, tracking_uri: str
) -> str | None:
    """Log a finished comparison, or log it again after more cells were finished: it keeps its one run.

    Args:
        config: the study; its ``tracking.experiment`` is used.
        file: whose ``comparison_id`` names the run.
        table: the numbers.
        out: the folder with the files.
        tracking_uri: of MLflow.

    Returns:
        None, or why MLflow has not all of it. The files in ``out`` are the record, so a comparison never fails for it.
    """
    try:
        _log(config, file, table, out, tracking_uri)
    except Exception as error:  # a server that is away, or refuses
        return f"MLflow has not taken the comparison: {failure_reason(error)}. Start it again to log it."
    return None


def _log(config: StudyConfig, file: ComparisonFile, table: ComparisonTable, out: Path, tracking_uri: str) -> None:
    tracker = open_tracking(config, tracking_uri)
    client = mlflow_client(tracking_uri)
    query = f"tags.`{RUN_ID_TAG}` = {quoted(file.comparison_id)}"
    found = client.search_runs([tracker.experiment_id], query, max_results=1)
    if found:
        run_id = found[0].info.run_id
    else:
        tags = {RUN_ID_TAG: file.comparison_id, "fedmentor.study": table.name, "fedmentor.private": "false", **ROLE}
        run_id = client.create_run(tracker.experiment_id, run_name=f"{table.name} comparison", tags=tags).info.run_id
    for name, value in table_metrics(table).items():
        client.log_metric(run_id, name, value)
    client.set_tag(run_id, "fedmentor.status", "some cells failed" if table.failures else "finished")
    for name in (JSON, CSV, MARKDOWN, PAGE):
        client.log_artifact(run_id, str(out / name))
    client.set_terminated(run_id, status="FAILED" if table.failures else "FINISHED")


def table_metrics(table: ComparisonTable) -> Mapping[str, float]:
    """Means by ``ARM.METRIC``, and paired differences by ``ARM.METRIC.difference``."""
    means = {f"{arm.name}.{name}": found.mean for arm in table.arms for name, found in arm.metrics.items()}
    return means | {f"{one.arm}.{one.metric}.difference": one.mean for one in table.differences}
