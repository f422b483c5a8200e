"""Noise adaptation: after each gate, perhaps less noise for a domain whose utility lags.

The paper's rule (server lowers noise when utility drops below a threshold), made valid: the new noise multiplier is
a function of released values only (a public gate set, or noised private metrics), it is proposed from a reserve
planned at the start, and the domain's filter must still admit all remaining steps at it. The filter decides; this
module only proposes.
"""

from dataclasses import dataclass

from fedmentor_core.config import AdaptationConfig
from fedmentor_core.errors import BudgetError
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.records import NoiseChange


@dataclass(frozen=True)
class DomainState:
    """What the rule may look at for one domain (all released or public)."""

    domain: str
    noise_multiplier: float
    floor: float
    metric_value: float
    threshold: float
    rounds_below: int
    spent_rdp: float
    sample_rate: float
    remaining_steps: int


def count_below(previous: int, value: float, threshold: float) -> int:
    """Consecutive rounds below the threshold, this one included."""
    return previous + 1 if value < threshold else 0


def propose(config: AdaptationConfig, account: PrivacyAccount, state: DomainState) -> NoiseChange | None:
    """The rule's decision for one domain; None leaves the noise as it is.

    The new multiplier is ``max(gamma * sigma, site floor, least noise at which all remaining steps fit)``, and it is
    only ever lower than before.
    """
    if config.rule == "fixed" or state.remaining_steps <= 0 or state.rounds_below < config.patience_rounds:
        return None
    try:
        affordable = account.least_noise(state.spent_rdp, state.sample_rate, state.remaining_steps)
    except BudgetError:
        return None
    wanted = config.gamma * state.noise_multiplier
    new = max(wanted, state.floor, affordable)
    if new >= state.noise_multiplier * (1 - 1e-6):
        return None
    limit = "gamma" if new == wanted else "the site's floor" if new == state.floor else "the remaining budget"
    return NoiseChange.model_validate(
        {
            "domain": state.domain,
            "from": state.noise_multiplier,
            "to": new,
            "reason": f"{config.metric} {state.metric_value:.4f} below {state.threshold:.4f} for "
            f"{state.rounds_below} round(s); new noise set by {limit}",
        }
    )
