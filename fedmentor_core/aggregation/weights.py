r"""What a client counts for: the same for all, by public count, or by count and public noise.

*Noise-aware.* One coordinate of client d's update carries noise of variance proportional to

    v_d = T_d (sigma_d C_d / (q_d N_d))^2          (unit level: T_d steps, each divided by the expected batch q_d N_d)
    v_d = (2 sigma_d C_d)^2                        (client level: one release)

where the learning rate is the same for all and cancels below. With p_d the shares by count, the weights

    w_d  proportional to  p_d / (1 + lambda v_d / v_min)

minimise  sum_d [ (w_d - p_d)^2 + lambda (v_d / v_min) w_d^2 ] / p_d  under  sum_d w_d = 1: closeness to the mean over
units, plus noise, each relative to p_d. (Setting the derivative to zero gives w_d (1 + lambda v_d / v_min) = c p_d.)
v_min is the least positive v_d of the round, so lambda has no unit. lambda = 0 is weighing by count; equal noises are
weighing by count; a client with infinite noise counts for nothing; large lambda is p_d / v_d, inverse variance.

Adam divides by its own running scale, so v_d is the noise before that: a model of the noise, not a measurement. Only
public numbers go in (noise multiplier, clip norm, sample rate, steps, count, as the plan names them), so this is
post-processing and costs nothing. Clients whose noise differs are the reason to have it (WinFLoRA, arXiv 2602.01126,
estimates the noise that is here known).
"""

import math
from collections.abc import Sequence

from fedmentor_core.config import AggregationConfig
from fedmentor_core.privacy.mechanism import PrivacyLevel
from fedmentor_core.privacy.output import SENSITIVITY_PER_CLIP
from fedmentor_core.records import ClientUpdate


def raw_weights(settings: AggregationConfig, level: PrivacyLevel, updates: Sequence[ClientUpdate]) -> dict[str, float]:
    """Weights that need not sum to one.

    Args:
        settings: the aggregation section.
        level: what the noise multipliers refer to.
        updates: the round's usable updates; only their public numbers are looked at.
    """
    if settings.weights == "uniform":
        return {update.domain: 1.0 for update in updates}
    if settings.weights == "units":
        return {update.domain: float(update.n_units) for update in updates}
    variances = {update.domain: noise_variance(update, level) for update in updates}
    least = min((variance for variance in variances.values() if variance > 0), default=1.0)
    return {
        update.domain: update.n_units / (1.0 + settings.noise_penalty * variances[update.domain] / least)
        for update in updates
    }


def noise_variance(update: ClientUpdate, level: PrivacyLevel) -> float:
    """v_d of the module: noise of one coordinate of an update, in units of the squared learning rate."""
    noise = update.noise_multiplier
    if noise is None:
        return 0.0
    if level == "client":
        return (SENSITIVITY_PER_CLIP * noise * update.clip_norm) ** 2
    if math.isinf(noise):
        return math.inf
    return float(update.steps * (noise * update.clip_norm / (update.sample_rate * update.n_units)) ** 2)
