"""The main flow: rounds of mapped client training, aggregation, gated evaluation and noise adaptation.

The story itself is ``fedmentor_core.study.run_study``; here its steps become Prefect tasks.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefect import flow, unmapped
from prefect.task_runners import ThreadPoolTaskRunner

from fedmentor_core.champion import Champion
from fedmentor_core.config import StudyConfig
from fedmentor_core.discretion import discreet
from fedmentor_core.errors import LedgerError, SiteError
from fedmentor_core.privacy.validation_plan import SetName
from fedmentor_core.records import (
    ArtifactRef,
    ClientAssignment,
    ClientUpdate,
    DomainPlan,
    EvaluationMetrics,
    GateVerdict,
    ModelSummary,
    RoundManifest,
    StudyPlan,
    StudySummary,
)
from fedmentor_core.steps import report_failure, settle_plan
from fedmentor_core.study import Evaluations, run_study
from fedmentor_core.study_ref import StudyRef, open_study
from fedmentor_core.workspace import Workspace, workspace_of
from flows.outputs import write_outputs
from tasks import reporting
from tasks.aggregation import aggregate
from tasks.auditing import audit_is_due, audit_study, objections
from tasks.champion import fix_the_champion
from tasks.client_training import train_client
from tasks.evaluation import evaluate_domain, gate
from tasks.listening import InterruptedByUserError, tell
from tasks.registration import register_adapter
from tasks.sites import plan_at_site
from tasks.tracking import Tracker, open_tracking, reference_metrics


class PrefectEngine:
    """Carries out a study's steps as Prefect tasks; implements ``fedmentor_core.study.Engine``."""

    def __init__(self, ref: StudyRef, workspace: Workspace, tracker: Tracker | None, progress_id: str) -> None:
        """Map tasks for ``ref``."""
        self.ref = ref
        self.workspace = workspace
        self.tracker = tracker
        self.progress_id = progress_id
        self.warnings: tuple[str, ...] = ()

    def in_round(self, round_index: int, body: Callable[[], RoundManifest]) -> RoundManifest:
        """A round is a sub-flow, so that it shows as one in the UI."""
        waiting = len(self.workspace.domains_at_sites)  # threads that wait for a site train nothing here
        runner: Any = ThreadPoolTaskRunner(max_workers=self.ref.config.execution.max_parallel_clients + waiting)

        @flow(
            name="round",
            flow_run_name="round {round_index}",
            task_runner=runner,
            persist_result=False,
            log_prints=False,
        )
        def federated_round(round_index: int) -> RoundManifest:
            return discreet(body)()

        return federated_round(round_index)

    def plan(self) -> StudyPlan:
        """``plan_at_site.map`` over the domains at sites; what is here is planned here."""
        return settle_plan(self.workspace, self._ask_plans)

    def _ask_plans(self) -> list[DomainPlan | SiteError]:
        names = [domain.name for domain in self.workspace.domains_at_sites]
        found: list[DomainPlan | SiteError] = []
        for future in plan_at_site.map(unmapped(self.ref), names):
            result = future.result(raise_on_failure=False)
            if isinstance(result, BaseException) and not isinstance(result, SiteError):
                raise result
            found.append(result)
        return found

    def train(self, assignments: Sequence[ClientAssignment]) -> list[ClientUpdate]:
        """``train_client.map`` over the clients; one that fails for good is a fact about the round."""
        retrying = train_client.with_options(retries=self.ref.config.execution.client_retries)
        futures = retrying.map(unmapped(self.ref), list(assignments))
        updates = []
        for future, assignment in zip(futures, assignments, strict=True):
            result = future.result(raise_on_failure=False)
            if isinstance(result, LedgerError | InterruptedByUserError):
                raise result
            if isinstance(result, BaseException):
                result = report_failure(self.workspace, assignment, result)
            updates.append(result)
        return updates

    def aggregate(self, base: ArtifactRef, updates: Sequence[ClientUpdate]) -> tuple[ArtifactRef, list[ClientUpdate]]:
        """The server's aggregation task."""
        return aggregate(self.ref, base, list(updates))

    def evaluate(self, adapter: ArtifactRef, split: SetName) -> Evaluations:
        """``evaluate_domain.map`` over the domains."""
        names = [domain.name for domain in self.ref.config.domains]
        futures = evaluate_domain.map(unmapped(self.ref), unmapped(adapter), names, unmapped(split))
        return [future.result() for future in futures]

    def gate(self, metrics: EvaluationMetrics, comparisons: dict[str, EvaluationMetrics | None]) -> GateVerdict:
        """The gate task."""
        return gate(self.ref, metrics, dict(comparisons))

    def reference(self) -> EvaluationMetrics | None:
        """Gate metrics of the configured MLflow run."""
        run_id = self.ref.config.tracking.reference_run_id
        if run_id is None:
            return None
        return reference_metrics(tracking_uri_of(self.ref), run_id, [domain.name for domain in self.ref.config.domains])

    def champion(self) -> Champion | None:
        """The registry's champion, fixed when the study first started."""
        return fix_the_champion(self.ref, tracking_uri_of(self.ref)) if self.ref.config.needs_champion else None

    def track_round(self, manifest: RoundManifest) -> None:
        """MLflow runs and Prefect artifacts of a committed round."""
        if self.tracker is not None:
            self.tracker.log_round(manifest.summary)
        reporting.round_artifacts(manifest, private=self.ref.config.is_private)
        done = 100.0 * (manifest.round_index + 1) / self.ref.config.rounds
        reporting.update_progress_artifact(artifact_id=self.progress_id, progress=done)

    def register(self, summary: StudySummary, adapter: ArtifactRef) -> ModelSummary | None:
        """Register the adapter; the verdicts of gate and audit decide whether it becomes champion."""
        due = audit_is_due(self.ref, summary)
        if self.tracker is None:
            if due:
                self.warnings = ("audit.before_promotion: nothing was audited, because tracking is off, so no model "
                                 "was registered.",)  # fmt: skip
            return None
        audit = audit_study(self.ref) if due else None
        self.warnings = objections(audit) if audit is not None else ()
        with tempfile.TemporaryDirectory() as folder:
            return register_adapter(
                self.ref, summary, adapter, self.tracker.tracking_uri, self.tracker.run_id, folder, audit
            )


