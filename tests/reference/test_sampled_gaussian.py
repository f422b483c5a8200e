"""Our RDP series and PRV bound against those of Opacus that they are written after: equal to the last bit."""

import math
import warnings

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis.rdp import compute_rdp

from fedmentor_core.privacy.accountant import ORDERS, epsilon_prv, epsilon_rdp
from fedmentor_core.privacy.sampled_gaussian import sampled_gaussian_rdp
from fedmentor_core.records import PrivacySpend

RATES = st.floats(1e-6, 1.0)
NOISES = st.floats(0.2, 3e3) | st.sampled_from([1e-170, 1e-3])


def told(compute) -> object:
    """A number, or the kind of failure."""
    try:
        return float(compute())
    except (ArithmeticError, ValueError) as error:
        return type(error)


@settings(max_examples=150, deadline=None)
@given(noise=NOISES, rate=RATES, order=st.sampled_from(ORDERS))
@example(noise=0.7, rate=0.02, order=1.1)  # 1,250 terms
@example(noise=0.7, rate=1.0, order=2.5)
@example(noise=5.0, rate=0.3, order=63.0)
def test_rdp_is_that_of_opacus_to_the_bit(noise: float, rate: float, order: float) -> None:
    assume(rate == 1 or rate < 0.9 or order.is_integer())  # there the accountant bounds it, the series being endless
    theirs = told(lambda: compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=order))
    assert told(lambda: sampled_gaussian_rdp(noise, rate, order)) == theirs


@pytest.mark.parametrize(
    ("history", "delta"),
    [
        ([(0.9, 0.02, 16)], 1e-5),
        ([(0.5894, 0.05, 1)], 1e-6),
        ([(1.1, 0.013, 7), (1.0, 0.013, 8)], 1e-5),  # an odd and an even number of steps
        ([(1.3, 0.2, 2), (1.2, 0.2, 2), (1.1, 0.2, 2)], 3e-6),  # three sums are joined in two goes
        ([(4.0, 1.0, 5)], 1e-5),  # every unit takes part
    ],
)
def test_prv_is_that_of_opacus_to_the_bit(history: list[tuple[float, float, int]], delta: float) -> None:
    spends = [PrivacySpend(noise_multiplier=noise, sample_rate=rate, steps=steps) for noise, rate, steps in history]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PRVAccountant()
        theirs.history = list(history)
        assert epsilon_prv(spends, delta) == float(theirs.get_epsilon(delta=delta))


@pytest.mark.parametrize("steps", [1, 40, 4_000])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_orders_that_cannot_be_best_are_rightly_left_out(steps: int, delta: float) -> None:
    spend = PrivacySpend(noise_multiplier=0.8, sample_rate=0.03, steps=steps)
    by_order = [
        steps * sampled_gaussian_rdp(0.8, 0.03, order) + cost
        for order, cost in ((order, conversion(order, delta)) for order in ORDERS)
    ]
    assert epsilon_rdp([spend], delta) == pytest.approx(max(0.0, min(by_order)), rel=1e-12)


def conversion(order: float, delta: float) -> float:
    """What the conversion of Balle et al. 2020 adds, written out once more."""
    return math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
