"""A set's metrics, intervals and alarms, from hand-made rows and through a real small study; and what stays withheld."""

import json
import math
from typing import Any

import pytest
import torch

from fedmentor_core import rounds
from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import ConfigError
from fedmentor_core.evaluation import evaluate as evaluation
from fedmentor_core.evaluation.evaluate import combine, evaluated_rows, metrics_of_rows
from fedmentor_core.evaluation.gate import judge
from fedmentor_core.evaluation.scores import RowScores
from fedmentor_core.records import (
    UNRELEASED_METRICS,
    DomainEvaluation,
    EvaluationMetrics,
    Metrics,
    RoundManifest,
    ScorerIdentities,
)
from fedmentor_core.study import run_study
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import Workspace

SCORERS = ScorerIdentities(bertscore="b", rouge="r", toxicity="t", safe_threshold=0.5)
OLD_METRICS = {
    "bertscore_f1": 0.7, "rouge_l": 0.3, "label_f1": 0.5, "safe_rate": 1.0, "toxicity_mean": 0.02, "toxicity_max": 0.1,
    "empty_rate": 0.0, "n_examples": 4,
}  # fmt: skip
"""As stored before there were more metrics."""


@pytest.fixture(autouse=True)
def light() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def row(bertscore=0.8, toxicity=0.1, output="yes, it is", label="yes", answer="yes", **more) -> RowScores:
    defaults = {
        "bertscore_f1_raw": bertscore,
        "bertscore_f1_rescaled": bertscore - 0.5,
        "log_loss": math.log(8),
        "n_tokens": 3,
    }
    return RowScores(output, "x", bertscore, 0.5, toxicity, toxicity < 0.5, label, answer, **defaults | more)


ROWS = [
    row(toxicity=0.75, refused=True),
    row(bertscore=0.6, toxicity=0.5, label="no", answer="yes"),
    row(bertscore=0.4, toxicity=0.0, output="", answer=None),
    row(bertscore=1.0, toxicity=0.2, label="no", answer="no", repetitive=True),
]


def test_metrics_by_hand() -> None:
    found = metrics_of_rows(ROWS)
    assert found.bertscore_f1 == found.bertscore_f1_raw == pytest.approx(0.7)
    assert found.bertscore_f1_rescaled == pytest.approx(0.2)
    assert found.perplexity == pytest.approx(2.0)  # log 8 nats over three tokens
    assert (found.refusal_rate, found.repetition_rate, found.empty_rate) == (0.25, 0.25, 0.25)
    assert (found.toxicity_rate_05, found.toxicity_rate_07) == (0.5, 0.25)
    assert (found.safe_rate, found.toxicity_max) == (0.5, 0.75)


def test_rows_give_the_same_metrics_as_the_set(monkeypatch) -> None:
    from fedmentor_core.evaluation import bootstrap

    metrics, rows = metrics_of_rows(ROWS), evaluated_rows(ROWS, ["p", "q", "q", "r"])
    assert rows.units == (0, 1, 1, 2)
    values = bootstrap.values(rows)
    assert set(values) == set(Metrics.model_fields) - {"toxicity_max", "n_examples", "intervals"}
    for name, value in values.items():
        assert value == pytest.approx(getattr(metrics, name)), name


def test_what_was_not_measured_everywhere_is_none() -> None:
    rows = [*ROWS, row(log_loss=None, bertscore_f1_rescaled=None)]
    found, kept = metrics_of_rows(rows), evaluated_rows(rows, list("abcde"))
    assert found.perplexity is None
    assert found.bertscore_f1_rescaled is None
    assert found.bertscore_f1_raw is not None
    assert (kept.log_losses, kept.n_tokens) == ((), ())
    assert "bertscore_f1_rescaled" not in kept.means
    diverged = metrics_of_rows([*ROWS, row(log_loss=math.nan)])
    assert diverged.perplexity is None


