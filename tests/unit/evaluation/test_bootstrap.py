"""Bootstrap intervals: by hand, against statistics' own formulas, and as properties."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmentor_core.evaluation import bootstrap
from fedmentor_core.evaluation.labels import label_f1
from fedmentor_core.records import EvaluatedRows

SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=60)


def rows(scores, units=None, labels=None, answers=None, losses=(), tokens=()) -> EvaluatedRows:
    n = len(scores)
    return EvaluatedRows(
        units=tuple(range(n)) if units is None else tuple(units), labels=tuple(labels or [""] * n),
        answers=tuple(answers or [""] * n), means={"rouge_l": tuple(scores)}, log_losses=tuple(losses), n_tokens=tuple(tokens),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(SCORES)
def test_interval_of_a_mean_contains_it_and_stays_within_the_scores(scores):
    low, high = bootstrap.mean_interval(scores)
    mean = sum(scores) / len(scores)
    assert min(scores) - 1e-9 <= low <= mean + 1e-9
    assert mean - 1e-9 <= high <= max(scores) + 1e-9


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=8, max_size=20).filter(lambda one: np.std(one) > 0.05))
def test_interval_shrinks_with_more_of_the_same(scores):
    few, many = bootstrap.mean_interval(scores), bootstrap.mean_interval(scores * 16)
    assert (many[1] - many[0]) < 0.5 * (few[1] - few[0])


def test_interval_of_a_mean_is_that_of_the_normal_approximation():
    scores = np.random.default_rng(3).normal(0.5, 0.1, 400)
    low, high = bootstrap.mean_interval(scores.tolist())
    half = 1.96 * scores.std() / math.sqrt(400)
    assert low == pytest.approx(scores.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(scores.mean() + half, abs=0.1 * half)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    dice = np.random.default_rng(11)
    covered = 0
    for _ in range(200):
        low, high = bootstrap.mean_interval((dice.random(60) < 0.6).astype(float).tolist())
        covered += low <= 0.6 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_two_units_by_hand():
    """Resamples of {0, 1}: 0 or 1 a quarter of the time each, so both lie within the middle 95 %."""
    assert bootstrap.mean_interval([0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap.mean_interval([0.25]) == (0.25, 0.25)


def test_rows_of_one_unit_move_together():
    """Six equal rows per unit tell no more than one: taken for independent, they would seem to."""
    scores = [0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    single = bootstrap.mean_interval(scores)
    sixfold = [score for score in scores for _ in range(6)]
    assert bootstrap.mean_interval(sixfold, [unit for unit in range(8) for _ in range(6)]) == single
    naive = bootstrap.mean_interval(sixfold)
    assert naive[1] - naive[0] < 0.6 * (single[1] - single[0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["a", "b", "c", None])), min_size=1, max_size=40))
def test_macro_f1_of_the_set_equals_the_label_score(pairs):
    gold, predicted = [g for g, _ in pairs], [p for _, p in pairs]
    found = bootstrap.values(rows([0.0] * len(gold), labels=gold, answers=[p or "" for p in predicted]))
    assert found["label_f1"] == pytest.approx(label_f1(gold, predicted))


def test_each_resample_of_macro_f1_is_the_label_score_of_its_rows():
    gold, predicted = ["yes", "no", "yes", "no", "yes"], ["yes", "yes", "no", None, "yes"]
    table = rows([0.0] * 5, labels=gold, answers=[p or "" for p in predicted])
    resampled = bootstrap.replicates(table)["label_f1"]
    counts = bootstrap._resamples(5, "")
    for value, count in zip(resampled[:200], counts[:200], strict=True):
        drawn = [i for i in range(5) for _ in range(int(count[i]))]
        assert value == pytest.approx(label_f1([gold[i] for i in drawn], [predicted[i] for i in drawn]))
    low, high = bootstrap.macro_f1_interval(gold, predicted)
    assert 0 <= low < label_f1(gold, predicted) < high <= 1


def test_unlabelled_rows_do_not_count_for_the_label_score():
    table = rows([0.0] * 3, labels=["yes", "", "no"], answers=["yes", "yes", "no"])
    assert bootstrap.values(table)["label_f1"] == 1.0
    assert "label_f1" not in bootstrap.values(rows([0.0, 1.0]))


def test_perplexity_weighs_tokens_and_not_rows():
    table = rows([0.0, 0.0], losses=[math.log(4.0), 3 * math.log(2.0)], tokens=[1, 3])
    assert bootstrap.values(table)["perplexity"] == pytest.approx(math.exp((math.log(4) + 3 * math.log(2)) / 4))
    low, high = bootstrap.intervals(bootstrap.replicates(table))["perplexity"]
    assert (low, high) == (pytest.approx(2.0), pytest.approx(4.0))


def test_same_set_same_resamples_other_stratum_others():
    scores = np.random.default_rng(0).random(30).tolist()
    first, again = (bootstrap.replicates(rows(scores), "irf")["rouge_l"] for _ in range(2))
    other = bootstrap.replicates(rows(scores), "dreaddit")["rouge_l"]
    assert (first == again).all()
    assert (first != other).any()


def test_the_mean_over_domains_is_stratified():
    """Each domain keeps its size: what differs between domains is no uncertainty of their mean."""
    by_domain = {"a": rows([0.0] * 20), "b": rows([1.0] * 20)}
    resampled = {name: bootstrap.replicates(one, name) for name, one in by_domain.items()}
    assert bootstrap.intervals(bootstrap.over_domains(resampled))["rouge_l"] == (0.5, 0.5)
    assert bootstrap.over_domains({}) == {}


def test_paired_difference_sees_what_unpaired_intervals_hide():
    base = np.random.default_rng(5).random(80)
    worse, better = rows(base.tolist()), rows((base + 0.02).tolist())
    found = bootstrap.paired_difference({"a": better}, {"a": worse}, "rouge_l")
    assert found.mean == pytest.approx(0.02)
    assert found.interval == (pytest.approx(0.02), pytest.approx(0.02))
    assert found.p_value < 0.01
    assert found.n_units == 80
    low, _ = bootstrap.mean_interval((base + 0.02).tolist())
    assert low < base.mean()  # the intervals of the two overlap all the same


def test_no_difference_is_not_significant_and_signs_turn():
    dice = np.random.default_rng(6)
    one, two = rows(dice.random(60).tolist()), rows(dice.random(60).tolist())
    same = bootstrap.paired_difference({"a": one}, {"a": one}, "rouge_l")
    assert (same.mean, same.interval, same.p_value) == (0.0, (0.0, 0.0), 1.0)
    forth, back = (bootstrap.paired_difference({"a": x}, {"a": y}, "rouge_l") for x, y in ((one, two), (two, one)))
    assert forth.mean == pytest.approx(-back.mean)
    assert forth.interval[0] == pytest.approx(-back.interval[1])
    assert forth.p_value == back.p_value


def test_what_cannot_be_paired_is_refused():
    with pytest.raises(ValueError, match="same domains"):
        bootstrap.paired_difference({"a": rows([0.1, 0.2])}, {"b": rows([0.1, 0.2])}, "rouge_l")
    with pytest.raises(ValueError, match="same domains"):
        bootstrap.paired_difference({"a": rows([0.1, 0.2])}, {"a": rows([0.1])}, "rouge_l")
    with pytest.raises(ValueError, match="not measured"):
        bootstrap.paired_difference({"a": rows([0.1])}, {"a": rows([0.1])}, "label_f1")
    with pytest.raises(ValueError, match="at least one"):
        bootstrap.mean_interval([])
    with pytest.raises(ValueError, match="one length"):
        rows([0.1, 0.2], units=[0])
