r"""Noised release of mean scores of a private set: one Gaussian mechanism over one vector per privacy unit.

Each unit gives ``k`` scores, clipped to [0, 1], and a table of shares (non-negative, at most 1 in all: how its rows
fall into classes). Released is the sum over the units plus noise N(0, sigma^2 Delta^2) on every coordinate; means,
rates and F1 scores are computed from that vector alone, so they are post-processing and cost nothing more.

**Sensitivity.** Let one unit be replaced by another. Each score moves by at most 1, together k in squared L2. For two
share tables h, h' >= 0 with sums at most 1, |h - h'|^2 = |h|^2 + |h'|^2 - 2<h, h'> <= 2. So

    Delta = sqrt(k + 2)

which also covers a unit added or removed while the published number of units stays as it is: then the sum moves by at
most sqrt(k + 1). How many rows a unit has does not matter, because it contributes the mean of its rows.

**Noise.** Scores are rounded down to a grid of 2^-20 and summed as integers, and the noise is a discrete Gaussian on
that grid (``discrete_gaussian.py``), rounded up in scale. Its RDP at order alpha is at most alpha / (2 sigma^2): what
the accountant charges for one step at sample rate 1.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedmentor_core.privacy import discrete_gaussian

GRID = 2**20


@dataclass(frozen=True, slots=True)
class UnitScores:
    """What one privacy unit contributes. Un-noised: it never leaves the evaluation.

    Attributes:
        scores: (k,) clipped to [0, 1] on release; what is no number counts as 0.
        shares: (cells,) non-negative, at most 1 in all.
    """

    scores: tuple[float, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ReleasedMeans:
    """Means over units that may be published.

    Attributes:
        scores: (k,) noised means, clipped to [0, 1]. Clipping never moves a mean away from the true one; at the very
            edge of the range it shifts its expectation inwards, by at most 0.4 times ``std``.
        shares: (cells,) the nearest table of shares (non-negative, 1 in all) to the noised one.
        std: standard deviation of the noise in each mean, before clipping.
    """

    scores: tuple[float, ...]
    shares: tuple[float, ...]
    std: float


def sensitivity(n_scores: int) -> float:
    """L2 distance by which replacing one unit can move the summed vector."""
    return math.sqrt(n_scores + 2)


def std_of_mean(noise_multiplier: float, n_scores: int, n_units: int) -> float:
    """Standard deviation of the noise in each released mean."""
    return noise_multiplier * sensitivity(n_scores) / n_units


def release_means(units: Sequence[UnitScores], noise_multiplier: float, dice: random.Random) -> ReleasedMeans:
    """Sum, add noise, divide by the public number of units.

    Guarantee: one step of the Gaussian mechanism with ``noise_multiplier`` at sample rate 1, under replacement of one
    unit. The caller charges it first.

    Args:
        units: at least one; all with equally many scores and cells.
        noise_multiplier: sigma, in units of ``sensitivity``.
        dice: ``discrete_gaussian.secret_dice()``, or a seeded generator in tests.

    Raises:
        ValueError: no unit, vectors of different lengths, shares that are no shares, or no noise.
    """
    if not 0 < noise_multiplier < math.inf:
        raise ValueError(f"Expected 0 < noise_multiplier={noise_multiplier} < inf.")
    totals = grid_sum(units)
    n_scores = len(units[0].scores)
    scale = math.ceil(noise_multiplier * sensitivity(n_scores) * GRID)
    noised = [(total + discrete_gaussian.sample(scale, dice)) / (GRID * len(units)) for total in totals]
    return ReleasedMeans(
        scores=tuple(min(1.0, max(0.0, value)) for value in noised[:n_scores]),
        shares=nearest_shares(noised[n_scores:]),
        std=std_of_mean(noise_multiplier, n_scores, len(units)),
    )


def grid_sum(units: Sequence[UnitScores]) -> list[int]:
    """The un-noised sum in steps of 1 / ``GRID``: what ``sensitivity`` (times ``GRID``) speaks of.

    Raises:
        ValueError: as for ``release_means``.
    """
    vectors = [_on_grid(unit) for unit in units]
    if len({len(unit.scores) for unit in units}) != 1 or len({len(vector) for vector in vectors}) != 1:
        raise ValueError("Expected at least one unit, all with vectors of one length.")
    return [sum(column) for column in zip(*vectors, strict=True)]


def _on_grid(unit: UnitScores) -> list[int]:
    shares = [int(share * GRID) for share in unit.shares]
    if any(share < 0 for share in unit.shares) or sum(shares) > GRID:
        raise ValueError("Expected shares that are non-negative and at most 1 in all.")
    return [*(int(min(1.0, max(0.0, score)) * GRID) for score in unit.scores), *shares]  # max(0, NaN) is 0


def nearest_shares(values: Iterable[float]) -> tuple[float, ...]:
    """The Euclidean projection onto the tables of shares (non-negative, 1 in all).

    The true table is one, so this never moves away from it, and it needs no threshold below which a cell is noise.
    """
    given = list(values)
    excess, total = 0.0, 0.0
    for count, value in enumerate(sorted(given, reverse=True), start=1):
        total += value
        if value > (total - 1.0) / count:
            excess = (total - 1.0) / count
    return tuple(max(0.0, value - excess) for value in given)