@flow(
    name="federated-training",
    flow_run_name="{config.name}",
    persist_result=False,
    log_prints=False,
    validate_parameters=True,
)
@discreet
def federated_training(config: StudyConfig, out_dir: str) -> StudySummary:
    """Run a federated study, or resume the one that ``out_dir`` holds.

    Args:
        config: The whole study.
        out_dir: Folder for summary, report, store and (by default) the MLflow database, on the worker's machine. The
            same folder and study again resume it.
    """
    ref = open_study(config, out_dir)
    workspace = workspace_of(ref)
    tracker = _start_tracking(ref, workspace) if config.tracking.enabled else None
    status: Any = "FAILED"
    try:
        engine = PrefectEngine(ref, workspace, tracker, reporting.start_progress(ref.run_id))
        plan = engine.plan()
        reporting.plan_artifact(ref.run_id, plan, private=config.is_private)
        if tracker is not None:
            tracker.log_datasets(plan.domains)
        summary = run_study(ref, engine, tell)
        summary = summary.model_copy(update={"warnings": (*summary.warnings, *engine.warnings)})
        if tracker is not None:
            summary = summary.model_copy(
                update={
                    "tracking_uri": tracker.tracking_uri,
                    "mlflow_run_id": tracker.run_id,
                    "warnings": (*summary.warnings, *tracker.warnings),
                }
            )
        outputs = write_outputs(ref, workspace, summary)
        if tracker is not None:
            tracker.log_final(summary, config_yaml=outputs.config_yaml, report=outputs.report, ledger=outputs.ledger)
        reporting.final_artifact(summary, str(outputs.report))
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit, InterruptedByUserError):
        status = "KILLED"
        raise
    finally:
        if tracker is not None:
            tracker.end_study_run(status)
    return summary


def tracking_uri_of(ref: StudyRef) -> str:
    """Where MLflow keeps this study's runs: as configured, else the server of MLFLOW_TRACKING_URI, else beside them."""
    given = ref.config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return given or f"sqlite:///{Path(ref.out_dir).resolve() / 'mlflow.db'}"


def _start_tracking(ref: StudyRef, workspace: Workspace) -> Tracker:
    from prefect.runtime import flow_run

    tracker = open_tracking(ref.config, tracking_uri_of(ref))
    backbone = workspace.backbone_summary()
    tracker.start_study_run(
        ref.config,
        ref.run_id,
        flow_run_id=flow_run.id,
        facts={"backbone.loaded_sha256": backbone.sha256, "backbone.n_parameters": backbone.n_parameters},
    )
    return tracker
