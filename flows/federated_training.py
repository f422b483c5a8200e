"""The main flow: rounds of mapped client training, aggregation, gated evaluation and noise adaptation.

The story itself is ``fedmentor_core.study.run_study``; here its steps become Prefect tasks.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefect import flow, unmapped
from prefect.runtime import flow_run

from fedmentor_core.champion import Champion
from fedmentor_core.config import StudyConfig
from fedmentor_core.discretion import discreet
from fedmentor_core.errors import LedgerError, SiteError
from fedmentor_core.privacy.validation_plan import SetName
from fedmentor_core.progress import ProgressEvent
from fedmentor_core.records import (
    ArtifactRef,
    ClientAssignment,
    ClientUpdate,
    DomainPlan,
    EvaluationMetrics,
    GateVerdict,
    ModelSummary,
    RoundManifest,
    SafetyEvaluation,
    StudyPlan,
    StudySummary,
)
from fedmentor_core.steps import report_failure, settle_plan
from fedmentor_core.study import Evaluations, run_study
from fedmentor_core.study_ref import StudyRef, open_study
from fedmentor_core.workspace import Workspace, workspace_of
from flows.environment import default_store, tracking_uri_of
from flows.finishing import NOT_REGISTERED, finish, start_tracking
from flows.task_runners import machines, mapped_to_machines, overlaps, same_for_all, thread_runner
from tasks import reporting
from tasks.aggregation import aggregate
from tasks.auditing import audit_is_due, audit_study, objections
from tasks.champion import fix_the_champion
from tasks.client_training import train_client
from tasks.evaluation import evaluate_domain, evaluate_safety, gate
from tasks.listening import InterruptedByUserError, tell_and_log
from tasks.reference import fix_the_reference
from tasks.registration import register_adapter
from tasks.registry_client import RegistrySilentError
from tasks.sites import plan_at_site
from tasks.tracking import Tracker


class PrefectEngine:
    """Carries out a study's steps as Prefect tasks; implements ``fedmentor_core.study.Engine``."""

    def __init__(self, ref: StudyRef, workspace: Workspace, tracker: Tracker | None, progress_id: str) -> None:
        """Map tasks for ``ref``."""
        self.ref = ref
        self.workspace = workspace
        self.tracker = tracker
        self.progress_id = progress_id
        self.warnings: tuple[str, ...] = ()
        self._behind = False
        self._ahead: tuple[tuple[ClientAssignment, ...], Sequence[Any]] = ((), ())
        if tracker is not None:
            self._tell_of_tracking()

    def in_round(self, round_index: int, body: Callable[[], RoundManifest]) -> RoundManifest:
        """A round is a sub-flow, so that it shows as one in the UI."""
        waiting = len(self.workspace.domains_at_sites)  # threads that wait for a site train nothing here
        runner = thread_runner(self.ref.config.execution, waiting=waiting)

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

    @property
    def _ref_for_all(self) -> Any:
        return same_for_all(self.ref, self.ref.config.execution)

    def _ask_plans(self) -> list[DomainPlan | SiteError]:
        names = [domain.name for domain in self.workspace.domains_at_sites]
        found: list[DomainPlan | SiteError] = []
        for future in plan_at_site.map(self._ref_for_all, names):
            result = future.result(raise_on_failure=False)
            if isinstance(result, BaseException) and not isinstance(result, SiteError):
                raise result
            found.append(result)
        return found

    def train(self, assignments: Sequence[ClientAssignment]) -> list[ClientUpdate]:
        """``train_client.map`` over the clients; one that fails for good is a fact about the round.

        Those that trained while the round before was evaluated are done.
        """
        asked, results = self._ahead
        self._ahead = ((), ())
        if asked != tuple(assignments):
            with mapped_to_machines(self.ref.config.execution):
                results = _results(self._map_clients(assignments))
        updates = []
        for result, assignment in zip(results, assignments, strict=True):
            if isinstance(result, LedgerError | InterruptedByUserError):
                raise result
            if isinstance(result, BaseException):
                result = report_failure(self.workspace, assignment, result)
            updates.append(result)
        return updates

    def _map_clients(self, assignments: Sequence[ClientAssignment]) -> Any:
        retrying = train_client.with_options(retries=self.ref.config.execution.client_retries)
        return retrying.map(self._ref_for_all, list(assignments))

    def aggregate(self, base: ArtifactRef, updates: Sequence[ClientUpdate]) -> tuple[ArtifactRef, list[ClientUpdate]]:
        """The server's aggregation task."""
        return aggregate(self.ref, base, list(updates))

    def evaluate(self, adapter: ArtifactRef, split: SetName, meanwhile: Sequence[ClientAssignment] = ()) -> Evaluations:
        """``evaluate_domain.map`` over the domains, and beside it the next round's clients where that saves time."""
        execution = self.ref.config.execution
        names = [domain.name for domain in self.ref.config.domains]
        ahead = tuple(meanwhile) if overlaps(self.workspace) else ()
        with mapped_to_machines(execution):
            futures = evaluate_domain.map(self._ref_for_all, unmapped(adapter), names, unmapped(split))
            clients = self._map_clients(ahead) if ahead else ()
            evaluations = _results(futures)
            self._ahead = (ahead, _results(clients))
        for one in evaluations:
            if isinstance(one, BaseException):
                raise one
        return evaluations

    def safety(self, adapter: ArtifactRef) -> SafetyEvaluation | None:
        """The safety prompts' task; no task where none are configured."""
        if self.ref.config.evaluation.safety_prompts is None:
            return None
        return evaluate_safety(self.ref, adapter)

    def gate(self, metrics: EvaluationMetrics, comparisons: dict[str, EvaluationMetrics | None]) -> GateVerdict:
        """The gate task."""
        return gate(self.ref, metrics, dict(comparisons))

    def reference(self) -> EvaluationMetrics | None:
        """Gate metrics of the configured MLflow run, fixed when the study first read them."""
        return fix_the_reference(self.ref, tracking_uri_of(self.ref.config, self.ref.out_dir))

    def champion(self) -> Champion | None:
        """The registry's champion, fixed when the study first started."""
        config = self.ref.config
        return fix_the_champion(self.ref, tracking_uri_of(config, self.ref.out_dir)) if config.needs_champion else None

    def track_round(self, manifest: RoundManifest) -> None:
        """MLflow runs and Prefect artifacts of a committed round."""
        if self.tracker is not None:
            self.tracker.log_round(manifest.summary)
            self._tell_of_tracking(manifest.round_index)
        reporting.round_artifacts(manifest, private=self.ref.config.is_private)
        done = 100.0 * (manifest.round_index + 1) / self.ref.config.rounds
        reporting.update_progress_artifact(artifact_id=self.progress_id, progress=done)

    def _tell_of_tracking(self, round_index: int | None = None) -> None:
        """Say that MLflow does not answer, and when it does again."""
        assert self.tracker is not None
        behind = bool(self.tracker.owed)
        if behind != self._behind:
            said = "MLflow does not answer; training goes on" if behind else "MLflow answers again and has everything"
            tell_and_log(ProgressEvent("prepare" if round_index is None else "gate", said, round_index=round_index))
        self._behind = behind

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
        self.tracker.catch_up(at_once=True)
        if not self.tracker.run_id:
            return self._registration_waits("MLflow has not answered since the study started")
        try:
            with tempfile.TemporaryDirectory() as folder:
                return register_adapter(
                    self.ref, summary, adapter, self.tracker.tracking_uri, self.tracker.run_id, folder, audit
                )
        except RegistrySilentError as error:
            return self._registration_waits(str(error))

    def _registration_waits(self, reason: str) -> None:
        """No model yet: 'fedmentor track', or the next start, registers it."""
        self.warnings = (*self.warnings, f"{NOT_REGISTERED} ({reason.rstrip('.')}). 'fedmentor track --out DIR' does.")


def _results(futures: Any) -> Sequence[Any]:
    """What the tasks gave, or the exceptions that they failed with."""
    return [future.result(raise_on_failure=False) for future in futures]


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
    ref = open_study(config, out_dir, default_store())
    workspace = workspace_of(ref)
    tracker = None
    if config.tracking.enabled:
        tracker = start_tracking(ref, workspace, tracking_uri_of(config, out_dir), flow_run.id)
    status: Any = "FAILED"
    try:
        engine = PrefectEngine(ref, workspace, tracker, reporting.start_progress(ref.run_id))
        plan = engine.plan()
        reporting.plan_artifact(ref.run_id, plan, private=config.is_private)
        if tracker is not None:
            tracker.log_datasets(plan.domains)
        with machines(config.execution):
            summary = run_study(ref, engine, tell_and_log)
        summary = summary.model_copy(update={"warnings": (*summary.warnings, *engine.warnings)})
        summary = finish(ref, workspace, summary, tracker)
        reporting.final_artifact(summary, str(Path(ref.out_dir) / "report.html"))
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit, InterruptedByUserError):
        status = "KILLED"
        raise
    finally:
        if tracker is not None and status != "FINISHED":
            tracker.end_study_run(status)
    return summary
