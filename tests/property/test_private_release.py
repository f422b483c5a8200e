"""The private gate's mechanism: its sensitivity, its noise, its price, and what one record can change."""

import dataclasses
import math
import random
from collections import Counter

import dp_accounting
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, chisquare, kstest

from fedmentor_core.config import StudyConfig
from fedmentor_core.config_io import validate_config
from fedmentor_core.evaluation.evaluate import metrics_of_rows
from fedmentor_core.evaluation.private_metrics import N_SCORES, cells, metrics_of_means, unit_scores
from fedmentor_core.evaluation.scores import RowScores
from fedmentor_core.privacy import discrete_gaussian, release
from fedmentor_core.privacy.accountant import calibrate_at_order, epsilon_rdp
from fedmentor_core.privacy.adaptation import count_below, decide
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.plan import plan_domain
from fedmentor_core.privacy.release import (
    GRID,
    UnitScores,
    grid_sum,
    nearest_shares,
    release_means,
    sensitivity,
    std_of_mean,
)
from fedmentor_core.privacy.validation_plan import chosen_units
from fedmentor_core.records import DomainPlan, PrivacySpend

numbers = st.one_of(
    st.sampled_from([0.0, 1.0, -5.0, 7.0, math.nan, math.inf, -math.inf]),
    st.floats(-0.5, 1.5),
)
rows = st.builds(
    RowScores,
    output=st.sampled_from(["", "yes it is", "no", "hm"]),
    reference=st.just("x"),
    bertscore_f1=numbers,
    rouge_l=numbers,
    toxicity=numbers,
    safe=st.booleans(),
    label=st.sampled_from(["yes", "no", ""]),
    answer=st.sampled_from(["yes", "no", None]),
)
units = st.lists(rows, min_size=1, max_size=7)


def vectors(dataset: list[list[RowScores]]) -> list[UnitScores]:
    names = [str(index) for index, unit in enumerate(dataset) for _ in unit]
    return unit_scores([row for unit in dataset for row in unit], names)


def distance(left: list[int], right: list[int]) -> float:
    return math.dist(left, right) / GRID


@settings(max_examples=200, deadline=None)
@given(rest=st.lists(units, max_size=5), old=units, new=units)
def test_one_unit_moves_the_sum_by_at_most_the_sensitivity(rest: list, old: list, new: list) -> None:
    """Replaced, added or removed; however many rows it has, whatever their scores."""
    bound = sensitivity(N_SCORES) * (1 + 1e-12)
    before, after = grid_sum(vectors([*rest, old])), grid_sum(vectors([*rest, new]))
    assert distance(before, after) <= bound
    if rest:
        assert distance(grid_sum(vectors(rest)), before) <= bound


def test_the_sensitivity_is_reached_so_no_smaller_one_would_do() -> None:
    best = RowScores("yes", "x", 1.0, 1.0, 1.0, True, "yes", "yes")
    worst = RowScores("", "x", 0.0, 0.0, 0.0, False, "no", None)
    apart = distance(grid_sum(vectors([[best]])), grid_sum(vectors([[worst] * 3])))
    assert apart == pytest.approx(sensitivity(N_SCORES)) == pytest.approx(math.sqrt(6))


@settings(max_examples=100, deadline=None)
@given(
    names=st.sets(st.integers(0, 10**6), min_size=2, max_size=40),
    new=st.integers(10**6 + 1, 10**7),
    k=st.integers(1, 30),
)
def test_one_unit_replaces_at_most_one_of_the_chosen(names: set[int], new: int, k: int) -> None:
    """Else capping the set would undo the sensitivity: one unit would move many in and out."""
    old = min(names)
    for other in ({*names - {old}, new}, names - {old}, {*names, new}):
        one = chosen_units(map(str, names), k, split_seed=3, account="a.gate")
        two = chosen_units(map(str, other), k, split_seed=3, account="a.gate")
        assert len(one - two) <= 1
        assert len(two - one) <= 1
        assert len(one) == min(k, len(names))


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.floats(-3, 3), min_size=1, max_size=12), seed=st.integers(0, 2**31))
def test_nearest_shares_are_shares_and_never_further_from_the_truth(values: list[float], seed: int) -> None:
    shares = nearest_shares(values)
    assert all(share >= 0 for share in shares)
    assert sum(shares) == pytest.approx(1.0)
    dice = random.Random(seed)
    raw = [dice.expovariate(1.0) for _ in values]
    truth = [value / sum(raw) for value in raw]
    assert math.dist(shares, truth) <= math.dist(values, truth) + 1e-9
    assert nearest_shares(shares) == pytest.approx(shares)


