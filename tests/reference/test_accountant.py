"""The accountant against published numbers, and against an independent implementation (dp_accounting)."""

import math
import time
import warnings

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis.rdp import compute_rdp
from scipy.integrate import quad

from fedmentor_core.errors import BudgetError
from fedmentor_core.privacy.accountant import (
    ORDERS,
    calibrate_at_order,
    choose_order,
    epsilon_at_order,
    epsilon_prv,
    epsilon_rdp,
    rdp_cap,
    rdp_of,
    rdp_per_step,
)
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.records import PrivacySpend

DELTA = 1e-5
ROUNDED = 5e-5 + 1e-9  # the goldens have four decimals

# (noise multiplier, sample rate, steps)...  ->  RDP, PRV and PLD epsilon at delta 1e-5; the last by dp_accounting
GOLDEN = [
    (((1.0, 0.01, 1000),), 2.1014, 1.8384, 1.8282),
    (((1.0, 0.02, 500),), 3.1443, 2.7836, 2.7735),
    (((1.2, 0.02, 200), (1.0, 0.02, 200), (0.8, 0.02, 100)), 3.8374, 3.2162, 3.2060),
    (((1.0, 0.01, 500), (1.5, 0.05, 200)), 2.9670, 2.6964, 2.6862),
    (((10.0, 1.0, 10),), 1.3085, 1.2095, 1.1994),
    (((4.0, 1.0, 1),), 1.0126, 0.9364, 0.9263),
]


def spends(history: tuple[tuple[float, float, int], ...]) -> list[PrivacySpend]:
    return [PrivacySpend(noise_multiplier=sigma, sample_rate=q, steps=steps) for sigma, q, steps in history]


