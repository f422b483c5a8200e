"""fedmentor track: log to MLflow what it missed of a study, from the study's own store, and register its adapter.

Round manifests and the ledger are the record; MLflow holds a copy. So whatever it missed while it did not answer, or
when a crash fell between a manifest and its logging, can be logged at any later time, by the same functions that the
flow uses, and nothing is logged twice.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmentor_core.errors import ConfigError, FedMentorError

if TYPE_CHECKING:
    from fedmentor_core.config import StudyConfig
    from fedmentor_core.records import ModelSummary, RoundManifest, StudySummary
    from fedmentor_core.study_ref import StudyRef
    from fedmentor_core.workspace import Workspace
    from tasks.tracking import Tracker


def track(
    out: Annotated[Path, typer.Option("--out", "-o", help="A study's output folder.")],
    tracking_uri: Annotated[
        str | None, typer.Option(help="Another MLflow than the study's, such as where that one is gone for good.")
    ] = None,
) -> None:
    """Log to MLflow what it missed of a study while it did not answer, and register the study's adapter.

    Trains nothing and charges nothing. Of a study that was cut short, the rounds that are there are logged; start it
    again to finish it.

    Example: **fedmentor track --out runs/quickstart**

    Exit codes: 0 MLflow has everything, 2 bad input, 1 it still does not answer, or anything else.
    """
    from flows.environment import prepare_environment

    prepare_environment(out)
    print(catch_up(out, tracking_uri))


def is_behind(folder: Path) -> bool:
    """Whether the study that ``folder`` holds is finished and tracked, and MLflow does not have all of it."""
    from flows.finishing import read_state

    state = read_state(folder)
    return state is not None and not state.complete and (folder / "summary.json").is_file()


def try_to_catch_up(folder: Path) -> str:
    """Catch up where a finished study is behind; never fails for it. What to tell; empty where nothing was missing."""
    if not is_behind(folder):
        return ""
    try:
        return catch_up(folder)
    except FedMentorError as error:
        return f"{folder}: {error}"


def catch_up(folder: Path, tracking_uri: str | None = None) -> str:
    """Log everything that a study's store holds; runs, rounds and files that MLflow has already are left alone.

    Args:
        folder: a study's output folder. Nothing else may be running in it.
        tracking_uri: MLflow's; default: the study's own.

    Returns:
        What MLflow has now, in one line.

    Raises:
        ConfigError: MLflow refused, or the folder holds no study that is to be tracked.
        TrackingError: MLflow does not answer, or does not take everything.
    """
    from fedmentor_core.study_ref import find_study
    from fedmentor_core.workspace import workspace_of
    from flows.environment import tracking_uri_of
    from flows.finishing import read_state, start_tracking
    from tasks.mlflow_connection import TrackingError

    config = _config_of(folder, tracking_uri)
    ref = find_study(config, folder)
    workspace = workspace_of(ref)
    state = read_state(folder)
    flow_run_id = None if state is None else state.flow_run_id
    tracker = start_tracking(ref, workspace, tracking_uri_of(ref.config, folder), flow_run_id)
    if tracker.owed:
        raise TrackingError(f"nothing could be logged: {tracker.warnings[0]}")
    manifests = _log_rounds(workspace, tracker)
    path = folder / "summary.json"
    if not path.is_file():
        tracker.end_study_run("KILLED")
        _check(tracker)
        return f"MLflow has the {len(manifests)} rounds that {folder} holds; the study is not finished."
    from fedmentor_core.records import StudySummary

    summary = _finish(ref, workspace, tracker, manifests, StudySummary.model_validate_json(path.read_text("utf-8")))
    _check(tracker)
    model = summary.model
    registered = "no model" if model is None else f"{model.name} version {model.version} ({', '.join(model.aliases)})"
    return f"MLflow has all of {summary.run_id}: {len(manifests)} rounds, the result, {registered}."


def _config_of(folder: Path, tracking_uri: str | None) -> "StudyConfig":
    from fedmentor_core.config_io import load_config

    for name in ("study.json", "config.yaml"):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} holds no {name}: not a study that was tracked. Run 'fedmentor run' first.")
    config = load_config(folder / "config.yaml")
    if not config.tracking.enabled:
        raise ConfigError(f"tracking.enabled is false in {folder}/config.yaml: this study is not to be tracked.")
    if tracking_uri is None:
        return config
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": tracking_uri})})


def _log_rounds(workspace: "Workspace", tracker: "Tracker") -> "list[RoundManifest]":
    from fedmentor_core.rounds import find_manifest

    if workspace.is_planned:
        tracker.log_datasets(workspace.plan.domains)
    manifests = []
    for index in range(workspace.config.rounds):
        manifest = find_manifest(workspace, index)
        if manifest is None:
            break
        tracker.log_round(manifest.summary)
        manifests.append(manifest)
    return manifests


def _finish(
    ref: "StudyRef",
    workspace: "Workspace",
    tracker: "Tracker",
    manifests: "list[RoundManifest]",
    summary: "StudySummary",
) -> "StudySummary":
    from flows.finishing import finish
    from tasks.tracking import BEHIND

    said = tuple(one for one in summary.warnings if not one.startswith(BEHIND))
    summary = summary.model_copy(update={"warnings": said})
    if summary.model is None and tracker.run_id and not tracker.owed:
        summary = _register(ref, tracker, manifests, summary)
    return finish(ref, workspace, summary, tracker)


def _register(
    ref: "StudyRef", tracker: "Tracker", manifests: "list[RoundManifest]", summary: "StudySummary"
) -> "StudySummary":
    """The registration that the flow could not make: same verdict, same audit."""
    from fedmentor_core.study import select_round
    from tasks.auditing import audit_is_due, audit_study, objections
    from tasks.registration import register_adapter

    chosen = next(one for one in manifests if one.round_index == summary.selected_round)
    if select_round(manifests) is not None:
        summary = summary.model_copy(update={"status": "promoted"})  # as before it had to wait
    audit = audit_study.fn(ref) if audit_is_due(ref, summary) else None
    with tempfile.TemporaryDirectory() as scratch:
        model: ModelSummary = register_adapter.fn(
            ref, summary, chosen.adapter, tracker.tracking_uri, tracker.run_id, scratch, audit
        )
    said = (*summary.warnings, *(objections(audit) if audit is not None else ()))
    held = summary.status == "promoted" and "champion" not in model.aliases
    return summary.model_copy(
        update={"model": model, "status": "held" if held else summary.status, "warnings": tuple(dict.fromkeys(said))}
    )


def _check(tracker: "Tracker") -> None:
    from tasks.mlflow_connection import TrackingError

    if tracker.owed:
        raise TrackingError(f"not everything could be logged: {tracker.warnings[0]}")
