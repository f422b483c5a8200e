"""A whole federated study, told once.

``run_study`` is the story; an ``Engine`` says how its steps are carried out. ``InProcess`` carries them out as plain
function calls; ``flows/federated_training.py`` maps the same steps as Prefect tasks. So orchestration adds durability
and nothing else, and a test holds both to the same adapters.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from fedmentor_core import rounds
from fedmentor_core.aggregation import find_rule
from fedmentor_core.champion import Champion
from fedmentor_core.errors import ConfigError, SiteError
from fedmentor_core.evaluation.evaluate import combine
from fedmentor_core.evaluation.gate import judge
from fedmentor_core.privacy.validation_plan import SetName
from fedmentor_core.progress import Listener, ProgressEvent, silent
from fedmentor_core.records import (
    ArtifactRef,
    ClientAssignment,
    ClientUpdate,
    DomainEvaluation,
    EvaluationMetrics,
    GateVerdict,
    MissingEvaluation,
    ModelSummary,
    RoundManifest,
    SafetyEvaluation,
    Sample,
    StudyPlan,
    StudySummary,
)
from fedmentor_core.rounds import Comparisons, RoundState
from fedmentor_core.site.asking import Deliver
from fedmentor_core.steps import evaluate_one, plan_one, settle_plan, train_with_retries
from fedmentor_core.study_ref import StudyRef
from fedmentor_core.workspace import Workspace, workspace_of

Evaluations = Sequence[DomainEvaluation | MissingEvaluation]


class Engine(Protocol):
    """How the steps of a study are carried out."""

    @property
    def workspace(self) -> Workspace:
        """What the study needs at hand in this process."""
        ...

    def in_round(self, round_index: int, body: Callable[[], RoundManifest]) -> RoundManifest:
        """Run a round's body; an orchestrator may wrap it."""
        ...

    def plan(self) -> StudyPlan:
        """The plan, for which sites are asked where the run has none yet."""
        ...

    def train(self, assignments: Sequence[ClientAssignment]) -> list[ClientUpdate]:
        """Every client's part of a round; a client that fails is reported, not raised."""
        ...

    def aggregate(self, base: ArtifactRef, updates: Sequence[ClientUpdate]) -> tuple[ArtifactRef, list[ClientUpdate]]:
        """Join the updates into the next global adapter."""
        ...

    def evaluate(self, adapter: ArtifactRef, split: SetName, meanwhile: Sequence[ClientAssignment] = ()) -> Evaluations:
        """Evaluate on every domain; a site that does not answer is reported, not raised.

        The clients of ``meanwhile`` may train at the same time; a later ``train`` of the same then has their updates.
        """
        ...

    def safety(self, adapter: ArtifactRef) -> SafetyEvaluation | None:
        """Answers to the safety prompts, scored; None where none are configured."""
        ...

    def gate(self, metrics: EvaluationMetrics, comparisons: Comparisons) -> GateVerdict:
        """The verdict on a candidate."""
        ...

    def reference(self) -> EvaluationMetrics | None:
        """Gate metrics of the reference run, where one is configured."""
        ...

    def champion(self) -> Champion | None:
        """Fix who is champion now, where the study needs one, or find who was when the study first started."""
        ...

    def track_round(self, manifest: RoundManifest) -> None:
        """Record a committed round (also one that was committed before a resume)."""
        ...

    def register(self, summary: StudySummary, adapter: ArtifactRef) -> ModelSummary | None:
        """Put the selected adapter in the model registry."""
        ...


class InProcess:
    """Plain function calls; no tracking, no registry."""

    def __init__(self, workspace: Workspace, listen: Listener = silent, deliver: Deliver | None = None) -> None:
        """Carry out the steps in this process; requests to sites, if there are any, go by ``deliver``."""
        self.workspace = workspace
        self.listen = listen
        self.deliver = deliver

    def in_round(self, round_index: int, body: Callable[[], RoundManifest]) -> RoundManifest:
        """No wrapping."""
        return body()

    def plan(self) -> StudyPlan:
        """Ask one site after another, where domains are at sites."""
        names = [domain.name for domain in self.workspace.domains_at_sites]
        return settle_plan(self.workspace, lambda: [plan_one(self.workspace, name, self.deliver) for name in names])

    def train(self, assignments: Sequence[ClientAssignment]) -> list[ClientUpdate]:
        """One client after another, with retries."""
        return [train_with_retries(self.workspace, assignment, self.listen, self.deliver) for assignment in assignments]

    def aggregate(self, base: ArtifactRef, updates: Sequence[ClientUpdate]) -> tuple[ArtifactRef, list[ClientUpdate]]:
        """See ``rounds.aggregate``."""
        return rounds.aggregate(self.workspace, base, updates)

    def evaluate(self, adapter: ArtifactRef, split: SetName, meanwhile: Sequence[ClientAssignment] = ()) -> Evaluations:
        """One domain after another, and nothing meanwhile."""
        return [
            evaluate_one(self.workspace, adapter, d.name, split, self.listen, self.deliver)
            for d in self.workspace.config.domains
        ]

    def safety(self, adapter: ArtifactRef) -> SafetyEvaluation | None:
        """See ``rounds.evaluate_safety``."""
        return rounds.evaluate_safety(self.workspace, adapter)

    def gate(self, metrics: EvaluationMetrics, comparisons: Comparisons) -> GateVerdict:
        """See ``evaluation.gate.judge``."""
        return judge(metrics, self.workspace.config.evaluation.thresholds, comparisons)

    def reference(self) -> EvaluationMetrics | None:
        """A reference run lives in MLflow, which the core does not know."""
        if self.workspace.config.tracking.reference_run_id is not None:
            raise ConfigError("tracking.reference_run_id needs MLflow: run the study with 'fedmentor run'.")
        return None

    def champion(self) -> Champion | None:
        """Whoever was fixed before; looking one up needs a registry, which the core does not know."""
        return self.workspace.champion if self.workspace.config.needs_champion else None

    def track_round(self, manifest: RoundManifest) -> None:
        """Nothing to track."""

    def register(self, summary: StudySummary, adapter: ArtifactRef) -> ModelSummary | None:
        """No registry."""
        return None