def google(accountant: object, history: tuple[tuple[float, float, int], ...]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sigma, q, steps in history:
            event = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
            accountant.compose(event, steps)  # type: ignore[attr-defined]
        return float(accountant.get_epsilon(DELTA))  # type: ignore[attr-defined]


@pytest.mark.parametrize(("history", "by_rdp", "by_prv", "by_pld"), GOLDEN)
def test_golden_epsilons(history: tuple, by_rdp: float, by_prv: float, by_pld: float) -> None:
    found_rdp, found_prv = epsilon_rdp(spends(history), DELTA), epsilon_prv(spends(history), DELTA)
    assert found_rdp == pytest.approx(by_rdp, abs=ROUNDED)
    assert found_prv == pytest.approx(by_prv, abs=1e-3)
    assert by_pld <= found_prv <= found_rdp


GRID = [
    *(history for history, *_ in GOLDEN),
    ((0.8, 0.1, 40), (0.9, 0.1, 40)),
    ((1.004, 0.02256, 50), (0.9, 0.02256, 50)),
    ((3.0, 0.3, 20), (2.0, 0.3, 20), (1.5, 0.3, 5), (2.5, 0.1, 30)),
    ((0.6, 0.005, 300),),
    ((2.0, 0.5, 12), (1.9, 0.5, 12), (1.805, 0.5, 12)),
]


@pytest.mark.parametrize("history", GRID)
def test_epsilon_agrees_with_an_independent_rdp_and_is_never_below_pld(history: tuple) -> None:
    ours = epsilon_rdp(spends(history), DELTA)
    # At fractional orders dp_accounting gives an upper bound, so at large epsilons (small orders) it may lie above.
    theirs = google(rdp.RdpAccountant(list(ORDERS)), history)
    assert ours <= theirs + 1e-3
    assert ours >= theirs - (1e-3 if ours < 5 else 0.05)
    exact = google(pld.PLDAccountant(value_discretization_interval=1e-3), history)
    assert ours >= exact
    for order in (1.7, 4.0, 12.0, 40.0):  # the filter's promise holds at whichever order was fixed
        assert epsilon_at_order(rdp_of(spends(history), order), order, DELTA) >= exact


@pytest.mark.parametrize(("sigma", "rate"), [(0.6, 0.005), (0.8, 0.1), (1.004, 0.02256), (2.0, 0.5), (3.0, 0.3)])
def test_rdp_of_a_step_is_the_integral_at_fractional_orders_too(sigma: float, rate: float) -> None:
    def integrand(x: float, order: float) -> float:
        gaussian = -(x**2) / (2 * sigma**2) - 0.5 * math.log(2 * math.pi * sigma**2)
        ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * x - 1) / (2 * sigma**2))
        return math.exp(gaussian + order * ratio)

    for order in (1.5, 2.0, 2.7, 4.2, 6.8, 9.0):
        places = [0.0, 1.0, order / 2, order]
        value = quad(integrand, -40 * sigma, order + 40 * sigma, args=(order,), points=places, limit=500)[0]
        assert rdp_per_step(sigma, rate, order) == pytest.approx(math.log(value) / (order - 1), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("rate", [0.901, 0.95, 0.99])
@pytest.mark.parametrize("order", [1.3, 2.5, 8.8])
def test_rdp_of_a_step_that_samples_nearly_all_is_a_close_upper_bound(rate: float, order: float) -> None:
    exact = compute_rdp(q=rate, noise_multiplier=2.0, steps=1, orders=order)
    assert exact <= rdp_per_step(2.0, rate, order) <= exact * 1.25
    assert rdp_per_step(2.0, rate, order) <= rdp_per_step(2.0, 1.0, order)


def test_rate_just_below_one_takes_no_endless_series() -> None:
    started = time.perf_counter()
    assert rdp_per_step(2.0, 1 - 1e-12, 2.5) == pytest.approx(rdp_per_step(2.0, 1.0, 2.5))
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("order", [2.0, 5.0, 9.0, 30.0])
@pytest.mark.parametrize(("sigma", "rate"), [(0.5, 0.01), (1.0, 0.1), (4.0, 0.7), (1.5, 1.0)])
def test_rdp_of_a_step_agrees_with_dp_accounting_at_whole_orders(sigma: float, rate: float, order: float) -> None:
    accountant = rdp.RdpAccountant([order])
    google(accountant, ((sigma, rate, 1),))
    expected = epsilon_at_order(rdp_per_step(sigma, rate, order), order, DELTA)
    assert expected == pytest.approx(float(accountant.get_epsilon(DELTA)), rel=1e-6)


def test_golden_calibration() -> None:
    """Dreaddit: 2,837 units, batch 64, 100 steps, epsilon 2."""
    q = 64 / 2837
    account = PrivacyAccount.open(2.0, DELTA, q, 100)
    noise = account.least_noise(0.0, q, 100)
    assert 1.0035 <= noise <= 1.006
    assert account.rdp_order == pytest.approx(6.8, abs=0.3)
    assert epsilon_rdp(spends(((noise, q, 100),)), DELTA) <= 2.0
    assert epsilon_rdp(spends(((noise - 2e-3, q, 100),)), DELTA) > 2.0


@pytest.mark.parametrize(
    ("units", "epsilon", "sigma"),
    [(2837, 0.5, 2.053), (2837, 8.0, 0.590), (1972, 1.0, 1.671), (2624, 4.0, 0.782)],
)
def test_calibrated_noise_of_the_three_corpora(units: int, epsilon: float, sigma: float) -> None:
    account = PrivacyAccount.open(epsilon, DELTA, 64 / units, 100)
    assert account.least_noise(0.0, 64 / units, 100) == pytest.approx(sigma, abs=2e-3)


def test_golden_cost_of_lowering_the_noise() -> None:
    q = 0.02256
    assert epsilon_rdp(spends(((1.004, q, 50),)), DELTA) == pytest.approx(1.7171, abs=1e-3)
    assert epsilon_rdp(spends(((1.004, q, 50), (0.9, q, 50))), DELTA) == pytest.approx(2.4324, abs=1e-3)
    assert epsilon_rdp(spends(((1.004, q, 50), (0.8, q, 50))), DELTA) == pytest.approx(3.1835, abs=1e-3)


sigmas = st.floats(0.4, 8.0)
rates = st.floats(1e-3, 0.6)


@settings(max_examples=12, deadline=None)
@given(sigma=sigmas, rate=rates, steps=st.integers(0, 500), more=st.integers(0, 500))
def test_epsilon_never_falls_with_steps(sigma: float, rate: float, steps: int, more: int) -> None:
    few, many = (epsilon_rdp(spends(((sigma, rate, n),)), DELTA) for n in (steps, steps + more))
    assert 0 <= few <= many


@settings(max_examples=12, deadline=None)
@given(sigma=sigmas, factor=st.floats(1.001, 3.0), rate=rates, steps=st.integers(1, 500))
def test_epsilon_never_rises_with_noise(sigma: float, factor: float, rate: float, steps: int) -> None:
    less, more = (epsilon_rdp(spends(((s, rate, steps),)), DELTA) for s in (sigma, sigma * factor))
    assert more <= less * (1 + 1e-9)


@settings(max_examples=50, deadline=None)
@given(sigma=st.floats(0, 1e5), rate=st.one_of(st.floats(0, 1), st.just(1e-9)), order=st.sampled_from(ORDERS[-50::10]))
def test_a_step_never_costs_less_than_nothing(sigma: float, rate: float, order: float) -> None:
    if 0 < sigma < 0.1:
        sigma += 0.1  # Opacus' series takes seconds below
    assert rdp_per_step(sigma, rate, order) >= 0


def test_edges() -> None:
    assert epsilon_rdp([], DELTA) == epsilon_prv([], DELTA) == 0
    assert epsilon_rdp(spends(((1.0, 0.1, 0),)), DELTA) == epsilon_prv(spends(((1.0, 0.1, 0),)), DELTA) == 0
    assert rdp_per_step(0.0, 0.1, 4.0) == math.inf
    assert rdp_per_step(1e-200, 0.1, 4.0) == math.inf
    assert rdp_per_step(0.0, 0.0, 4.0) == rdp_per_step(2.0, 0.0, 4.0) == 0
    assert rdp_per_step(2.0, 1.0, 4.0) == pytest.approx(4.0 / (2 * 2.0**2))
    assert epsilon_rdp(spends(((0.0, 0.1, 1),)), DELTA) == math.inf
    assert epsilon_at_order(0.0, 4.0, DELTA) == 0


@pytest.mark.parametrize(
    ("sigma", "rate", "order"),
    [(-1.0, 0.1, 2.0), (1.0, -0.1, 2.0), (1.0, 1.1, 2.0), (1.0, 0.1, 1.0), (math.nan, 0.1, 2.0), (1.0, math.nan, 2.0)],
)
def test_impossible_parameters_are_refused(sigma: float, rate: float, order: float) -> None:
    with pytest.raises(ValueError, match="Expected"):
        rdp_per_step(sigma, rate, order)


@settings(max_examples=5, deadline=None)
@given(epsilon=st.floats(1.0, 12.0), rate=st.floats(0.02, 0.3), steps=st.integers(1, 100))
def test_calibrated_noise_fits_and_little_less_does_not(epsilon: float, rate: float, steps: int) -> None:
    order = choose_order(epsilon, DELTA, rate, steps)
    budget = rdp_cap(epsilon, DELTA, order)
    noise = calibrate_at_order(budget, order, rate, steps)
    assert steps * rdp_per_step(noise, rate, order) <= budget
    assert steps * rdp_per_step(noise - 3e-4, rate, order) > budget
    assert epsilon_at_order(budget, order, DELTA) == pytest.approx(epsilon)


def test_budget_that_carries_nothing_is_refused_with_advice() -> None:
    for budget in (0.0, -1.0):
        with pytest.raises(BudgetError, match="Raise epsilon, or lower rounds"):
            calibrate_at_order(budget, 4.0, 0.1, 10)


@pytest.mark.parametrize("steps", [1, 40, 4_000])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_orders_that_cannot_be_best_are_rightly_left_out(steps: int, delta: float) -> None:
    """Against every order, with the conversion of Balle et al. 2020 written out once more."""
    spend = PrivacySpend(noise_multiplier=0.8, sample_rate=0.03, steps=steps)
    by_order = [
        steps * rdp_per_step(0.8, 0.03, order)
        + math.log1p(-1 / order)
        - (math.log(delta) + math.log(order)) / (order - 1)
        for order in ORDERS
    ]
    assert epsilon_rdp([spend], delta) == pytest.approx(max(0.0, min(by_order)), rel=1e-12)
