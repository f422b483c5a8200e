"""Means, intervals and paired tests: against hand-worked values, against scipy, and over all inputs."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedmentor_core.compare.statistics import estimate, paired

VALUES = st.lists(st.floats(-10, 10), min_size=2, max_size=8)


def test_an_interval_worked_by_hand() -> None:
    found = estimate([1.0, 2.0, 3.0])  # s = 1, t(0.975, 2) = 4.302653, half = 4.302653 / sqrt(3)
    assert found.mean == 2.0
    assert found.n == 3
    assert found.ci95 == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)


def test_one_value_has_no_interval_and_none_is_an_error() -> None:
    assert estimate([0.5]).ci95 is None
    with pytest.raises(ValueError, match="at least one"):
        estimate([])


def test_a_paired_difference_worked_by_hand() -> None:
    # gaps 1, 2, 3: mean 2, s / sqrt(n) = 0.57735, t = 3.4641 on 2 degrees of freedom: p = 0.0742
    found = paired({1: 2.0, 2: 4.0, 3: 6.0}, {1: 1.0, 2: 2.0, 3: 3.0})
    assert found is not None
    assert (found.mean, found.n) == (2.0, 3)
    assert found.p_value == pytest.approx(0.074180, abs=1e-5)


def test_only_seeds_of_both_arms_count() -> None:
    found = paired({1: 2.0, 2: 4.0, 9: 100.0}, {1: 1.0, 2: 2.0, 8: -100.0})
    assert found is not None
    assert (found.mean, found.n) == (1.5, 2)
    assert paired({1: 2.0}, {2: 1.0}) is None
    one = paired({1: 2.0}, {1: 1.5})
    assert one is not None
    assert (one.mean, one.ci95, one.p_value, one.n) == (0.5, None, None, 1)


def test_without_spread_there_is_no_test() -> None:
    same = paired({1: 0.5, 2: 0.75}, {1: 0.25, 2: 0.5})
    assert same is not None
    assert (same.mean, same.ci95, same.p_value) == (0.25, None, None), "a gap that is the same by chance"
    alike = paired({1: 0.5, 2: 0.75}, {1: 0.5, 2: 0.75})
    assert alike is not None
    assert (alike.ci95, alike.p_value) == ((0.0, 0.0), None)


@given(VALUES)
def test_intervals_are_those_of_scipy(values: list[float]) -> None:
    found = estimate(values)
    assert found.ci95 is not None
    assert found.ci95[0] <= found.mean <= found.ci95[1]
    spread = stats.sem(values)
    if spread > 1e-9:
        assert found.ci95 == pytest.approx(stats.t.interval(0.95, len(values) - 1, stats.tmean(values), spread))


@given(VALUES)
def test_paired_tests_are_those_of_scipy_and_do_not_see_what_both_arms_share(gaps: list[float]) -> None:
    arm = {seed: 3.0 + gap for seed, gap in enumerate(gaps)}
    against = dict.fromkeys(arm, 3.0)
    found = paired(arm, against)
    assert found is not None
    left = [arm[seed] - 3.0 for seed in arm]
    if max(left) - min(left) > 1e-6:
        assert found.p_value == pytest.approx(stats.ttest_1samp(left, 0).pvalue, rel=1e-6, abs=1e-9)
        assert not math.isnan(found.p_value)