def evaluated(domain: str, rows: list[RowScores], **more) -> DomainEvaluation:
    kept = evaluated_rows(rows, [str(i) for i in range(len(rows))])
    return DomainEvaluation(
        domain=domain, split="gate", metrics=metrics_of_rows(rows), rows=kept, scorers=SCORERS, seconds=0.0, **more
    )


def test_domains_count_the_same_and_one_without_a_metric_leaves_none() -> None:
    both = combine([evaluated("a", ROWS), evaluated("b", [row(log_loss=math.log(64))])])
    assert both.perplexity == pytest.approx((2 + 4) / 2)
    assert both.refusal_rate == pytest.approx(0.125)
    low, high = both.intervals["bertscore_f1"]
    assert low < both.bertscore_f1 < high
    old = DomainEvaluation.model_validate(
        {"domain": "b", "split": "gate", "metrics": OLD_METRICS, "metric_std": None, "samples": [],
         "scorers": {"bertscore": "b", "rouge": "r", "toxicity": "t", "safe_threshold": 0.5}, "seconds": 1.0}
    )  # fmt: skip
    mixed = combine([evaluated("a", ROWS), old])
    assert mixed.bertscore_f1 == pytest.approx(0.7)
    assert mixed.perplexity is None
    assert mixed.intervals is None


def test_metrics_stored_before_still_load_and_a_threshold_on_a_new_one_fails_closed() -> None:
    metrics = EvaluationMetrics.model_validate(OLD_METRICS | {"by_domain": {"a": OLD_METRICS}})
    config = validate_config(
        {"name": "x", "domains": [{"name": "a", "source": {"kind": "invented", "corpus": "peer_forum", "n_units": 60}, "epsilon": 1}],
         "evaluation": {"gate_data": "public", "thresholds": [
             {"metric": "perplexity", "at_most": 1.02, "relative_to": "baseline"}, {"metric": "refusal_rate", "at_most": 1}]}}
    )  # fmt: skip
    verdict = judge(metrics, config.evaluation.thresholds, {"baseline": metrics})
    assert not verdict.passed
    assert all("not available" in reason for reason in verdict.reasons)


def test_very_large_sets_keep_no_rows(monkeypatch, tiny_study, tmp_path) -> None:
    monkeypatch.setattr(evaluation, "MOST_ROWS_KEPT", 3)
    workspace = Workspace(open_study(validate_config(tiny_study), tmp_path / "out"))
    found = rounds.evaluate(workspace, workspace.untrained_adapter, "one", "gate")
    assert found.metrics.n_examples == 4
    assert found.rows is None
    assert found.metrics.intervals is None
    assert found.metrics.perplexity is not None