@settings(max_examples=60, deadline=None)
@given(dataset=st.lists(rows, min_size=1, max_size=12))
def test_without_noise_the_metrics_are_those_of_a_public_set(dataset: list[RowScores]) -> None:
    """One row a unit, scores in range: only noise makes a private set's metrics differ."""

    def tidy(row: RowScores) -> RowScores:
        def inside(value: float) -> float:
            return min(1.0, max(0.0, value))

        answer = row.answer if row.output else None
        scores = {"bertscore_f1": inside(row.bertscore_f1), "rouge_l": inside(row.rouge_l)}
        return dataclasses.replace(row, answer=answer, toxicity=inside(row.toxicity), **scores)

    tidied = [tidy(row) for row in dataset]
    given_units = unit_scores(tidied, [str(index) for index in range(len(tidied))])
    sums = [total / GRID / len(tidied) for total in grid_sum(given_units)]
    means = release.ReleasedMeans(tuple(sums[:N_SCORES]), nearest_shares(sums[N_SCORES:]), 1e-4)
    private, public = metrics_of_means(means, len(tidied)), metrics_of_rows(tidied)
    assert private.toxicity_max is None
    for name in ("bertscore_f1", "rouge_l", "label_f1", "safe_rate", "toxicity_mean", "empty_rate", "n_examples"):
        assert getattr(private, name) == pytest.approx(getattr(public, name), abs=1e-4)


