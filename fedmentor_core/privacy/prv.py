r"""Epsilon by privacy loss random variables (Gopi et al. 2021, arXiv 2106.02848), for a schedule fixed in advance.

The privacy loss of one Poisson-sampled Gaussian step is a random variable; that of many steps is their sum. Its density
is put on a grid, the sum is a convolution, and epsilon is read off the result. The grid is fine enough and wide enough
that what is returned is an **upper bound** at ``delta``, at most 0.02 above the best one; it is a diagnostic and admits
nothing (``filter.py`` says why).

The operations and their order are those of ``opacus.accountants.PRVAccountant`` (Apache-2.0, after Microsoft's
prv_accountant), so the result is the same to the last bit (``tests/reference/test_sampled_gaussian.py``). It is written
out here because importing Opacus imports torch, which no plan needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fedmentor_core.privacy.sampled_gaussian import sampled_gaussian_rdp
from fedmentor_core.records import PrivacySpend

_EPSILON_ERROR = 0.01
_SQRT_2 = np.sqrt(2)


def prv_epsilon(history: Sequence[PrivacySpend], delta: float, orders: Sequence[float]) -> float:
    """Upper bound on epsilon at ``delta`` of all steps of a history together.

    Args:
        history: at least one step; every sample rate above 0.
        delta: above 0.
        orders: orders at which RDP says how wide the grid must be.

    Raises:
        RuntimeError, ValueError: delta is so small, or the loss so large, that floats cannot hold the answer.
    """
    delta_error = delta / 1000
    n_steps = sum(spend.steps for spend in history)
    half = _half_width(history, delta_error, orders)
    mesh = _EPSILON_ERROR / np.sqrt(n_steps * np.log(12 / delta_error) / 2)
    grid = _Grid.aligned(-half, half, mesh)
    losses = [_composed(_on_grid(_Loss.of(spend, grid), grid), spend.steps) for spend in history]
    return _sum_of(losses).epsilon(delta - delta_error) + _EPSILON_ERROR


def _half_width(history: Sequence[PrivacySpend], delta_error: float, orders: Sequence[float]) -> float:
    """Beyond this the loss has no mass that counts, by RDP (remark 5.6 of the paper)."""
    widest = _epsilon_by_rdp(history, delta_error / 4, orders)
    n_steps = sum(spend.steps for spend in history)
    for spend in history:
        alone = spend.model_copy(update={"steps": 1})
        widest = max(widest, _epsilon_by_rdp([alone], delta_error / (8 * n_steps), orders))
    return max(widest, _EPSILON_ERROR) + 3


def _epsilon_by_rdp(history: Sequence[PrivacySpend], delta: float, orders: Sequence[float]) -> float:
    array = np.array(orders)
    fixed, ratio = (np.log(delta) + np.log(array)) / (array - 1), np.log((array - 1) / array)
    best = np.inf
    for index in reversed(range(len(orders))):  # small orders take long, and nearly none of them can be the best
        if ratio[index] - fixed[index] > best:
            continue  # RDP is not negative, so it can only add
        rdp = sum(
            sampled_gaussian_rdp(spend.noise_multiplier, spend.sample_rate, orders[index]) * spend.steps
            for spend in history
        )
        best = min(best, rdp - fixed[index] + ratio[index])
    return float(best)


@dataclass(frozen=True)
class _Grid:
    """``size`` points from ``low`` to ``high``; ``shift`` says how far it was moved since it was made."""

    low: Any
    high: Any
    size: int
    shift: Any = 0.0

    @classmethod
    def aligned(cls, low: Any, high: Any, mesh: Any) -> "_Grid":
        low, high = np.floor(low / mesh) * mesh, np.ceil(high / mesh) * mesh
        size = int(np.round((high - low) / mesh)) + 1
        return cls(low, high, size) if size % 2 == 0 else cls(low, high + mesh, size + 1)

    def moved(self, by: Any) -> "_Grid":
        return _Grid(self.low + by, self.high + by, self.size, self.shift + by)

    @property
    def mesh(self) -> Any:
        return (self.high - self.low) / (self.size - 1)

    @property
    def points(self) -> Any:
        return np.linspace(self.low, self.high, self.size)


@dataclass(frozen=True)
class _Loss:
    """The privacy loss of one step, cut to a grid's range; propositions B1 and B4 of the paper."""

    sigma: float
    q: float
    low: Any
    high: Any
    below: Any
    """Mass below the range."""
    mass: Any
    """Mass inside."""

    @classmethod
    def of(cls, spend: PrivacySpend, grid: _Grid) -> "_Loss":
        whole = cls(spend.noise_multiplier, spend.sample_rate, grid.low, grid.high, 0.0, 1.0)
        below = whole._whole_cdf(grid.low)
        return cls(whole.sigma, whole.q, grid.low, grid.high, below, whole._whole_cdf(grid.high) - below)

    def _whole_cdf(self, t: Any) -> Any:
        from scipy.special import erfc

        q, sigma, least = self.q, self.sigma, np.log(1 - self.q)
        z = np.log(np.where(t > least, (np.exp(t) + q - 1) / q, 1))
        return np.where(
            t > least,
            -q * erfc((2 * z * sigma**2 - 1) / (2 * _SQRT_2 * sigma)) / 2
            - (1 - q) * erfc((2 * z * sigma**2 + 1) / (2 * _SQRT_2 * sigma)) / 2
            + 1.0,
            0.0,
        )

    def cdf(self, t: Any) -> Any:
        """Mass up to ``t``."""
        inside = np.where(t < self.high, (self._whole_cdf(t) - self.below) / self.mass, 1.0)
        return np.where(t < self.low, 0.0, inside)

    def mean(self) -> Any:
        """By parts, from the integral of ``cdf`` over intervals that grow with the distance from zero."""
        from scipy.integrate import quad

        lower, upper = int(np.log10(np.abs(self.low))), int(np.log10(self.high))
        ends = np.concatenate(
            [
                [self.low],
                -np.logspace(start=lower, stop=-5, num=10),
                [0],
                np.logspace(start=-5, stop=upper, num=10),
                [self.high],
            ]
        )
        mean = 0.0
        for left, right in pairwise(ends):
            mean += right * self.cdf(right) - left * self.cdf(left) - quad(self.cdf, left, right, limit=500)[0]
        return mean


