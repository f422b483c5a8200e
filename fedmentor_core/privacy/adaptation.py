"""Noise adaptation: after each gate, a rule proposes each domain's next noise, and bounds that hold for any rule apply.

The paper's idea (the server lowers a domain's noise when its utility drops), made valid:

- a decision is a function of public numbers and released values only: the metric is of a public gate set, or noised
  and charged to a validation budget. So the filter theorem (``filter.py``) covers whatever is decided here;
- the noise is never below the site's floor, nor below the least at which all remaining rounds fit the run's share;
- it never rises, except as far as a charged retry forces it by having used budget that the remaining rounds need.

Every decision is recorded with all that it looked at, also when nothing changed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedmentor_core.config import AdaptationConfig, StudyConfig
from fedmentor_core.privacy.rules import find_rule
from fedmentor_core.privacy.rules.base import NoiseRule, RunShare, Standing
from fedmentor_core.records import DomainPlan, EvaluationMetrics, NoiseChange, NoiseDecision

Limit = Literal["rule", "floor", "budget"]

_BOUNDS: dict[Limit, str] = {"floor": "the site's floor", "budget": "what the remaining rounds can carry"}
_SAME = 1e-6  # relative: a smaller change of noise is none
_NOT_WORTH_IT = 5e-4  # relative: a smaller reduction does not answer low utility


@dataclass(frozen=True, slots=True)
class Settled:
    """A domain's next noise multiplier, and why.

    Attributes:
        noise_multiplier: within the bounds.
        reason: the rule's, and the bound's where one cut it.
        limited_by: what set the number.
        answers_utility: True when the change reacts to low utility.
    """

    noise_multiplier: float
    reason: str
    limited_by: Limit
    answers_utility: bool


def settle(settings: AdaptationConfig, rule: NoiseRule, share: RunShare, standing: Standing) -> Settled:
    """Ask the rule, and keep what it says within the bounds.

    Args:
        settings: the study's ``adaptation`` section.
        rule: proposes.
        share: what the run may spend.
        standing: where the domain stands; ``least_noise`` of it carries all remaining rounds.
    """
    current = standing.noise_multiplier
    lowest = max(standing.least_noise, share.floor)
    highest = max(current, lowest)
    proposal = rule.propose(settings, share, standing)
    noise, why = proposal.noise_multiplier, proposal.reason
    limited_by: Limit = "rule"
    if not noise < highest:  # put so that what is not a number changes nothing either
        noise = highest
    elif noise < share.floor or not share.fits(standing.spent_rdp, noise, standing.rounds_left):
        noise, limited_by = lowest, "floor" if share.floor >= standing.least_noise else "budget"
        why += f", limited by {_BOUNDS[limited_by]}"
    if noise > current:
        return Settled(noise, "a charged retry used budget that the remaining rounds need", "budget", False)
    if current - noise < current * (_NOT_WORTH_IT if proposal.answers_utility else _SAME):
        return Settled(current, why, limited_by, False)
    return Settled(noise, why, limited_by, proposal.answers_utility)


def decide(
    config: StudyConfig,
    plan: DomainPlan,
    *,
    noise_multiplier: float,
    spent_rdp: float,
    rounds_left: int,
    utility: float,
    threshold: float,
    rounds_below: int,
) -> tuple[NoiseDecision, int] | None:
    """One domain's decision after a gate.

    Args:
        config: the study.
        plan: the domain's plan.
        noise_multiplier: of the round just done.
        spent_rdp: what the domain's account has spent, at its order.
        rounds_left: rounds still to come.
        utility: the watched metric, public or noised.
        threshold: below which it is too low.
        rounds_below: gates in a row below it, this one included.

    Returns:
        The decision, and the rounds below the threshold from which the next gate counts on (0 after a change that
        answered low utility). None for a domain that trains without privacy or whose plan was refused.
    """
    share = RunShare.of(plan)
    if share is None:
        return None
    settings, rule = config.adaptation, find_rule(config.adaptation.rule)
    least = None
    if rounds_left > 0:
        least = share.affordable(spent_rdp, noise_multiplier, rounds_left, config.privacy.max_noise_multiplier)
    if rounds_left == 0:
        settled = Settled(noise_multiplier, "no round is left", "rule", False)
    elif least is None:
        why = "what is left carries none of the remaining rounds: the site's filter will let the domain rest"
        settled = Settled(noise_multiplier, why, "budget", False)
    else:
        standing = Standing(
            noise_multiplier=noise_multiplier,
            planned=plan.noise_schedule,
            rounds_left=rounds_left,
            spent_rdp=spent_rdp,
            least_noise=least,
            utility=utility,
            threshold=threshold,
            rounds_below=rounds_below,
        )
        settled = settle(settings, rule, share, standing)
    decision = NoiseDecision(
        domain=plan.domain,
        rule=rule.name,
        noise_before=noise_multiplier,
        noise_after=settled.noise_multiplier,
        reason=settled.reason,
        metric=settings.metric if rule.watches_utility else None,
        value=utility if rule.watches_utility else None,
        value_noised=rule.watches_utility and config.evaluation.gate_data == "private",
        threshold=threshold if rule.watches_utility else None,
        rounds_below=rounds_below if rule.watches_utility else 0,
        spent_rdp=spent_rdp,
        run_rdp_budget=share.rdp_limit,
        least_noise=least,
        remaining_steps=rounds_left * plan.steps_per_round,
    )
    return decision, 0 if settled.answers_utility else rounds_below


def change_of(decision: NoiseDecision) -> NoiseChange | None:
    """The decision as a change of noise; None when it was kept."""
    if decision.noise_after == decision.noise_before:
        return None
    return NoiseChange.model_validate(
        {
            "domain": decision.domain,
            "from": decision.noise_before,
            "to": decision.noise_after,
            "reason": decision.reason,
        }
    )


def count_below(previous: int, value: float, threshold: float) -> int:
    """Consecutive rounds below the threshold, this one included."""
    return previous + 1 if value < threshold else 0


def threshold_for(
    settings: AdaptationConfig, domain: str, comparisons: Mapping[str, EvaluationMetrics | None]
) -> float:
    """Below which ``domain``'s utility is too low: absolute, or times the baseline's or the reference run's value."""
    if settings.relative_to == "none":
        return settings.threshold
    other = comparisons.get(settings.relative_to)
    if other is None or domain not in other.by_domain:
        return settings.threshold
    return settings.threshold * float(getattr(other.by_domain[domain], settings.metric))
