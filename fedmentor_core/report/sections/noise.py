"""What the adaptation rule decided after each round, what it looked at, and what lowering the noise would cost."""

from dataclasses import dataclass

from fedmentor_core.records import NoiseDecision, StudySummary
from fedmentor_core.report import words

_LIMITS = {
    "rule": "the rule's own step",
    "floor": "the site's least noise",
    "budget": "what the budget still carries",
}


@dataclass(frozen=True, slots=True)
class NoiseLine:
    """A decision about one domain's noise."""

    number: int
    domain: str
    rule: str
    before: str
    after: str
    looked_at: str
    noised: bool
    reason: str
    changed: bool


@dataclass(frozen=True, slots=True)
class LadderLine:
    """What lowering the noise after one more round would cost."""

    after_round: int
    noise: str
    at_end: str
    extra: str
    limit: str


def noise_lines(summary: StudySummary) -> list[NoiseLine]:
    """Every decision, kept noise too; of older records, which hold changes only, the changes."""
    offset = words.round_offset(summary)
    lines = []
    for one in summary.rounds:
        number = one.round_index + offset
        lines += [_decision(number, decision) for decision in one.noise_decisions]
        decided = {decision.domain for decision in one.noise_decisions}
        lines += [
            NoiseLine(
                number=number,
                domain=change.domain,
                rule="",
                before=words.significant(change.from_, 4),
                after=words.significant(change.to, 4),
                looked_at=words.NONE,
                noised=False,
                reason=change.reason,
                changed=True,
            )
            for change in one.noise_changes
            if change.domain not in decided
        ]
    return lines


def ladders(summary: StudySummary) -> list[tuple[str, list[LadderLine]]]:
    """For each domain that may have its noise lowered, the cost of doing so at every chance."""
    found = []
    for plan in summary.plan.domains:
        lines = [
            LadderLine(
                one.after_round + 1,
                words.significant(one.noise_multiplier, 4),
                words.significant(one.epsilon_at_end, 4),
                f"+{words.significant(one.epsilon_extra)}",
                _LIMITS[one.limited_by],
            )
            for one in plan.reductions
        ]
        if lines:
            found.append((plan.domain, lines))
    return found


def _decision(number: int, one: NoiseDecision) -> NoiseLine:
    return NoiseLine(
        number=number,
        domain=one.domain,
        rule=one.rule,
        before=words.significant(one.noise_before, 4),
        after=words.significant(one.noise_after, 4),
        looked_at=_looked_at(one),
        noised=one.value_noised,
        reason=one.reason,
        changed=one.noise_after != one.noise_before,
    )


def _looked_at(one: NoiseDecision) -> str:
    if one.metric is None or one.value is None:
        return "no metric"
    info = words.METRIC.get(one.metric)
    shown = f"{info.label if info else one.metric} {words.number(one.value, 4)}"
    if one.threshold is None:
        return shown
    sign = "<" if one.value < one.threshold else "≥"
    below = f", {words.count(one.rounds_below, 'round')} below" if one.rounds_below else ""
    return f"{shown} {sign} {words.number(one.threshold, 4)}{below}"