def noise_sample(noise: float, n: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The noise of released sums, in units of its promised standard deviation."""
    cells, share = 100, 1 / 128
    unit = UnitScores((0.5,), (share,) * cells)  # one score: the sensitivity is sqrt(3)
    monkeypatch.setattr(release, "nearest_shares", tuple)  # post-processing: look at what comes before it
    found: list[float] = []
    while len(found) < n:
        means = release_means([unit], noise, discrete_gaussian.secret_dice())
        found.extend((value - share) / (noise * math.sqrt(3)) for value in means.shares)
    return found


@pytest.mark.parametrize("noise", [0.7, 6.0])
def test_noise_is_gaussian_of_exactly_the_promised_scale(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = noise_sample(noise, 40_000, monkeypatch)
    assert kstest(sample, "norm").pvalue > 1e-4
    for wrong in (0.9, 1.1):
        assert kstest([value * wrong for value in sample], "norm").pvalue < 1e-6
        assert kstest(sample, "norm", args=(0, wrong)).pvalue < 1e-6


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_discrete_gaussian_has_its_law_where_the_grid_is_coarse(scale: int) -> None:
    n, edge = 12_000, 4 * scale
    dice = random.Random(5)
    found = Counter(max(-edge, min(edge, discrete_gaussian.sample(scale, dice))) for _ in range(n))
    mass = {x: math.exp(-x * x / (2 * scale**2)) for x in range(-20 * scale, 20 * scale + 1)}
    law = Counter()
    for x, weight in mass.items():
        law[max(-edge, min(edge, x))] += weight / sum(mass.values())
    cells = [x for x in law if law[x] * n >= 8]
    rest = n - sum(found[x] for x in cells)
    expected = [law[x] * n for x in cells]
    assert chisquare([*(found[x] for x in cells), rest], [*expected, n - sum(expected)]).pvalue > 1e-4
    shifted = [found[x + 1] for x in cells]
    assert chisquare([*shifted, n - sum(shifted)], [*expected, n - sum(expected)]).pvalue < 1e-6  # power


@pytest.mark.parametrize("noise", [0.0, -1.0, math.nan, math.inf])
def test_no_noise_is_refused(noise: float) -> None:
    with pytest.raises(ValueError, match="noise_multiplier"):
        release_means([UnitScores((0.5,), (1.0,))], noise, discrete_gaussian.secret_dice())


def test_what_is_no_vector_is_refused() -> None:
    for bad in ([], [UnitScores((0.5,), (0.7, 0.7))], [UnitScores((0.5,), (-0.1,))]):
        with pytest.raises(ValueError, match="Expected"):
            release_means(bad, 1.0, discrete_gaussian.secret_dice())
    with pytest.raises(ValueError, match="one length"):
        release_means([UnitScores((0.5,), (1.0,)), UnitScores((0.5, 0.5), ())], 1.0, discrete_gaussian.secret_dice())
    with pytest.raises(ValueError, match="scale"):
        discrete_gaussian.sample(0, discrete_gaussian.secret_dice())


def test_noise_comes_from_no_seed() -> None:
    units = [UnitScores((0.5,) * 4, (1.0,))] * 100
    drawn = []
    for _ in range(2):
        random.seed(1)
        drawn.append(release_means(units, 2.0, discrete_gaussian.secret_dice()))
    assert drawn[0] != drawn[1]
    assert release_means(units, 2.0, random.Random(1)) == release_means(units, 2.0, random.Random(1))


def test_price_of_a_release_is_dp_accountings() -> None:
    """Ten releases at noise multiplier 10 and delta 1e-5: 1.3085 by RDP, never below the exact 1.1994."""
    ours = epsilon_rdp([PrivacySpend(noise_multiplier=10.0, sample_rate=1.0, steps=10)], 1e-5)
    accountant = dp_accounting.rdp.RdpAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(10.0), 10)
    assert ours == pytest.approx(1.3085, abs=1e-3)
    assert ours == pytest.approx(float(accountant.get_epsilon(1e-5)), abs=2e-3)
    exact = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-2)
    exact.compose(dp_accounting.GaussianDpEvent(10.0), 10)
    assert ours >= float(exact.get_epsilon(1e-5))


# --- one validation record cannot change a noise multiplier un-noised ---------------------------------------------

DELTA = 1e-5


def neighbours() -> tuple[list[UnitScores], list[UnitScores], float]:
    """Two sets of 24 units that differ in one, and the threshold exactly between their exact scores."""
    good = RowScores("yes", "x", 1.0, 1.0, 0.0, True, "yes", "yes")
    bad = RowScores("no", "x", 0.0, 0.0, 1.0, False, "yes", "no")
    below, above = [[good]] * 11 + [[bad]] * 13, [[good]] * 12 + [[bad]] * 12
    return vectors(below), vectors(above), 11.5 / 24


def domain_plan(config: StudyConfig) -> DomainPlan:
    return plan_domain(
        config, config.domains[0], n_units=60, dataset_fingerprint="f", bytes_up=1, bytes_down=1, with_prv=False
    )


def times_lowered(config: StudyConfig, dataset: list[UnitScores], noise: float, draws: int) -> int:
    """How often the paper's rule lowers a domain's noise multiplier after a release of its gate's metrics."""
    plan, threshold = domain_plan(config), config.adaptation.threshold
    assert plan.noise_multiplier is not None
    lowered = 0
    for _ in range(draws):
        means = release_means(dataset, noise, discrete_gaussian.secret_dice())
        utility = metrics_of_means(means, len(dataset)).bertscore_f1
        decided = decide(
            config,
            plan,
            noise_multiplier=plan.noise_multiplier,
            spent_rdp=0.0,
            rounds_left=2,
            utility=utility,
            threshold=threshold,
            rounds_below=count_below(0, utility, threshold),
        )
        assert decided is not None
        assert decided[0].value_noised
        lowered += decided[0].noise_after < decided[0].noise_before
    return lowered


def violates(one: int, two: int, draws: int, epsilon: float) -> bool:
    """Whether two counts show p_one > e^epsilon p_two + delta, at a chance of 1e-6 of saying so wrongly."""
    sure_one = beta.ppf(1e-6, one, draws - one + 1) if one else 0.0
    sure_two = beta.ppf(1 - 1e-6, two + 1, draws - two) if two < draws else 1.0
    return bool(sure_one > math.exp(epsilon) * sure_two + DELTA)


def test_flipping_one_record_cannot_decide_a_noise_multiplier(monkeypatch: pytest.MonkeyPatch) -> None:
    account = PrivacyAccount.open(1.0, DELTA, 1.0, 1)
    noise = calibrate_at_order(account.rdp_budget, account.rdp_order, 1.0, 1)
    below, above, threshold = neighbours()
    config = validate_config(
        {
            "name": "tiny",
            "domains": [
                {"name": "one", "source": {"kind": "invented", "corpus": "peer_forum", "n_units": 60}, "epsilon": 8.0}
            ],
            "training": {"batch_size": 8},
            "adaptation": {"rule": "paper", "metric": "bertscore_f1", "threshold": threshold},
            "evaluation": {"gate_data": "private"},
        }
    )
    draws = 400
    one, two = (times_lowered(config, dataset, noise, draws) for dataset in (below, above))
    assert 0 < one < draws
    assert 0 < two < draws
    assert not violates(one, two, draws, 1.0)
    assert not violates(draws - two, draws - one, draws, 1.0)

    monkeypatch.setattr(discrete_gaussian, "sample", lambda scale, dice: 0)  # the same test finds the leak
    one, two = (times_lowered(config, dataset, noise, draws) for dataset in (below, above))
    assert (one, two) == (draws, 0)
    assert violates(one, two, draws, 1.0)


def test_released_mean_has_the_standard_deviation_that_is_told() -> None:
    below, _, _ = neighbours()
    noise, n = 1.5, 600
    told = std_of_mean(noise, N_SCORES, len(below))
    drawn = [release_means(below, noise, discrete_gaussian.secret_dice()) for _ in range(n)]
    assert all(one.std == told for one in drawn)
    assert len(drawn[0].shares) == len(cells())
    values = [one.scores[0] for one in drawn]
    mean = sum(values) / n
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    assert mean == pytest.approx(11 / 24, abs=5 * told / math.sqrt(n))
    assert spread == pytest.approx(told, rel=0.2)
