"""The server's part of a round: what to ask of each client, what to accept, what the gate's verdict changes.

Everything here is a function of released updates, public numbers and gate-set metrics; nothing touches training data.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from fedmentor_core.adapters.base_delta import is_delta
from fedmentor_core.adapters.lora import State, trained_part
from fedmentor_core.aggregation import find_rule
from fedmentor_core.aggregation.arriving import Source, arriving
from fedmentor_core.aggregation.base import JoinRule, StreamedRule, Updates, check_update, normalised
from fedmentor_core.aggregation.server import server_step
from fedmentor_core.aggregation.spool import spooled
from fedmentor_core.aggregation.weights import raw_weights
from fedmentor_core.errors import FedMentorError, UpdateRejectedError
from fedmentor_core.evaluation import safety as safety_scoring
from fedmentor_core.evaluation.evaluate import combine, evaluate_domain
from fedmentor_core.evaluation.safety_prompts import read_prompt_sets
from fedmentor_core.evaluation.turn import turn
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
    SafetyEvaluation,
)
from fedmentor_core.wire.update import Base
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


def assignments_ahead(
    workspace: Workspace, state: RoundState, adapter: ArtifactRef, updates: Sequence[ClientUpdate]
) -> list[ClientAssignment]:
    """What the next round will ask of each client, where this round's evaluation has no say in it; else nothing.

    It has none where the rule watches no utility and the gate set is public, so that measuring charges no account. The
    next round can then train while this one is evaluated. Its updates are charged, stored and found again as ever, so
    a death in between costs nothing.

    Args:
        workspace: of the study.
        state: where the study stood before the round.
        adapter: that the round made.
        updates: of the round.
    """
    config = workspace.config
    upcoming = state.round_index + 1
    trained = any(update.status == "trained" for update in updates)
    if upcoming >= config.rounds or not trained or config.evaluation.gate_data == "private":
        return []
    noise = dict(state.noise)
    if any(one is not None for one in noise.values()):
        if config.adaptation.watches_utility:
            return []
        for plan in workspace.plan.domains:
            decided = _decide(workspace, plan, state, updates, utility=0.0, threshold=0.0, rounds_below=0)
            noise[plan.domain] = decided[0].noise_after if decided is not None else noise[plan.domain]
    return assignments_for(workspace, RoundState(upcoming, adapter, noise, state.rounds_below))


def aggregate(
    workspace: Workspace, base: ArtifactRef, updates: Sequence[ClientUpdate]
) -> tuple[ArtifactRef, list[ClientUpdate]]:
    """Check each update, join those that pass by the configured rule, take the server's step, store what comes of it.

    Where the rule allows it, updates are joined while they are read and checked, each once and none in memory whole.
    Where one does not pass, or the rule must see several at once, each is read to check it and again to join it.

    Returns:
        The new adapter (the old one when every client rested) and the updates with rejected ones marked.

    Raises:
        FedMentorError: some clients trained, yet fewer usable updates than ``aggregation.min_clients`` or the rule
            needs.
    """
    config = workspace.config.aggregation
    rule = find_rule(config.rule)
    global_state = workspace.get_adapter(base)
    round_index = updates[0].round_index
    starts = {
        domain: Base(base.sha256, trained_part(global_state, workspace.config.adapter_of(domain), round_index))
        for domain in {update.domain for update in updates}
    }
    before = trained_part(global_state, workspace.config.adapter, round_index)
    added = {name: tensor for name, tensor in global_state.items() if is_delta(name)}
    joined = _join_in_one_reading(workspace, rule, {**before, **added}, starts, updates)
    judged = list(updates)
    if joined is None:
        judged = [_check(workspace, update, starts[update.domain]) for update in updates]
    usable = [update for update in judged if update.status == "trained"]
    if all(update.status == "rested" for update in judged):
        return base, judged
    least = rule.least_clients(config)
    if len(usable) < max(config.min_clients, least):
        problems = "; ".join(f"{update.domain}: {update.reason or update.status}" for update in judged)
        asked = f"aggregation.rule {rule.name!r} needs {least}" if least > config.min_clients else ""
        raise FedMentorError(
            f"round {round_index}: {len(usable)} usable updates, "
            f"{asked or f'aggregation.min_clients is {config.min_clients}'} ({problems}). Finished updates are kept; "
            "run again to retry the others."
        )
    if joined is None:
        joined = _join_judged(workspace, rule, {**before, **added}, starts, usable)
    memory: State | None = None
    if config.server != "none":
        joined, memory = server_step(config, before, joined, workspace.server_memory(base))
    held = {name for name in global_state if name not in before and not is_delta(name)}
    kept = {name: global_state[name] for name in held}
    return workspace.put_adapter({**kept, **joined}, held=held, server_memory=memory, after=base.sha256), judged


def _join_in_one_reading(
    workspace: Workspace,
    rule: JoinRule,
    before: State,
    starts: Mapping[str, Base],
    updates: Sequence[ClientUpdate],
) -> State | None:
    """The joined adapter, where the rule can join while it checks and every update passes; else None.

    It is what judging each update first and joining then would give, to the bit, at half the bytes.
    """
    config = workspace.config
    trained = [update for update in updates if update.status == "trained"]
    least = max(config.aggregation.min_clients, rule.least_clients(config.aggregation))
    if not isinstance(rule, StreamedRule) or not trained or len(trained) < least:
        return None
    weights = dict(normalised(raw_weights(config.aggregation, config.privacy.level, trained)))
    try:
        sources = {
            update.domain: Source(
                weight=weights[update.domain],
                expected=starts[update.domain].state,
                max_update_norm=_largest_norm(workspace, update, starts[update.domain].state),
                pieces=partial(workspace.stream_update, _ref_of(workspace, update, starts[update.domain])),
                decode=workspace.update_decoder(starts[update.domain]),
            )
            for update in trained
        }
        return rule.join_arriving(before, arriving(sources))
    except FedMentorError:
        return None  # which update it was, and why, is for the judgement of each by itself


def _join_judged(
    workspace: Workspace, rule: JoinRule, before: State, starts: Mapping[str, Base], usable: Sequence[ClientUpdate]
) -> State:
    """Join updates that each passed."""
    config = workspace.config
    weights = dict(normalised(raw_weights(config.aggregation, config.privacy.level, usable)))
    refs = {update.domain: update.update for update in usable if update.update is not None}
    fetch = {domain: partial(workspace.update_to_file, ref, starts[domain]) for domain, ref in refs.items()}
    with spooled(fetch) as read_some:
        reader = Updates(weights, lambda domain: workspace.get_update(refs[domain], starts[domain]), read_some)
        return rule.join(config.aggregation, config.adapter.scale, before, reader)


def _check(workspace: Workspace, update: ClientUpdate, start: Base) -> ClientUpdate:
    if update.status != "trained":
        return update
    try:
        state = workspace.get_update(_ref_of(workspace, update, start), start)
        check_update(update.domain, state, start.state, _largest_norm(workspace, update, start.state))
    except FedMentorError as error:
        return update.model_copy(update={"status": "rejected", "reason": str(error)})
    return update


def _ref_of(workspace: Workspace, update: ClientUpdate, start: Base) -> ArtifactRef:
    """Where an update is, if it belongs to this round.

    Raises:
        UpdateRejectedError: it belongs to another study or round.
    """
    if update.update is None or update.run_id != workspace.ref.run_id:
        raise UpdateRejectedError(f"update of {update.domain!r} rejected: it belongs to another study.")
    if update.base_adapter_sha256 != start.sha256:
        raise UpdateRejectedError(f"update of {update.domain!r} rejected: it starts from another round's adapter.")
    return update.update


def _largest_norm(workspace: Workspace, update: ClientUpdate, expected: State) -> float:
    return workspace.config.aggregation.max_update_norm + _expected_noise_norm(workspace, update, expected)


def _expected_noise_norm(workspace: Workspace, update: ClientUpdate, expected: State) -> float:
    """At client level the honest noise alone may exceed ``max_update_norm``."""
    if workspace.config.privacy.level == "unit" or update.noise_multiplier is None:
        return 0.0
    n_parameters = sum(tensor.numel() for tensor in expected.values())
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
    with turn(workspace.evaluation_lock) as on_written:
        result = evaluate_domain(
            workspace.evaluation_model_with(adapter),
            workspace.backbone.tokenizer,
            data,
            scorers,
            workspace.config.evaluation,
            device=workspace.backbone.device,
            keep_samples=split == "gate",
            on_batch=on_batch,
            on_written=on_written,
        )
    workspace.store.put_json(key, result)
    return result


def evaluate_safety(workspace: Workspace, adapter: ArtifactRef) -> SafetyEvaluation | None:
    """An adapter's answers to the safety prompts, scored; stored and reused by content. None: none are configured.

    Raises:
        ConfigError, DataError: the prompts cannot be read or do not fit.
    """
    config = workspace.config.evaluation.safety_prompts
    if config is None:
        return None
    key = workspace.key(f"evaluations/{adapter.sha256[:24]}/safety.json")
    if workspace.store.exists(key):
        return SafetyEvaluation.model_validate(workspace.store.get_json(key))
    sets = read_prompt_sets(config, workspace.config.data.root)
    scorers = workspace.scorers
    with turn(workspace.evaluation_lock) as on_written:
        result = safety_scoring.evaluate_safety(
            workspace.evaluation_model_with(adapter),
            workspace.backbone.tokenizer,
            sets,
            scorers,
            config,
            device=workspace.backbone.device,
            max_length=workspace.config.backbone.max_length,
            batch_size=workspace.config.evaluation.batch_size,
            on_written=on_written,
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
        decided = _decide(
            workspace, plan, state, updates, utility=utility, threshold=threshold, rounds_below=below[plan.domain]
        )
        if decided is not None:
            decision, below[plan.domain] = decided
            noise[plan.domain] = decision.noise_after
            decisions.append(decision)
    return decisions, noise, below


def _decide(
    workspace: Workspace,
    plan: DomainPlan,
    state: RoundState,
    updates: Sequence[ClientUpdate],
    *,
    utility: float,
    threshold: float,
    rounds_below: int,
) -> tuple[NoiseDecision, int] | None:
    """See ``adaptation.decide``; None for a domain without noise."""
    current = state.noise[plan.domain]
    if current is None:
        return None
    return decide(
        workspace.config,
        plan,
        noise_multiplier=current,
        spent_rdp=_spent_rdp(workspace, plan, state.round_index, updates),
        rounds_left=workspace.config.rounds - state.round_index - 1,
        utility=utility,
        threshold=threshold,
        rounds_below=rounds_below,
    )


def _spent_rdp(workspace: Workspace, plan: DomainPlan, round_index: int, updates: Sequence[ClientUpdate]) -> float:
    """What a domain's account has spent: its ledger says it here, and what its site told where that is elsewhere."""
    if workspace.config.domain(plan.domain).site is None:
        # Where the next round trains ahead it may be charged already, and is not of this round; else all charges count.
        through = None if workspace.config.adaptation.watches_utility else round_index
        spent = workspace.ledger(plan.domain).spent_rdp_by(workspace.ref.run_id, through_round=through)
        return plan.spent_rdp_before + spent
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
    safety: SafetyEvaluation | None = None,
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
            safety=safety,
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
