"""The gated evaluation: a task mapped over domains, and the gate's verdict. No decision is made here."""

from typing import Literal

from prefect import task
from prefect.cache_policies import NO_CACHE

from fedmentor_core import rounds
from fedmentor_core.discretion import discreet
from fedmentor_core.evaluation.gate import judge
from fedmentor_core.records import (
    ArtifactRef,
    DomainEvaluation,
    EvaluationMetrics,
    GateVerdict,
    MissingEvaluation,
    SafetyEvaluation,
)
from fedmentor_core.steps import evaluate_one
from fedmentor_core.study_ref import StudyRef
from fedmentor_core.workspace import workspace_of
from tasks.listening import tell
from tasks.sites import deliver


@task(
    name="evaluate",
    task_run_name="evaluate {domain} {split}",
    cache_policy=NO_CACHE,
    persist_result=False,
    log_prints=False,
)
@discreet
def evaluate_domain(
    ref: StudyRef, adapter: ArtifactRef, domain: str, split: Literal["gate", "test"]
) -> DomainEvaluation | MissingEvaluation:
    """Generate and score on one domain, here or at its site."""
    return evaluate_one(workspace_of(ref), adapter, domain, split, tell, deliver)


@task(name="safety prompts", cache_policy=NO_CACHE, persist_result=False, log_prints=False)
@discreet
def evaluate_safety(ref: StudyRef, adapter: ArtifactRef) -> SafetyEvaluation | None:
    """Answer the study's public safety prompts and score the answers."""
    return rounds.evaluate_safety(workspace_of(ref), adapter)


@task(name="gate", cache_policy=NO_CACHE, persist_result=False)
def gate(ref: StudyRef, metrics: EvaluationMetrics, comparisons: dict[str, EvaluationMetrics | None]) -> GateVerdict:
    """Every threshold, its value, pass or fail."""
    return judge(metrics, ref.config.evaluation.thresholds, comparisons)