@dataclass(frozen=True)
class _Discrete:
    """Mass at each point of a grid."""

    pmf: Any
    grid: _Grid

    def epsilon(self, delta: float) -> float:
        """Where the tail of the loss is worth ``delta``."""
        if np.finfo(np.longdouble).eps * self.grid.size > delta:
            raise ValueError(f"Expected a larger delta than {delta:g}: rounding errors would dominate.")
        points = self.grid.points
        above = np.flip(np.flip(self.pmf).cumsum())
        weighed = np.flip(np.flip(self.pmf * np.exp(-points)).cumsum())
        index = np.searchsorted(np.exp(points) * weighed - above, -delta, side="left")
        if index <= 0:
            raise RuntimeError("No epsilon on the grid has this delta.")
        return float(np.log((above[index] - delta) / weighed[index]))


def _on_grid(loss: _Loss, grid: _Grid) -> _Discrete:
    """Each point gets the mass around it; the grid moves so that the mean stays what it is."""
    points = grid.points
    pmf = loss.cdf(points + grid.mesh / 2) - loss.cdf(points - grid.mesh / 2)
    moved = loss.mean() - np.dot(points, pmf)
    if np.abs(moved) >= grid.mesh / 2:
        raise RuntimeError("The mean on the grid is not that of the loss.")
    return _Discrete(pmf, grid.moved(moved))


def _composed(one: _Discrete, steps: int) -> _Discrete:
    """The sum of so many equal losses."""
    from scipy.fft import irfft, rfft

    pmf = irfft(rfft(one.pmf) ** steps)
    turned = steps - 1 + (len(pmf) // 2 if steps % 2 == 0 else 0)
    return _Discrete(np.roll(pmf, turned), one.grid.moved(one.grid.shift * (steps - 1)))


def _sum_of(losses: Sequence[_Discrete]) -> _Discrete:
    """Neighbours first, then the sums of neighbours."""
    left = list(losses)
    while len(left) > 1:
        from scipy.signal import convolve

        joined = [left.pop()] if len(left) % 2 == 1 else []
        for one, other in zip(left[:-1:2], left[1::2], strict=True):
            pmf = convolve(one.pmf, other.pmf, mode="same")
            joined.append(_Discrete(pmf, one.grid.moved(other.grid.shift)))
        left = joined
    return left[0]
