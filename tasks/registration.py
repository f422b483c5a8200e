"""From a finished study to a version in the model registry."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from fedmentor_core.adapters.lora import save_adapter_folder
from fedmentor_core.audit.mechanism import Mechanism
from fedmentor_core.audit.verdict import FinishedAudit
from fedmentor_core.discretion import discreet
from fedmentor_core.lineage import Lineage, lineage_of
from fedmentor_core.records import ArtifactRef, GateSummary, ModelSummary, Record, StudySummary
from fedmentor_core.study_ref import StudyRef
from fedmentor_core.workspace import Workspace, workspace_of
from tasks.registration_records import BackboneReference, DomainPromise, Registration
from tasks.registry import register_and_decide
from tasks.tracking import git_sha


@task(name="register", cache_policy=NO_CACHE, persist_result=False)
@discreet
def register_adapter(
    ref: StudyRef,
    summary: StudySummary,
    adapter: ArtifactRef,
    tracking_uri: str,
    mlflow_run_id: str,
    folder: str,
    audit: FinishedAudit | None = None,
) -> ModelSummary:
    """Register the selected adapter as challenger; the verdicts of gate and audit decide about ``champion``."""
    workspace = workspace_of(ref)
    config = ref.config
    target = Path(folder) / "adapter"
    save_adapter_folder(
        target, workspace.full_adapter_state(adapter), config.adapter, workspace.initial_adapter.targets
    )
    lineage = lineage_of(workspace, summary, adapter, git_sha() or "unknown")
    registration = Registration(
        name=config.tracking.registered_model,
        study_run_id=ref.run_id,
        mlflow_run_id=mlflow_run_id,
        config_sha256=ref.config_sha256,
        private=summary.private,
        promises=DomainPromise.of(summary),
        backbone=BackboneReference(
            name=_portable_name(config.backbone.name),
            revision=config.backbone.revision,
            sha256=workspace.backbone.sha256,
            dtype=config.backbone.dtype,
            max_length=config.backbone.max_length,
            max_new_tokens=config.evaluation.max_new_tokens,
        ),
        mechanism=Mechanism.of(config, workspace.backbone.sha256),
        lineage=lineage,
        audit_required=config.audit.before_promotion,
        rival=_rival(workspace) if config.compares_with_champion else None,
    )
    model = register_and_decide(tracking_uri, registration, target, _verdict(summary, lineage), audit=audit)
    registered = RegisteredAs(name=model.name, version=model.version)
    workspace.store.put_json(workspace.key(f"models/{model.name}-{model.version}.json"), registered)
    return model


class RegisteredAs(Record):
    """``models/`` in a run's store: which version the study became. Aliases move, so they are not part of it."""

    name: str
    version: str


def _verdict(summary: StudySummary, lineage: Lineage) -> GateSummary:
    """The gate's verdict on the registered adapter, and none other's."""
    selected = next(one for one in summary.rounds if one.round_index == summary.selected_round)
    if not lineage.gate_manifest:
        return GateSummary(passed=False, reasons=("no round's verdict speaks for this adapter",))
    if selected.gate.passed and summary.status != "promoted":  # an adapter that no client of this study trained
        return GateSummary(passed=False, reasons=("no client trained in the round that passed",))
    return selected.gate


def _rival(workspace: Workspace) -> str:
    champion = workspace.champion
    return "none" if champion is None else champion.version


def _portable_name(name: str) -> str:
    """A folder by its absolute path, so that the model loads from any working directory."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name
