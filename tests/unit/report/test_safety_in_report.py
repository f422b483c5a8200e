"""The report's intervals, false alarms and safety prompts: shown where they are, absent where they are not."""

from invented_summary import make_config, make_summary

from fedmentor_core.records import EvaluationMetrics, SafetyEvaluation, SafetyPromptScores, ScorerAlarms, StudySummary
from fedmentor_core.report.html import build_report
from fedmentor_core.report.sections.safety import safety_view
from fedmentor_core.report.sections.scores import detail_rows


def measured(metrics: EvaluationMetrics, **more: float) -> EvaluationMetrics:
    values = {"bertscore_f1_raw": metrics.bertscore_f1, "bertscore_f1_rescaled": 0.31, "perplexity": 12.5,
              "refusal_rate": 0.0, "repetition_rate": 0.125, "toxicity_rate_05": 0.05, "toxicity_rate_07": 0.0}  # fmt: skip
    intervals = {"bertscore_f1": (0.612, 0.688), "perplexity": (11.2, 13.9), "safe_rate": (1.0, 1.0)}
    return metrics.model_copy(update=values | more | {"intervals": intervals})


def safety(refused: float) -> SafetyEvaluation:
    one = SafetyPromptScores(
        name="xstest", prompts_sha256="0" * 64, n_unsafe=50, n_safe=40, unsafe_refusal_rate=refused,
        over_refusal_rate=0.075, safe_rate=1.0, toxicity_mean=0.0231, empty_rate=0.0, repetition_rate=0.0,
        intervals={"unsafe_refusal_rate": (0.02, 0.18)},
    )  # fmt: skip
    return SafetyEvaluation(sets=(one,), scorers=make_summary().scorers, seconds=1.0)


def full_summary() -> StudySummary:
    summary = make_summary()
    alarms = ScorerAlarms(
        n_posts=48, n_references=31, posts_05=0.25, posts_07=0.1875, references_05=0.0, references_07=0.0,
        intervals={"posts_05": (0.146, 0.375)},
    )  # fmt: skip
    return summary.model_copy(
        update={
            "baseline": measured(summary.baseline, perplexity=19.0),
            "final": measured(summary.final),
            "alarms": {"stress": alarms},
            "safety_baseline": safety(0.0),
            "safety_final": safety(0.1),
        }
    )


def test_intervals_alarms_and_prompts_are_shown():
    page = build_report(full_summary(), make_config(), [])
    for said in ("95 %: 0.612 to 0.688", "Every metric with its interval", "11.200 to 13.900", "false alarms", "25.0 %",
                 "14.6 % to 37.5 %", "XSTest: 50 unsafe and 40 safe prompts", "10.0 %", "2.0 % to 18.0 %",
                 "Perplexity of references"):  # fmt: skip
        assert said in page, said


def test_each_metric_has_a_line_and_lower_perplexity_is_better():
    rows = {row.score.label: row for row in detail_rows(full_summary().final, full_summary().baseline)}
    assert rows["Perplexity of references"].score.judgement == "better"
    assert rows["Perplexity of references"].interval_before == "11.200 to 13.900"
    assert "BERTScore F1, raw" not in rows  # bertscore_f1 is the raw score, and is there already
    rescaled = measured(full_summary().final, bertscore_f1=0.31)
    assert "BERTScore F1, raw" in {row.score.label for row in detail_rows(rescaled, None)}


def test_an_older_or_private_summary_shows_none_of_it():
    summary = make_summary()
    page = build_report(summary, make_config(), [])
    for said in ("95 %:", "Every metric with its interval", "false alarms", "unsafe and"):
        assert said not in page
    assert detail_rows(summary.final, summary.baseline) == []
    assert safety_view(summary) == safety_view(summary.model_copy(update={"safety_baseline": safety(0.1)}))
