"""The gate: every threshold listed, edges, comparisons, missing values."""

import pytest

from fedmentor_core.config import ThresholdConfig
from fedmentor_core.evaluation.gate import judge
from fedmentor_core.records import EvaluationMetrics, Metrics


def metrics(label_f1=0.6, safe_rate=0.99, toxicity_max=0.2, other_domain=0.5) -> EvaluationMetrics:
    one = Metrics(
        bertscore_f1=0.8, rouge_l=0.3, label_f1=label_f1, safe_rate=safe_rate, toxicity_mean=0.05, toxicity_max=toxicity_max,
        empty_rate=0.0, n_examples=10,
    )  # fmt: skip
    return EvaluationMetrics(
        **one.model_dump(), by_domain={"a": one, "b": one.model_copy(update={"label_f1": other_domain})}
    )


def verdict(threshold: dict, candidate=None, **comparisons):
    return judge(candidate or metrics(), (ThresholdConfig(**threshold),), comparisons)


@pytest.mark.parametrize(
    ("threshold", "passed"),
    [
        ({"metric": "label_f1", "at_least": 0.6}, True),
        ({"metric": "label_f1", "at_least": 0.6000001}, False),
        ({"metric": "toxicity_mean", "at_most": 0.05}, True),
        ({"metric": "toxicity_mean", "at_most": 0.0499999}, False),
        ({"metric": "label_f1", "at_least": 0.5, "scope": "b"}, True),
        ({"metric": "label_f1", "at_least": 0.55, "scope": "b"}, False),
    ],
)
def test_a_threshold_holds_exactly_at_its_bound(threshold, passed):
    assert verdict(threshold).passed is passed


def test_each_gives_one_line_per_domain_and_all_must_pass():
    result = verdict({"metric": "label_f1", "at_least": 0.55, "scope": "each"})
    assert [(line.scope, line.passed) for line in result.results] == [("a", True), ("b", False)]
    assert not result.passed
    assert len(result.reasons) == 1
    assert "label_f1 [b] 0.5000 >= 0.5500" in result.reasons[0]


def test_relative_thresholds_multiply_and_offset_the_other_run():
    baseline = metrics(label_f1=0.5)
    assert verdict({"metric": "label_f1", "at_least": 1.2, "relative_to": "baseline"}, baseline=baseline).passed
    assert not verdict({"metric": "label_f1", "at_least": 1.21, "relative_to": "baseline"}, baseline=baseline).passed
    within = {"metric": "safe_rate", "at_least": 1.0, "offset": -0.01, "relative_to": "reference"}
    assert verdict(within, reference=metrics(safe_rate=1.0)).passed
    assert not verdict(within, candidate=metrics(safe_rate=0.98), reference=metrics(safe_rate=1.0)).passed


def test_what_is_not_available_fails_its_line():
    assert not verdict({"metric": "label_f1", "at_least": 1.0, "relative_to": "reference"}, reference=None).passed
    withheld = metrics(toxicity_max=None)
    result = verdict({"metric": "toxicity_max", "at_most": 1.0}, candidate=withheld)
    assert not result.passed
    assert "not available" in result.reasons[0]
    nan = metrics(label_f1=float("nan"))
    assert not verdict({"metric": "label_f1", "at_least": 0.0}, candidate=nan).passed


def test_no_thresholds_pass_and_say_nothing():
    result = judge(metrics(), (), {})
    assert result.passed
    assert result.results == ()
