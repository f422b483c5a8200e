"""A site's scores as a server judges them: of a private set nothing but the noised vector, of a public one no nonsense."""

import math
from types import SimpleNamespace

import pytest

from fedmentor_core.config import EvaluationConfig
from fedmentor_core.records import (
    UNRELEASED_METRICS,
    DomainEvaluation,
    EvaluatedRows,
    Metrics,
    ScorerAlarms,
    ScorerIdentities,
)
from fedmentor_core.site.checking import _problems_of_evaluation
from fedmentor_core.site.requests import EvaluateRequest

RELEASED = Metrics(
    bertscore_f1=0.7, rouge_l=0.3, label_f1=0.5, safe_rate=1.0, toxicity_mean=0.02, toxicity_max=None, empty_rate=0.0,
    n_examples=3,
)  # fmt: skip
ROWS = EvaluatedRows(units=(0, 1, 2), labels=("yes",) * 3, answers=("",) * 3, means={"rouge_l": (0.1, 0.2, 0.6)})
ALARMS = ScorerAlarms(n_posts=3, n_references=2, posts_05=0, posts_07=0, references_05=0, references_07=0)


def problems(gate_data: str, metric_std: float | None, metrics: dict | None = None, **more: object) -> list[str]:
    workspace = SimpleNamespace(config=SimpleNamespace(evaluation=EvaluationConfig(gate_data=gate_data)))
    request = EvaluateRequest.model_construct(domain="one", split="gate")
    found = DomainEvaluation(
        domain="one", split="gate", metrics=RELEASED.model_copy(update=metrics or {}), metric_std=metric_std, seconds=1.0,
        scorers=ScorerIdentities(bertscore="b", rouge="r", toxicity="t", safe_threshold=0.5), **more,
    )  # fmt: skip
    return list(_problems_of_evaluation(workspace, request, found))


def test_honest_answers_pass() -> None:
    assert problems("private", 0.02) == []
    measured = dict.fromkeys(UNRELEASED_METRICS, 0.25) | {"perplexity": 12.0, "intervals": {"rouge_l": (0.1, 0.6)}}
    assert problems("public", None, measured, rows=ROWS, alarms=ALARMS) == []


@pytest.mark.parametrize("name", sorted(UNRELEASED_METRICS))
def test_any_other_metric_of_a_private_set_is_refused(name: str) -> None:
    assert any("of a private set" in one for one in problems("private", 0.02, {name: 1.0}))


def test_intervals_rows_and_alarms_of_a_private_set_are_refused() -> None:
    assert problems("private", 0.02, {"intervals": {"rouge_l": (0.2, 0.4)}})
    assert problems("private", 0.02, rows=ROWS)
    assert problems("private", 0.02, alarms=ALARMS)


@pytest.mark.parametrize(
    "metrics", [{"perplexity": 0.5}, {"perplexity": math.inf}, {"perplexity": math.nan}, {"refusal_rate": 1.5}, {"n_examples": 4}]
)  # fmt: skip
def test_nonsense_of_a_public_set_is_refused(metrics: dict) -> None:
    assert problems("public", None, metrics, rows=ROWS)
