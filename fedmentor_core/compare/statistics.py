"""Means over seeds, their intervals, and paired differences between arms.

Seeds are few, so intervals are Student's t, and differences are taken seed by seed: what a seed does to both arms (the
initial adapter, the order of the data) cancels. The t-test asks whether the mean difference is zero, one metric at a
time; p-values are not corrected for how many are looked at.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmentor_core.compare.records import Estimate

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Paired:
    """A mean of paired differences; interval and p-value where there are enough seeds to say."""

    mean: float
    ci95: tuple[float, float] | None
    p_value: float | None
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval over seeds: mean +- t(0.975, n - 1) * s / sqrt(n); no interval for one value.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("expected at least one value")
    mean = math.fsum(values) / len(values)
    return Estimate(mean=mean, ci95=_interval(values, mean), n=len(values))


def paired(arm: Mapping[int, float], against: Mapping[int, float]) -> Paired | None:
    """One arm minus another over the seeds that both have; None where they share none.

    The p-value is that of the two-sided paired t-test. Without spread there is no test, and a gap that is the same by
    chance in every seed proves nothing: no p-value and no interval, as with one seed. Arms that never differ have the
    interval 0 to 0.

    Args:
        arm: value by seed.
        against: value by seed.
    """
    seeds = sorted({*arm} & {*against})
    if not seeds:
        return None
    gaps = [arm[seed] - against[seed] for seed in seeds]
    found = estimate(gaps)
    p_value = None
    if len(gaps) > 1 and min(gaps) != max(gaps):
        from scipy.stats import ttest_rel

        p_value = float(ttest_rel([arm[seed] for seed in seeds], [against[seed] for seed in seeds]).pvalue)
    same_by_chance = p_value is None and found.mean != 0
    return Paired(found.mean, None if same_by_chance else found.ci95, p_value, found.n)


def _interval(values: Sequence[float], mean: float) -> tuple[float, float] | None:
    n = len(values)
    if n < 2:
        return None
    if min(values) == max(values):
        return mean, mean
    from scipy.stats import t

    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * spread / math.sqrt(n)
    return mean - half, mean + half
