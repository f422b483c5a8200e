"""Each domain's noise in the next round: after the gate's metrics, or before them where they have no say."""

from collections.abc import Mapping, Sequence

from fedmentor_core.privacy.adaptation import count_below, decide, threshold_for
from fedmentor_core.records import (
    ArtifactRef,
    ClientAssignment,
    ClientUpdate,
    DomainPlan,
    EvaluationMetrics,
    NoiseDecision,
)
from fedmentor_core.rounds.state import RoundState, assignments_for, client_history
from fedmentor_core.workspace import Workspace

Comparisons = Mapping[str, EvaluationMetrics | None]


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
