"""The server's part of a round: what to ask of each client, what to accept, what the gate's verdict changes.

Everything here is a function of released updates, public numbers and gate-set metrics; nothing touches training data.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedmentor_core.adapters.lora import State
from fedmentor_core.aggregation.base import WeightedUpdate, check_update, normalised
from fedmentor_core.aggregation.fedavg import fedavg
from fedmentor_core.errors import FedMentorError, UpdateRejectedError
from fedmentor_core.evaluation.evaluate import combine, evaluate_domain
from fedmentor_core.privacy.adaptation import change_of, count_below, decide, threshold_for
from fedmentor_core.privacy.output import noise_norm
from fedmentor_core.privacy.validation_plan import SetName
from fedmentor_core.private_gate import evaluate_privately
from fedmentor_core.records import (
    ArtifactRef,
    ClientAssignment,
    ClientSummary,
    ClientUpdate,
    DomainEvaluation,
    DomainPlan,
    EvaluationMetrics,
    GateSummary,
    GateVerdict,
    NoiseDecision,
    RoundManifest,
    RoundSummary,
)
from fedmentor_core.workspace import Workspace

Comparisons = Mapping[str, EvaluationMetrics | None]


@dataclass(frozen=True)
class RoundState:
    """Where a study stands before a round."""

    round_index: int
    adapter: ArtifactRef
    noise: Mapping[str, float | None]
    rounds_below: Mapping[str, int]

    @classmethod
    def first(cls, workspace: Workspace) -> "RoundState":
        """Before round 0: the planned noise."""
        return cls(
            round_index=0,
            adapter=workspace.initial_adapter.trained,
            noise={plan.domain: plan.noise_multiplier for plan in workspace.plan.domains},
            rounds_below={plan.domain: 0 for plan in workspace.plan.domains},
        )

    @classmethod
    def after(cls, manifest: RoundManifest) -> "RoundState":
        """After a committed round."""
        return cls(
            round_index=manifest.round_index + 1,
            adapter=manifest.adapter,
            noise=manifest.next_noise,
            rounds_below=manifest.rounds_below,
        )


def assignments_for(workspace: Workspace, state: RoundState) -> list[ClientAssignment]:
    """What the server asks of each client in this round."""
    return [
        ClientAssignment(
            run_id=workspace.ref.run_id,
            round_index=state.round_index,
            domain=plan.domain,
            global_adapter=state.adapter,
            noise_multiplier=state.noise[plan.domain],
            sample_rate=plan.sample_rate,
            steps=plan.steps_per_round,
            clip_norm=plan.clip_norm,
        )
        for plan in workspace.plan.domains
    ]


def aggregate(
    workspace: Workspace, base: ArtifactRef, updates: Sequence[ClientUpdate]
) -> tuple[ArtifactRef, list[ClientUpdate]]:
    """Check each update, join those that pass, store the new global adapter.

    Each update is read twice, once to check it and once to add it, so that the weights are known before the first is
    added and no more than one is in memory.

    Returns:
        The new adapter (the old one when every client rested) and the updates with rejected ones marked.

    Raises:
        FedMentorError: some clients trained, yet fewer usable updates than ``aggregation.min_clients``.
    """
    config = workspace.config.aggregation
    global_state = workspace.get_adapter(base)
    judged = [_check(workspace, update, base, global_state) for update in updates]
    usable = [update for update in judged if update.status == "trained"]
    if all(update.status == "rested" for update in judged):
        return base, judged
    if len(usable) < config.min_clients:
        problems = "; ".join(f"{update.domain}: {update.reason or update.status}" for update in judged)
        raise FedMentorError(
            f"round {judged[0].round_index}: {len(usable)} usable updates, aggregation.min_clients is "
            f"{config.min_clients} ({problems}). Finished updates are kept; run again to retry the others."
        )
    weights = dict(normalised({u.domain: float(u.n_units) if config.weights == "units" else 1.0 for u in usable}))

    def stream() -> Iterator[WeightedUpdate]:
        for update in usable:
            assert update.update is not None
            yield WeightedUpdate(update.domain, weights[update.domain], workspace.get_adapter(update.update))

    return workspace.put_adapter(fedavg(global_state, stream())), judged


def _check(workspace: Workspace, update: ClientUpdate, base: ArtifactRef, global_state: State) -> ClientUpdate:
    if update.status != "trained":
        return update
    try:
        if update.update is None or update.run_id != workspace.ref.run_id:
            raise UpdateRejectedError(f"update of {update.domain!r} rejected: it belongs to another study.")
        if update.base_adapter_sha256 != base.sha256:
            raise UpdateRejectedError(f"update of {update.domain!r} rejected: it starts from another round's adapter.")
        check_update(
            update.domain,
            workspace.get_adapter(update.update),
            global_state,
            workspace.config.aggregation.max_update_norm + _expected_noise_norm(workspace, update, global_state),
        )
    except FedMentorError as error:
        return update.model_copy(update={"status": "rejected", "reason": str(error)})
    return update


def _expected_noise_norm(workspace: Workspace, update: ClientUpdate, global_state: State) -> float:
    """At client level the honest noise alone may exceed ``max_update_norm``."""
    if workspace.config.privacy.level == "unit" or update.noise_multiplier is None:
        return 0.0
    n_parameters = sum(tensor.numel() for tensor in global_state.values())
    return 1.1 * noise_norm(update.noise_multiplier, update.clip_norm, n_parameters)


def evaluate(
    workspace: Workspace,
    adapter: ArtifactRef,
    domain: str,
    split: str,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> DomainEvaluation:
    """Evaluate an adapter on one domain's gate or test set. The result is stored and reused by content.

    Metrics of a private set are noised and charged; see ``private_gate.py`` for what that may raise.
    """
    key = workspace.key(f"evaluations/{adapter.sha256[:24]}/{split}-{domain}.json")
    name: SetName = "gate" if split == "gate" else "test"
    if workspace.config.evaluation.gate_data == "private":
        return evaluate_privately(workspace, adapter, domain, name, key, on_batch)
    if workspace.store.exists(key):
        return DomainEvaluation.model_validate(workspace.store.get_json(key))
    data = workspace.evaluation_set(domain, name)
    scorers = workspace.scorers
    with workspace.evaluation_lock:
        result = evaluate_domain(
            workspace.evaluation_model_with(adapter),
            workspace.backbone.tokenizer,
            data,
            scorers,
            workspace.config.evaluation,
            device=workspace.backbone.device,
            keep_samples=split == "gate",
            on_batch=on_batch,
        )
    workspace.store.put_json(key, result)
    return result


def adapt(
    workspace: Workspace,
    state: RoundState,
    metrics: EvaluationMetrics,
    comparisons: Comparisons,
    updates: Sequence[ClientUpdate] = (),
) -> tuple[list[NoiseDecision], dict[str, float | None], dict[str, int]]:
    """After the gate: each domain's next noise multiplier, by the configured rule and within its bounds.

    Args:
        workspace: of the study.
        state: where the study stood before the round.
        metrics: of the gate set: public, or noised and charged.
        comparisons: what a relative threshold refers to.
        updates: of the round: what sites say is spent.

    Returns:
        A decision for every domain that trains under privacy and was evaluated, every domain's next noise multiplier,
        and its count of rounds below the threshold.
    """
    config = workspace.config
    decisions: list[NoiseDecision] = []
    noise, below = dict(state.noise), dict(state.rounds_below)
    for plan in workspace.plan.domains:
        if plan.domain not in metrics.by_domain:
            continue  # its site did not answer: nothing is known that could change its noise
        utility = float(getattr(metrics.by_domain[plan.domain], config.adaptation.metric))
        threshold = threshold_for(config.adaptation, plan.domain, comparisons)
        below[plan.domain] = count_below(below[plan.domain], utility, threshold)
        current = noise[plan.domain]
        if current is None:
            continue
        decided = decide(
            config,
            plan,
            noise_multiplier=current,
            spent_rdp=_spent_rdp(workspace, plan, state.round_index, updates),
            rounds_left=config.rounds - state.round_index - 1,
            utility=utility,
            threshold=threshold,
            rounds_below=below[plan.domain],
        )
        if decided is not None:
            decision, below[plan.domain] = decided
            noise[plan.domain] = decision.noise_after
            decisions.append(decision)
    return decisions, noise, below


def _spent_rdp(workspace: Workspace, plan: DomainPlan, round_index: int, updates: Sequence[ClientUpdate]) -> float:
    """What a domain's account has spent: its ledger says it here, and what its site told where that is elsewhere."""
    if workspace.config.domain(plan.domain).site is None:
        return plan.spent_rdp_before + workspace.ledger(plan.domain).spent_rdp_by(workspace.ref.run_id)
    from fedmentor_core.site.spending import most_spent_rdp

    return most_spent_rdp(workspace, plan, client_history(workspace, plan.domain, round_index, updates))


