r"""The one-run lower bound on epsilon (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846).

Of m canaries each is in the training set independently with probability 1/2. From what was released an attacker
guesses "in" for some, "out" for others and abstains on the rest: r guesses, v of them right. If the training was
(epsilon, delta)-DP then, with p = e^epsilon / (1 + e^epsilon) and beta = Pr[Bin(r, p) >= v],

    Pr[at least v right] <= beta + 2 m delta max_{1 <= i <= v} ( Pr[Bin(r, p) >= v - i] - beta ) / i

so every epsilon whose right side is at most 1 - confidence is refuted, and the bound is the largest of them.

The bound is a bug detector and no measurement: all r guesses right refutes no more than logit(0.05^(1/r)), so to
refute epsilon = 4 takes 165 perfect guesses, epsilon = 8 about 8,900.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
GUESS_SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)
"""Shares of the canaries that are guessed on; fixed in advance, each tried at a fifth of the significance."""

_HIGHEST_EPSILON = 100.0


@dataclass(frozen=True, slots=True)
class BoundPoint:
    """The bound at one number of guesses.

    Attributes:
        n_guesses: r; half of them "in" (the highest scores), half "out" (the lowest).
        n_correct: v.
        epsilon: lower bound at ``confidence``.
        confidence: of this point alone, after the correction for trying several.
    """

    n_guesses: int
    n_correct: int
    epsilon: float
    confidence: float


def p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """How likely at least ``v`` of ``r`` guesses are right, at most, if training is (epsilon, delta)-DP.

    Args:
        m: canaries, each included independently with probability 1/2.
        r: guesses, 0 <= r <= m.
        v: correct guesses, 0 <= v <= r.
        epsilon: hypothesis, >= 0.
        delta: hypothesis, 0 <= delta < 1.

    Guarantees:
        Never above 1; does not fall with epsilon or delta; does not rise with v.

    Raises:
        ValueError: arguments out of range.
    """
    from scipy.stats import binom

    if not 0 <= v <= r <= m:
        raise ValueError(f"Expected 0 <= v={v} <= r={r} <= m={m}.")
    if not epsilon >= 0:
        raise ValueError(f"Expected epsilon={epsilon} >= 0.")
    if not 0 <= delta < 1:
        raise ValueError(f"Expected 0 <= delta={delta} < 1.")
    p = 1.0 / (1.0 + math.exp(-epsilon))
    beta = float(binom.sf(v - 1, r, p))
    if delta == 0 or v == 0:
        return min(1.0, beta)
    i = np.arange(1, v + 1)
    gains = np.cumsum(binom.pmf(v - i, r, p)) / i  # (Pr[Bin >= v - i] - beta) / i
    return min(1.0, beta + 2 * m * delta * float(gains.max()))


def epsilon_lower_bound(m: int, r: int, v: int, delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon that ``v`` right of ``r`` guesses refute; 0 when none.

    Valid for guesses fixed before the scores were seen; for several tries see ``best_bound``.

    Raises:
        ValueError: arguments out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"Expected 0 < confidence={confidence} < 1.")
    significance = 1.0 - confidence
    if p_value(m, r, v, 0.0, delta) > significance:
        return 0.0
    low, high = 0.0, 1.0
    while p_value(m, r, v, high, delta) <= significance:
        low, high = high, 2 * high
        if high > _HIGHEST_EPSILON:
            return low
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(m, r, v, middle, delta) <= significance else (low, middle)
    return low


def count_correct(scores: Sequence[float] | Floats, included: Sequence[bool] | Bools, n_guesses: int) -> int:
    """Right guesses when the highest half of ``n_guesses`` scores is guessed "in" and the lowest half "out".

    A tie is broken by position, which tells nothing about inclusion. An odd number gives "in" one more.
    """
    known = np.asarray(included, dtype=bool)
    order = np.argsort(-_finite(scores), kind="stable")
    n_in, n_out = (n_guesses + 1) // 2, n_guesses // 2
    right_in = int(known[order[:n_in]].sum())
    right_out = int((~known[order[len(order) - n_out :]]).sum()) if n_out else 0
    return right_in + right_out


def best_bound(
    scores: Sequence[float] | Floats,
    included: Sequence[bool] | Bools,
    delta: float,
    confidence: float = 0.95,
    shares: Sequence[float] = GUESS_SHARES,
) -> tuple[BoundPoint, list[BoundPoint]]:
    """The best bound over numbers of guesses fixed in advance, corrected by Bonferroni.

    Looking at the scores first and guessing where they are best would be cheating. So the numbers of guesses are
    ``shares`` of the canaries, and each is tried at ``(1 - confidence) / len(shares)``: all of the returned bounds
    hold together with ``confidence``, hence so does the largest.

    Args:
        scores: one per canary; higher means "in".
        included: the truth.
        delta: of the claim.
        confidence: of all bounds together.
        shares: guesses as shares of the canaries.

    Returns:
        The largest bound, and the bound at each share.
    """
    m = len(scores)
    if m == 0 or len(included) != m:
        raise ValueError(f"Expected as many scores as canaries and at least one; got {m} and {len(included)}.")
    each = 1.0 - (1.0 - confidence) / len(shares)
    points = []
    for share in shares:
        r = min(m, max(1, round(share * m)))
        v = count_correct(scores, included, r)
        points.append(BoundPoint(r, v, epsilon_lower_bound(m, r, v, delta, each), each))
    return max(points, key=lambda point: point.epsilon), points


def highest_reachable(m: int, delta: float, confidence: float = 0.95, shares: Sequence[float] = GUESS_SHARES) -> float:
    """What ``best_bound`` would say if every guess were right: a leak above this cannot be seen with m canaries."""
    each = 1.0 - (1.0 - confidence) / len(shares)
    guesses = {min(m, max(1, round(share * m))) for share in shares}
    return max(epsilon_lower_bound(m, r, r, delta, each) for r in guesses)


def _finite(scores: Sequence[float] | Floats) -> Floats:
    """Scores with NaN (a model that broke) below everything."""
    values = np.asarray(scores, dtype=np.float64)
    return np.where(np.isnan(values), -np.inf, values)