def run_study(ref: StudyRef, engine: Engine | None = None, listen: Listener = silent) -> StudySummary:
    """Run, or resume, a study to its end.

    Args:
        ref: from ``open_study``.
        engine: how to carry out the steps; default: plain calls in this process.
        listen: told of progress.

    Returns:
        The summary; ``final`` comes from the test set, which no decision looked at.

    Raises:
        BudgetError: no domain's budget carries the plan.
        ConfigError: the champion that the study is to start from does not fit it; nothing was charged.
        FedMentorError: too few usable updates in a round, and other errors named there.
    """
    engine = engine if engine is not None else InProcess(workspace_of(ref), listen)
    workspace, config = engine.workspace, ref.config
    started = rounds.now()

    listen(ProgressEvent("prepare", "loading backbone, data and plan", n_rounds=config.rounds))
    plan = engine.plan()
    champion = engine.champion()
    state = RoundState.first(workspace)  # first of all: a champion to start from that does not fit is refused here
    untrained = workspace.untrained_adapter
    listen(ProgressEvent("baseline", "evaluating the untrained backbone"))
    baseline_evaluations = engine.evaluate(untrained, "gate")
    baseline_tests = engine.evaluate(untrained, "test")
    safety_baseline = engine.safety(untrained)
    comparisons: Comparisons = {
        "baseline": comparable(baseline_evaluations),
        "reference": engine.reference(),
        **_champion_metrics(workspace, engine, champion, listen),
    }

    manifests: list[RoundManifest] = []
    exhausted = False
    for round_index in range(config.rounds):
        manifest = rounds.find_manifest(workspace, round_index)
        if manifest is None:
            body = partial(_run_round, workspace, engine, state, comparisons, listen)
            manifest = engine.in_round(round_index, body)
        engine.track_round(manifest)
        manifests.append(manifest)
        verdict = "passed" if manifest.summary.gate.passed else "did not pass"
        listen(
            ProgressEvent(
                "gate", f"gate {verdict}", round_index=round_index, n_rounds=config.rounds, completed=round_index + 1,
                total=config.rounds,
            )
        )  # fmt: skip
        state = RoundState.after(manifest)
        if all(client.status == "rested" for client in manifest.summary.clients):
            exhausted = True
            break

    selected = select_round(manifests)
    chosen = manifests[selected if selected is not None else -1]
    listen(ProgressEvent("final", "evaluating on the test set"))
    final_tests = engine.evaluate(chosen.adapter, "test")
    safety_final = engine.safety(chosen.adapter)
    unanswered = missing([*baseline_evaluations, *baseline_tests, *final_tests])
    summary = StudySummary(
        run_id=ref.run_id,
        study=config.name,
        status="promoted" if selected is not None else "budget_exhausted" if exhausted else "held",
        private=config.is_private,
        config_sha256=ref.config_sha256,
        backbone=workspace.backbone_summary(),
        adapter=workspace.adapter_summary(),
        scorers=answered(baseline_evaluations)[0].scorers,
        baseline=combine(answered(baseline_tests)),
        baseline_gate=combine(answered(baseline_evaluations)),
        rounds=tuple(manifest.summary for manifest in manifests),
        selected_round=chosen.round_index,
        final=combine(answered(final_tests)),
        safety_baseline=safety_baseline,
        safety_final=safety_final,
        alarms={one.domain: one.alarms for one in answered(baseline_evaluations) if one.alarms is not None},
        plan=plan,
        model=None,
        warnings=(*warnings_of(ref, plan), *dict.fromkeys(map(said_of, unanswered))),
        store_url=workspace.store.url,
        tracking_uri=None,
        seconds_total=rounds.now() - started,
    )
    listen(ProgressEvent("register", "registering the adapter"))
    model = engine.register(summary, chosen.adapter)
    status = summary.status
    if status == "promoted" and model is not None and "champion" not in model.aliases:
        status = "held"  # the registry refused, such as for a study that is not private
    listen(ProgressEvent("done", status))
    return summary.model_copy(update={"model": model, "status": status, "seconds_total": rounds.now() - started})