def client_history(
    workspace: Workspace, domain: str, round_index: int, updates: Sequence[ClientUpdate] = ()
) -> list[ClientUpdate | ClientSummary]:
    """A domain's record of every committed round before ``round_index``, and of ``updates``."""
    manifests = (find_manifest(workspace, earlier) for earlier in range(round_index))
    found: list[ClientUpdate | ClientSummary] = []
    for manifest in manifests:
        found.extend(() if manifest is None else manifest.summary.clients)
    return [client for client in (*found, *updates) if client.domain == domain]


def commit_round(
    workspace: Workspace,
    state: RoundState,
    adapter: ArtifactRef,
    updates: Sequence[ClientUpdate],
    evaluations: Sequence[DomainEvaluation],
    verdict: GateVerdict,
    comparisons: Comparisons,
    seconds: float,
) -> RoundManifest:
    """Decide the next noise and write the round's manifest, create-if-absent: the commit point."""
    metrics = combine(evaluations)
    decisions, noise, below = adapt(workspace, state, metrics, comparisons, updates)
    manifest = RoundManifest(
        run_id=workspace.ref.run_id,
        round_index=state.round_index,
        config_sha256=workspace.ref.config_sha256,
        adapter=adapter,
        summary=RoundSummary(
            round_index=state.round_index,
            clients=tuple(
                ClientSummary.model_validate(u.model_dump(include=set(ClientSummary.model_fields))) for u in updates
            ),
            metrics=metrics,
            gate=GateSummary(passed=verdict.passed, reasons=verdict.reasons, results=verdict.results),
            noise_changes=tuple(change for change in map(change_of, decisions) if change is not None),
            noise_decisions=tuple(decisions),
            bytes_total=sum(update.bytes_up + update.bytes_down for update in updates),
            seconds=seconds,
        ),
        samples=tuple(sample for evaluation in evaluations for sample in evaluation.samples),
        next_noise=noise,
        rounds_below=below,
    )
    workspace.store.put_json(manifest_key(workspace, state.round_index), manifest)
    return manifest


def find_manifest(workspace: Workspace, round_index: int) -> RoundManifest | None:
    """A committed round, or None: resume means finding the first that is missing."""
    key = manifest_key(workspace, round_index)
    if not workspace.store.exists(key):
        return None
    return RoundManifest.model_validate(workspace.store.get_json(key))


def manifest_key(workspace: Workspace, round_index: int) -> str:
    """Store key of a round's manifest."""
    return workspace.key(f"rounds/{round_index:04d}/manifest.json")


def now() -> float:
    """A clock for durations, in seconds."""
    return time.perf_counter()
