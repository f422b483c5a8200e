"""How well scores tell members from non-members: AUC, true-positive rate at a low false-positive rate, exposure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedmentor_core.audit.bound import Bools, Floats, _finite

N_BOOTSTRAP = 1000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Exposure:
    """Canary exposure (Carlini et al. 2019, arXiv 1802.08232) with the left-out canaries as reference set.

    A trained-on canary's exposure is log2(R) - log2(rank) among itself and the R - 1 canaries that were left out: 0
    to log2(R) bits. A canary that left no trace has an expected exposure of about 1.44 bits.
    """

    mean: float
    highest: float
    limit: float


def auc(scores: Sequence[float] | Floats, included: Sequence[bool] | Bools) -> float:
    """Chance that a random member scores above a random non-member; a tie counts half. 0.5 where one kind lacks."""
    from scipy.stats import rankdata

    known = np.asarray(included, dtype=bool)
    n_in, n_out = int(known.sum()), int((~known).sum())
    if not n_in or not n_out:
        return 0.5
    ranks = rankdata(_finite(scores))
    return float((ranks[known].sum() - n_in * (n_in + 1) / 2) / (n_in * n_out))


def tpr_at_fpr(scores: Sequence[float] | Floats, included: Sequence[bool] | Bools, fpr: float) -> float:
    """Share of members above the lowest threshold that at most ``fpr`` of the non-members pass."""
    values, known = _finite(scores), np.asarray(included, dtype=bool)
    members, others = values[known], np.sort(values[~known])[::-1]
    if not len(members) or not len(others):
        return 0.0
    threshold = others[int(np.floor(fpr * len(others)))] if fpr < 1 else -np.inf
    return float((members > threshold).mean())


def roc(scores: Sequence[float] | Floats, included: Sequence[bool] | Bools) -> list[tuple[float, float]]:
    """(false-positive rate, true-positive rate) at every threshold, from (0, 0) to (1, 1)."""
    values, known = _finite(scores), np.asarray(included, dtype=bool)
    n_in, n_out = max(1, int(known.sum())), max(1, int((~known).sum()))
    points = [(0.0, 0.0)]
    for threshold in np.unique(values)[::-1]:
        passed = values >= threshold
        points.append((float((passed & ~known).sum() / n_out), float((passed & known).sum() / n_in)))
    return [*points, (1.0, 1.0)] if points[-1] != (1.0, 1.0) else points


def auc_estimate(scores: Sequence[float] | Floats, included: Sequence[bool] | Bools) -> Estimate:
    """AUC with a bootstrap interval over members and non-members apart."""
    values, known = _finite(scores), np.asarray(included, dtype=bool)
    low, high = _bootstrap(values[known], values[~known], auc)
    return Estimate(auc(values, known), low, high)


def tpr_estimate(scores: Sequence[float] | Floats, included: Sequence[bool] | Bools, fpr: float) -> Estimate:
    """TPR at ``fpr`` with an interval: bootstrap, joined with Clopper-Pearson's at the threshold found.

    The bootstrap carries the threshold's own uncertainty; the exact interval is right where no or every member
    passes and the bootstrap would show no width at all.
    """
    values, known = _finite(scores), np.asarray(included, dtype=bool)
    value = tpr_at_fpr(values, known, fpr)
    low, high = _bootstrap(values[known], values[~known], lambda s, k: tpr_at_fpr(s, k, fpr))
    n = int(known.sum())
    exact_low, exact_high = clopper_pearson(round(value * n), n)
    return Estimate(value, min(low, exact_low), max(high, exact_high))


def clopper_pearson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a binomial share; (0, 1) without trials."""
    from scipy.stats import beta

    if n == 0:
        return 0.0, 1.0
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, n - hits + 1))
    high = 1.0 if hits == n else float(beta.ppf(1 - tail, hits + 1, n - hits))
    return low, high


def exposure(scores: Sequence[float] | Floats, included: Sequence[bool] | Bools) -> Exposure:
    """Exposure of the canaries that were trained on; a tie is ranked last."""
    values, known = _finite(scores), np.asarray(included, dtype=bool)
    members, others = values[known], values[~known]
    limit = float(np.log2(len(others) + 1))
    if not len(members):
        return Exposure(0.0, 0.0, limit)
    ranks = 1 + (others[None, :] >= members[:, None]).sum(axis=1)
    bits = limit - np.log2(ranks)
    return Exposure(float(bits.mean()), float(bits.max()), limit)


def _bootstrap(members: Floats, others: Floats, statistic: Callable[[Floats, Bools], float]) -> tuple[float, float]:
    if not len(members) or not len(others):
        return 0.0, 1.0
    random = np.random.default_rng(0)  # the interval of a report must be the same when it is computed again
    known = np.repeat([True, False], [len(members), len(others)])
    found = [
        statistic(np.concatenate([random.choice(members, len(members)), random.choice(others, len(others))]), known)
        for _ in range(N_BOOTSTRAP)
    ]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
