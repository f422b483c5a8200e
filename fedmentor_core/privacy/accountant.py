r"""Rényi-DP accounting of the Poisson-sampled Gaussian, and calibration of the noise multiplier.

One DP-SGD step on Poisson-sampled units is a sampled Gaussian mechanism with (noise_multiplier sigma,
sample_rate q); neighbouring datasets differ in one privacy unit, added or removed. Its RDP at order alpha is
Opacus' ``compute_rdp`` (Mironov et al. 2019, arXiv 1908.10530); steps add up; the conversion to epsilon is
Balle et al. 2020 (arXiv 1905.09982):

    epsilon = rho - (log(delta) + log(alpha)) / (alpha - 1) + log((alpha - 1) / alpha)

Everything an adaptive schedule is admitted by uses **one order fixed in advance** (see ``filter.py``). PRV is
exact only for a schedule fixed in advance, so it is shown and never decides.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from fedmentor_core.errors import BudgetError
from fedmentor_core.privacy.opacus_accountants import prv_accountant, rdp_analysis
from fedmentor_core.records import PrivacySpend

ORDERS: tuple[float, ...] = (*(1 + x / 10.0 for x in range(1, 100)), *map(float, range(12, 64)))
MAX_NOISE_MULTIPLIER = 1e4
_LARGE_RATE = 0.9


@lru_cache(maxsize=65_536)
def rdp_per_step(noise_multiplier: float, sample_rate: float, order: float) -> float:
    """RDP of one sampled-Gaussian step at ``order``; infinite without noise, 0 when nothing is sampled."""
    if not 0 <= sample_rate <= 1:
        raise ValueError(f"Expected 0 <= sample_rate={sample_rate} <= 1.")
    if not noise_multiplier >= 0:
        raise ValueError(f"Expected noise_multiplier={noise_multiplier} >= 0.")
    if not order > 1:
        raise ValueError(f"Expected order={order} > 1.")
    if sample_rate == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    if _LARGE_RATE < sample_rate < 1 and not order.is_integer():
        return _bound_between_orders(noise_multiplier, sample_rate, order)
    compute_rdp = rdp_analysis().compute_rdp
    try:
        value = float(compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=order))
    except ArithmeticError:  # so little noise that its square is 0
        return math.inf
    return max(0.0, value)  # rounding may leave -1e-16 where there is almost no cost; a charge is never negative


def _bound_between_orders(noise_multiplier: float, sample_rate: float, order: float) -> float:
    """An upper bound at a fractional order: (order - 1) * RDP is convex in the order, and sampling never costs.

    The exact series needs 30 / -log(sample_rate) terms, without end as nearly every unit is sampled.
    """
    below, above = math.floor(order), math.ceil(order)
    left = (below - 1) * rdp_per_step(noise_multiplier, sample_rate, float(below)) if below > 1 else 0.0
    right = (above - 1) * rdp_per_step(noise_multiplier, sample_rate, float(above))
    chord = ((above - order) * left + (order - below) * right) / (order - 1)
    return min(chord, rdp_per_step(noise_multiplier, 1.0, order))


def rdp_of(history: Iterable[PrivacySpend], order: float) -> float:
    """RDP of a whole history at ``order``: the sum over its steps."""
    return math.fsum(spend.steps * rdp_per_step(spend.noise_multiplier, spend.sample_rate, order) for spend in history)


def conversion_cost(order: float, delta: float) -> float:
    """What turning (order, rho)-RDP into (epsilon, delta)-DP adds: epsilon = rho + this."""
    return -(math.log(delta) + math.log(order)) / (order - 1) + math.log((order - 1) / order)


def epsilon_at_order(rdp: float, order: float, delta: float) -> float:
    """Epsilon of an (order, rdp)-RDP interaction at ``delta``; 0 when nothing was spent."""
    if rdp <= 0:
        return 0.0
    return max(0.0, rdp + conversion_cost(order, delta))


def epsilon_rdp(history: Sequence[PrivacySpend], delta: float) -> float:
    """Best epsilon over all orders, for a schedule **fixed in advance**."""
    if not any(spend.steps for spend in history):
        return 0.0
    return _best(lambda order: rdp_of(history, order), delta)[0]


def _best(rdp_at: Callable[[float], float], delta: float) -> tuple[float, float]:
    """The least epsilon over all orders, and the order; of several the smallest one.

    Small orders have long series and a conversion that alone costs more than the best epsilon: RDP is not negative, so
    they are not computed.
    """
    epsilon, best = math.inf, ORDERS[-1]
    for order in reversed(ORDERS):
        if conversion_cost(order, delta) <= epsilon:
            found = epsilon_at_order(rdp_at(order), order, delta)
            if found <= epsilon:
                epsilon, best = found, order
    return epsilon, best


def epsilon_prv(history: Sequence[PrivacySpend], delta: float) -> float:
    """PRV upper bound (Gopi et al. 2021) for a schedule **fixed in advance**; a diagnostic, never a filter."""
    spends = [spend for spend in history if spend.steps]
    if not spends:
        return 0.0
    accountant = prv_accountant()()
    accountant.history = [(spend.noise_multiplier, spend.sample_rate, spend.steps) for spend in spends]
    return float(accountant.get_epsilon(delta=delta))


def rdp_cap(epsilon: float, delta: float, order: float) -> float:
    """The RDP budget B at ``order`` that converts to ``epsilon``; may be negative (the order is no use)."""
    return epsilon - conversion_cost(order, delta)


def choose_order(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """The order at which ``steps`` equal steps within (epsilon, delta) need the least noise.

    Depends on public numbers only, so it can be fixed before the first step, as the filter theorem demands. Any order
    is valid; the noise that decides which is best is calibrated over every fifth one, which is five times as fast.
    """
    noise_multiplier = _calibrate(epsilon, delta, sample_rate, steps)
    return _best(lambda order: steps * rdp_per_step(noise_multiplier, sample_rate, order), delta)[1]


def calibrate_at_order(rdp_budget: float, order: float, sample_rate: float, steps: int) -> float:
    """Smallest noise multiplier (to 1e-4 above) at which ``steps`` steps spend at most ``rdp_budget`` at ``order``.

    Raises:
        BudgetError: no noise multiplier up to 1e4 is enough.
    """
    return _bisect(lambda sigma: steps * rdp_per_step(sigma, sample_rate, order) <= rdp_budget)


def _calibrate(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    orders = [order for order in reversed(ORDERS[::5]) if conversion_cost(order, delta) <= epsilon]

    def fits(sigma: float) -> bool:
        return any(
            epsilon_at_order(steps * rdp_per_step(sigma, sample_rate, order), order, delta) <= epsilon
            for order in orders
        )

    return _bisect(fits, tolerance=1e-3)


def _bisect(fits: Callable[[float], bool], tolerance: float = 1e-4) -> float:
    high = 1.0
    while not fits(high):
        high *= 2
        if high > MAX_NOISE_MULTIPLIER:
            raise BudgetError(
                f"privacy budget too small: no noise multiplier up to {MAX_NOISE_MULTIPLIER:g} fits the planned "
                "steps. Raise epsilon, or lower rounds, steps_per_round or batch_size."
            )
    low = 0.0
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    rounded = round(math.ceil(high / tolerance) * tolerance, 10)  # a readable number, never below the exact one
    return rounded if fits(rounded) else high
