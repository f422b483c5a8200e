"""The one-run bound against the reference's golden values, and the membership figures against slow definitions."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from fedmentor_core.audit.bound import (
    GUESS_SHARES,
    best_bound,
    count_correct,
    epsilon_lower_bound,
    highest_reachable,
    p_value,
)
from fedmentor_core.audit.membership import (
    auc,
    auc_estimate,
    clopper_pearson,
    exposure,
    roc,
    tpr_at_fpr,
    tpr_estimate,
)

GOLDEN = [
    (1000, 200, 120, 0.1591, 0.1579),
    (1000, 100, 80, 0.9584, 0.9553),
    (1000, 100, 95, 2.1724, 2.1652),
    (1000, 100, 100, 3.4930, 3.4654),
    (500, 50, 50, 2.7847, 2.7705),
    (200, 20, 20, 1.8227, 1.8165),
    (1000, 1000, 500, 0.0, 0.0),
]


@pytest.mark.parametrize(("m", "r", "v", "pure", "approximate"), GOLDEN)
def test_golden_values(m, r, v, pure, approximate):
    assert epsilon_lower_bound(m, r, v, 0.0) == pytest.approx(pure, abs=6e-5)
    assert epsilon_lower_bound(m, r, v, 1e-5) == pytest.approx(approximate, abs=6e-5)


@pytest.mark.parametrize("r", [1, 5, 24, 165])
def test_all_right_has_the_closed_form(r):
    share = 0.05 ** (1 / r)
    expected = max(0.0, math.log(share / (1 - share)))
    assert epsilon_lower_bound(1000, r, r, 0.0) == pytest.approx(expected, abs=1e-5)


def test_power_of_the_reference():
    assert epsilon_lower_bound(1000, 24, 24, 0.0) >= 2 > epsilon_lower_bound(1000, 23, 23, 0.0) - 1e-2
    assert epsilon_lower_bound(1000, 165, 165, 0.0) == pytest.approx(4, abs=0.01)


@pytest.mark.parametrize(("m", "r", "v", "delta"), [(50, 20, 15, 1e-3), (30, 30, 21, 1e-2), (10, 4, 4, 0.05)])
@pytest.mark.parametrize("epsilon", [0.0, 0.7, 2.5])
def test_p_value_is_the_formula_written_out(m, r, v, delta, epsilon):
    p = math.exp(epsilon) / (1 + math.exp(epsilon))
    beta = binom.sf(v - 1, r, p)
    worst = max((binom.sf(v - i - 1, r, p) - beta) / i for i in range(1, v + 1))
    assert p_value(m, r, v, epsilon, delta) == pytest.approx(min(1, beta + 2 * m * delta * worst), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 120),
    share=st.floats(0, 1),
    right=st.floats(0, 1),
    epsilon=st.floats(0, 6),
    delta=st.sampled_from([0.0, 1e-6, 1e-3]),
)
def test_monotone_in_everything(m, share, right, epsilon, delta):
    r = round(share * m)
    v = round(right * r)
    value = p_value(m, r, v, epsilon, delta)
    assert 0 <= value <= 1
    slack = 1e-9
    assert p_value(m, r, v, epsilon + 0.3, delta) >= value - slack
    assert p_value(m, r, v, epsilon, delta + 1e-3) >= value - slack
    if v < r:
        assert p_value(m, r, v + 1, epsilon, delta) <= value + slack
        assert epsilon_lower_bound(m, r, v + 1, delta) >= epsilon_lower_bound(m, r, v, delta) - 1e-6
    bound = epsilon_lower_bound(m, r, v, delta)
    assert epsilon_lower_bound(m, r, v, delta, confidence=0.99) <= bound + 1e-6
    assert epsilon_lower_bound(m, r, v, delta + 1e-3) <= bound + 1e-6


@pytest.mark.parametrize("wrong", [(5, 6, 1), (5, 2, 3), (5, 2, -1)])
def test_impossible_counts_are_refused(wrong):
    with pytest.raises(ValueError, match="Expected"):
        p_value(*wrong, 1.0, 0.0)


def test_guesses_are_two_sided_and_odd_ones_say_in():
    scores = [5.0, 4.0, 3.0, 2.0, 1.0]
    included = [True, False, True, False, False]
    assert count_correct(scores, included, 1) == 1
    assert count_correct(scores, included, 2) == 2
    assert count_correct(scores, included, 3) == 2
    assert count_correct(scores, included, 5) == 4
    assert count_correct([float("nan"), *scores[1:]], included, 1) == 0  # a broken score never says "in"


def test_best_bound_pays_for_every_number_of_guesses_it_tries():
    included = np.arange(400) % 2 == 0
    best, points = best_bound(included + 0.0, included, 1e-5)
    assert [point.n_guesses for point in points] == [20, 40, 100, 200, 400]
    assert best.epsilon == max(point.epsilon for point in points) == highest_reachable(400, 1e-5)
    for point in points:
        assert point.confidence == pytest.approx(1 - 0.05 / len(GUESS_SHARES))
        assert point.epsilon < epsilon_lower_bound(400, point.n_guesses, point.n_correct, 1e-5)


def test_bound_refutes_the_truth_no_more_often_than_it_may():
    """Randomised response at epsilon 1 attacked with the best scores: the corrected bound stays below 1."""
    random = np.random.default_rng(1)
    n_wrong = 0
    for _ in range(300):
        included = random.random(100) < 0.5
        kept = random.random(100) < math.e / (1 + math.e)
        n_wrong += (
            best_bound(np.where(kept, included, ~included) + 1e-3 * random.random(100), included, 0.0)[0].epsilon > 1
        )
    assert n_wrong <= 27  # 15 expected at most; 1 in 1000 of exactly calibrated bounds would pass this


def test_auc_and_tpr_are_their_definitions():
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    included = random.random(150) < 0.5
    scores = np.round(random.normal(size=150) + included, 1)  # with ties
    assert auc(scores, included) == pytest.approx(sklearn.roc_auc_score(included, scores))
    fprs, tprs, _ = sklearn.roc_curve(included, scores, drop_intermediate=False)
    for fpr in (0.0, 0.001, 0.01, 0.1, 0.5):
        assert tpr_at_fpr(scores, included, fpr) == pytest.approx(max(tprs[fprs <= fpr]))
    ours = np.array(roc(scores, included))
    assert np.allclose(ours, np.column_stack([fprs, tprs]))


def test_intervals_hold_their_value_and_have_width_at_the_ends():
    included = np.repeat([True, False], 20)
    nothing = tpr_estimate(np.where(included, 0.0, 1.0), included, 0.01)
    assert (nothing.value, nothing.low) == (0.0, 0.0)
    assert nothing.high == pytest.approx(clopper_pearson(0, 20)[1]) == pytest.approx(1 - 0.025 ** (1 / 20))
    estimate = auc_estimate(np.random.default_rng(0).normal(size=40) + included, included)
    assert estimate.low < estimate.value < estimate.high
    assert auc_estimate([1.0, 2.0], [True, True]).value == 0.5


def test_exposure_in_bits():
    scores = [9.0, 0.5, 1.0, 2.0, 3.0]
    included = [True, True, False, False, False]
    found = exposure(scores, included)
    assert found.limit == 2.0  # log2(3 left out + 1)
    assert (found.highest, found.mean) == (2.0, 1.0)
    assert exposure([1.0, 1.0], [True, False]).highest == 0.0  # a tie is no trace