def _champion_metrics(workspace: Workspace, engine: Engine, champion: Champion | None, listen: Listener) -> Comparisons:
    """The champion on tonight's gate set: nothing where there is none, None where its backbone is another."""
    if champion is None or not workspace.config.compares_with_champion:
        return {}
    if champion.backbone_sha256 != workspace.backbone.sha256:
        return {"champion": None}
    listen(ProgressEvent("baseline", f"evaluating the champion (version {champion.version})"))
    return {"champion": comparable(engine.evaluate(champion.adapter, "gate"))}


def _run_round(
    workspace: Workspace, engine: Engine, state: RoundState, comparisons: Comparisons, listen: Listener
) -> RoundManifest:
    started = rounds.now()
    index, total = state.round_index, workspace.config.rounds
    listen(ProgressEvent("train", "clients train", round_index=index, n_rounds=total))
    updates = engine.train(rounds.assignments_for(workspace, state))
    listen(ProgressEvent("aggregate", "aggregating", round_index=index, n_rounds=total))
    adapter, judged = engine.aggregate(state.adapter, updates)
    listen(ProgressEvent("evaluate", "evaluating the candidate", round_index=index, n_rounds=total))
    ahead = rounds.assignments_ahead(workspace, state, adapter, judged)
    evaluations = engine.evaluate(adapter, "gate", ahead)
    prompts = workspace.config.evaluation.safety_prompts
    safety = engine.safety(adapter) if prompts is not None and prompts.every_round else None
    judgeable = answered(evaluations)
    verdict = without_missing(engine.gate(combine(judgeable), comparisons), missing(evaluations))
    return rounds.commit_round(
        workspace, state, adapter, judged, judgeable, verdict, comparisons, rounds.now() - started, safety
    )


def answered(evaluations: Evaluations) -> list[DomainEvaluation]:
    """Those that were made.

    Raises:
        SiteError: none was.
    """
    made = [one for one in evaluations if isinstance(one, DomainEvaluation)]
    if not made:
        reasons = "; ".join(map(said_of, missing(evaluations)))
        raise SiteError(f"no domain was evaluated ({reasons}). What is finished is kept; run again to go on.")
    return made


def missing(evaluations: Evaluations) -> list[MissingEvaluation]:
    """Those that a site did not make."""
    return [one for one in evaluations if isinstance(one, MissingEvaluation)]


def said_of(one: MissingEvaluation) -> str:
    """A missing evaluation in one line."""
    return f"the {one.split} set of domain {one.domain!r} was not evaluated: {one.reason}"


def comparable(evaluations: Evaluations) -> EvaluationMetrics | None:
    """Metrics that a candidate may be compared with: None where a domain is missing, which fails every such line."""
    return None if missing(evaluations) else combine(answered(evaluations))


def without_missing(verdict: GateVerdict, unanswered: Sequence[MissingEvaluation]) -> GateVerdict:
    """The verdict, failed where a domain was not evaluated: nobody knows whether the candidate is safe there."""
    if not unanswered:
        return verdict
    return verdict.model_copy(update={"passed": False, "reasons": (*verdict.reasons, *map(said_of, unanswered))})


def select_round(manifests: Sequence[RoundManifest]) -> int | None:
    """Position of the passing round with the best utility on the gate set; None when none passed.

    Utility is the mean of BERTScore F1, ROUGE-L and label F1; a tie goes to the later round. Rounds in which every
    client rested repeat the adapter before them and are no candidates.
    """
    passing = [
        position
        for position, manifest in enumerate(manifests)
        if manifest.summary.gate.passed and any(c.status == "trained" for c in manifest.summary.clients)
    ]
    if not passing:
        return None

    def utility(position: int) -> tuple[float, int]:
        metrics = manifests[position].summary.metrics
        return metrics.bertscore_f1 + metrics.rouge_l + metrics.label_f1, position

    return max(passing, key=utility)


def samples_by_round(workspace: Workspace) -> dict[int, tuple[Sample, ...]]:
    """Public gate-set outputs of each committed round."""
    found: dict[int, tuple[Sample, ...]] = {}
    for index in range(workspace.config.rounds):
        manifest = rounds.find_manifest(workspace, index)
        if manifest is None:
            break
        found[index] = manifest.samples
    return found


def warnings_of(ref: StudyRef, plan: StudyPlan) -> tuple[str, ...]:
    """What every output of this run must say aloud."""
    privacy = ref.config.privacy
    said = [*plan.refusals, *plan.warnings, *(warning for domain in plan.domains for warning in domain.warnings)]
    if privacy.mode == "none":
        said.append("NOT PRIVATE: privacy.mode is 'none'; nothing was clipped, noised or charged.")
    if privacy.noise_seed is not None:
        said.append("NOT PRIVATE: privacy.noise_seed is set; seeded noise can be subtracted.")
    joins_products = find_rule(ref.config.aggregation.rule).joins_products
    if ref.config.adapter.train == "both" and privacy.mode == "dp" and not joins_products:
        said.append("adapter.train 'both' averages A and B apart: inexact, and noise multiplies noise.")
    return tuple(said)
