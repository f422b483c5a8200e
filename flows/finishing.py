"""How a study begins and ends on disk and in MLflow, and what it remembers of a tracking that is behind.

``tracking.json`` says whether MLflow has all of the study. It is written before anything is tracked, and again,
complete, after everything is: a crash in between leaves a folder that says so, as an MLflow that did not answer does.
"""

from pathlib import Path

from pydantic import Field

from fedmentor_core.errors import IntegrityError
from fedmentor_core.records import Record, StudySummary
from fedmentor_core.study_ref import StudyRef
from fedmentor_core.workspace import Workspace
from flows.outputs import study_yaml, write_outputs, write_text
from tasks.tracking import BEHIND, Tracker, open_tracking

STATE_FILE = "tracking.json"
NOT_REGISTERED = f"{BEHIND}: the adapter is not registered"
"""How the warning begins that the registry did not answer."""


class TrackingState(Record):
    """``tracking.json``."""

    run_id: str
    flow_run_id: str | None = Field(description="Prefect's id of the study's last start.")
    mlflow_run_id: str | None = None
    complete: bool = Field(default=False, description="MLflow has every round, the result, the files and the model.")


def read_state(folder: Path) -> TrackingState | None:
    """What a study's folder remembers of its tracking; None where tracking never began.

    Raises:
        IntegrityError: the file is not one of ours.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    try:
        return TrackingState.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError:
        raise IntegrityError(
            f"{path} cannot be read. Remove it: the next start then logs to MLflow whatever is missing there."
        ) from None


def start_tracking(ref: StudyRef, workspace: Workspace, tracking_uri: str, flow_run_id: str | None) -> Tracker:
    """Open tracking, start or resume the study's run, and note in its folder that MLflow does not have it all.

    Raises:
        ConfigError: MLflow refused. A server that does not answer is no error: the tracker is behind then.
    """
    tracker = open_tracking(ref.config, tracking_uri)
    backbone = workspace.backbone_summary()
    tracker.start_study_run(
        ref.config,
        ref.run_id,
        flow_run_id=flow_run_id,
        facts={"backbone.loaded_sha256": backbone.sha256, "backbone.n_parameters": backbone.n_parameters},
    )
    _write_state(ref, TrackingState(run_id=ref.run_id, flow_run_id=flow_run_id))
    write_text(Path(ref.out_dir) / "config.yaml", study_yaml(ref.config))  # 'fedmentor track' reads it
    return tracker


def finish(ref: StudyRef, workspace: Workspace, summary: StudySummary, tracker: Tracker | None) -> StudySummary:
    """Write the outputs, log the result, and say in both what MLflow still lacks.

    A model that waits for its registration was not promoted: the study is held meanwhile.

    Returns:
        The summary as it was written.
    """
    if tracker is None:
        write_outputs(ref, workspace, summary)
        return summary
    if summary.model is None and summary.status == "promoted":
        summary = summary.model_copy(update={"status": "held"})
    said = tuple(one for one in summary.warnings if not one.startswith(f"{BEHIND}: MLflow"))
    found = {"tracking_uri": tracker.tracking_uri, "mlflow_run_id": tracker.run_id or None}
    summary = summary.model_copy(update={**found, "warnings": (*said, *tracker.warnings)})
    outputs = write_outputs(ref, workspace, summary)
    tracker.log_final(summary, config_yaml=outputs.config_yaml, report=outputs.report, ledger=outputs.ledger)
    tracker.end_study_run("FINISHED")
    if (*said, *tracker.warnings) != summary.warnings:
        summary = summary.model_copy(update={"warnings": (*said, *tracker.warnings)})
        write_outputs(ref, workspace, summary)
    state = read_state(Path(ref.out_dir))
    _write_state(
        ref,
        TrackingState(
            run_id=ref.run_id,
            flow_run_id=None if state is None else state.flow_run_id,
            mlflow_run_id=tracker.run_id or None,
            complete=not tracker.owed and summary.model is not None,
        ),
    )
    return summary


def _write_state(ref: StudyRef, state: TrackingState) -> None:
    write_text(Path(ref.out_dir) / STATE_FILE, state.model_dump_json(indent=2) + "\n")