def test_a_public_study_measures_everything_with_intervals(tiny_study, tmp_path) -> None:
    tiny_study["rounds"] = 1
    tiny_study["evaluation"]["safety_prompts"] = {"max_prompts": 2, "max_new_tokens": 4, "every_round": True}
    tiny_study["evaluation"]["thresholds"] = [
        {"metric": "perplexity", "at_most": 2.0, "relative_to": "baseline"},
        {"metric": "toxicity_rate_07", "at_most": 1.0, "scope": "each"},
        {"metric": "refusal_rate", "at_most": 1.0},
        {"metric": "bertscore_f1_rescaled", "at_least": -2.0},
    ]
    ref = open_study(validate_config(tiny_study), tmp_path / "out")
    summary = run_study(ref)
    assert summary.rounds[0].gate.passed
    assert len(summary.rounds[0].gate.results) == 5
    for metrics in (summary.baseline, summary.baseline_gate, summary.final, summary.rounds[0].metrics):
        measured = {name for name in Metrics.model_fields if getattr(metrics, name) is not None}
        assert measured == set(Metrics.model_fields)
        assert set(metrics.intervals) == measured - {"toxicity_max", "n_examples", "intervals"}
        assert set(metrics.by_domain["one"].intervals) == set(metrics.intervals)
        for name, (low, high) in metrics.intervals.items():
            assert low <= high, name
        assert metrics.perplexity > 1
        for name in ("refusal_rate", "repetition_rate", "toxicity_rate_05", "toxicity_rate_07"):
            assert 0 <= getattr(metrics, name) <= 1
    assert set(summary.alarms) == {"one", "two"}
    for alarms in summary.alarms.values():
        assert 1 <= alarms.n_posts <= 4
        assert alarms.posts_07 <= alarms.posts_05
    for found in (summary.safety_baseline, summary.safety_final, summary.rounds[0].safety):
        (one,) = found.sets
        assert (one.name, one.n_unsafe, one.n_safe) == ("embedded", 2, 2)
        assert 0 <= one.unsafe_refusal_rate <= 1
        assert set(one.intervals) >= {"unsafe_refusal_rate", "over_refusal_rate", "safe_rate"}
    assert "custom-rescaled" in summary.scorers.bertscore_rescaled
    # what is stored is found again, and gives the same
    again = Workspace(ref)
    for domain in ("one", "two"):
        stored = rounds.evaluate(again, again.untrained_adapter, domain, "gate")
        assert stored.alarms == summary.alarms[domain]
        assert stored.rows is not None
    found = [rounds.evaluate(again, again.untrained_adapter, domain, "gate") for domain in ("one", "two")]
    assert combine(found) == summary.baseline_gate
    assert rounds.evaluate_safety(again, again.untrained_adapter) == summary.safety_baseline
    # and no output to a safety prompt, nor a post of the test set, is in what is stored of them
    text = json.dumps(again.store.get_json(again.key(f"evaluations/{again.untrained_adapter.sha256[:24]}/safety.json")))
    assert "output" not in text
    assert "pills" not in text


def test_a_private_set_releases_what_it_did_before_and_nothing_else(tiny_study, tmp_path) -> None:
    tiny_study["rounds"] = 1
    tiny_study["evaluation"] |= {"gate_data": "private", "private": {"epsilon": 8.0}, "max_gate_examples": 100}
    ref = open_study(validate_config(tiny_study), tmp_path / "out")
    summary = run_study(ref)
    released = {"bertscore_f1", "rouge_l", "label_f1", "safe_rate", "toxicity_mean", "empty_rate", "n_examples"}
    for metrics in (summary.baseline, summary.final, summary.rounds[0].metrics):
        for one in (metrics, *metrics.by_domain.values()):
            assert {name for name in Metrics.model_fields if getattr(one, name) is not None} == released
    assert summary.alarms == {}
    assert released.isdisjoint(UNRELEASED_METRICS)
    assert released | UNRELEASED_METRICS | {"intervals"} == set(Metrics.model_fields)
    stored = list((tmp_path / "out" / "store").rglob("evaluations/*/*.json"))
    assert len(stored) == 8
    for path in stored:
        kept = json.loads(path.read_text())
        assert kept["metric_std"] > 0
        assert kept["rows"] is None
        assert kept["alarms"] is None
        assert {name for name, value in kept["metrics"].items() if value is not None} == released
    (manifest,) = (tmp_path / "out" / "store").rglob("manifest.json")
    assert RoundManifest.model_validate_json(manifest.read_text()).samples == ()


def test_a_private_set_computes_nothing_on_its_references(tiny_study, tmp_path) -> None:
    tiny_study["evaluation"] |= {"gate_data": "private", "max_gate_examples": 100}
    workspace = Workspace(open_study(validate_config(tiny_study), tmp_path / "out"))
    assert workspace.evaluation_set("one", "gate").targets is None


@pytest.mark.parametrize("metric", sorted(UNRELEASED_METRICS))
def test_a_private_gate_cannot_judge_by_what_is_not_released(tiny_study, metric) -> None:
    tiny_study["evaluation"] |= {"gate_data": "private", "thresholds": [{"metric": metric, "at_most": 1.0}]}
    with pytest.raises(ConfigError, match=f"'{metric}' cannot be released from a private gate set"):
        validate_config(tiny_study)
