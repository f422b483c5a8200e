"""The table from cells: which metrics, which pairs, the frontier, what is said, and the three forms of it."""

import csv
import io
import json
from typing import Any

import pytest

from fedmentor_core.compare.outputs import table_csv, table_json, table_markdown
from fedmentor_core.compare.records import CellResult, ComparisonTable, FailedCell, Identity
from fedmentor_core.compare.table import build_table
from fedmentor_core.records import (
    ClientSummary,
    EvaluationMetrics,
    GateSummary,
    Metrics,
    RoundSummary,
    SafetyEvaluation,
    SafetyPromptScores,
    ScorerIdentities,
)

IDENTITY = Identity(
    backbone_sha256="b" * 64,
    scorers=ScorerIdentities(bertscore="b", rouge="r", toxicity="t", safe_threshold=0.5),
    splits={"one": "s" * 64},
    evaluation_sha256="e" * 64,
)


def metrics(value: float, **more: Any) -> EvaluationMetrics:
    own = {
        "bertscore_f1": value, "rouge_l": value / 2, "label_f1": value / 4, "safe_rate": 1.0, "toxicity_mean": 0.01,
        "toxicity_max": 0.5, "empty_rate": 0.0, "n_examples": 4,
    } | more  # fmt: skip
    return EvaluationMetrics(**own, by_domain={"one": Metrics(**own)})


def cell(arm: str, seed: int, value: float, epsilon: float | None = None, budget: float | None = None, **more: Any):
    client = ClientSummary(
        domain="one", status="trained", n_units=10, sample_rate=0.1, steps=2, noise_multiplier=1.0, clip_norm=1.0,
        epsilon_spent=budget, epsilon_budget=budget, delta=1e-5 if budget else None, bytes_up=5, bytes_down=5,
        seconds=1.0,
    )  # fmt: skip
    done = RoundSummary(
        round_index=0, clients=(client,), metrics=metrics(value), gate=GateSummary(passed=False, reasons=()),
        noise_changes=(), bytes_total=10, seconds=1.0,
    )  # fmt: skip
    return CellResult(
        key=f"{arm}-{seed}-{epsilon}", arm=arm, seed=seed, epsilon=epsilon, identity=IDENTITY,
        final=metrics(value, **more), rounds=(done, done), epsilon_spent={"one": budget} if budget else {},
        bytes_total=20, seconds=2.0,
    )  # fmt: skip


def table(cells: list[CellResult], **more: Any) -> ComparisonTable:
    return build_table(cells, name="study", against="federated", **more)


@pytest.fixture
def whole() -> ComparisonTable:
    cells = [cell("base", s, 0.4) for s in (1, 2, 3)]
    cells += [cell("federated", s, 0.6 + s / 100) for s in (1, 2, 3)]
    cells += [cell("uniform", s, 0.5 + s / 50, budget=4.0) for s in (1, 2, 3)]
    cells += [cell("uniform", 1, 0.45, epsilon=1.0, budget=1.0), cell("uniform", 1, 0.58, epsilon=8.0, budget=8.0)]
    return table(cells, failures=[FailedCell(arm="local", seed=1, reason="no reason")])


def test_rows_are_in_the_order_of_the_arms_and_hold_every_metric(whole: ComparisonTable) -> None:
    assert [arm.name for arm in whole.arms] == ["base", "federated", "uniform"]
    uniform = whole.arms[2]
    assert uniform.private
    assert uniform.seeds == (1, 2, 3)
    assert uniform.metrics["bertscore_f1"].mean == pytest.approx(0.54)
    assert uniform.by_domain["one"]["rouge_l"].mean == pytest.approx(0.27)
    assert uniform.epsilon_spent == {"one": 4.0}
    assert uniform.bytes_per_round == 10
    assert "n_examples" not in uniform.metrics
    assert "intervals" not in uniform.metrics


def test_a_metric_that_a_seed_lacks_is_left_out_of_its_arm_alone() -> None:
    made = table([cell("federated", 1, 0.5), cell("federated", 2, 0.5, toxicity_max=None), cell("base", 1, 0.4)])
    assert "toxicity_max" not in made.arms[1].metrics
    assert "toxicity_max" in made.arms[0].metrics
    assert all(one.metric != "toxicity_max" for one in made.differences)


def test_differences_are_paired_by_seed(whole: ComparisonTable) -> None:
    found = {(one.arm, one.metric): one for one in whole.differences}
    assert {arm for arm, _ in found} == {"base", "uniform"}
    one = found["uniform", "bertscore_f1"]
    assert one.mean == pytest.approx(0.54 - 0.62)
    assert one.n == 3
    assert one.p_value is not None
    assert found["uniform", "safe_rate"].p_value is None


def test_the_frontier_has_every_budget_and_ends_without_privacy(whole: ComparisonTable) -> None:
    assert [(point.arm, point.epsilon) for point in whole.frontier] == [
        ("uniform", 1.0), ("uniform", 4.0), ("uniform", 8.0), ("federated", None),
    ]  # fmt: skip
    assert whole.frontier[1].metrics["bertscore_f1"].n == 3
    assert table([cell("federated", 1, 0.5), cell("uniform", 1, 0.4, budget=4.0)]).frontier == ()


def test_what_must_be_said_is_said(whole: ComparisonTable) -> None:
    said = "\n".join(whole.warnings)
    assert "public or invented" in said
    assert "5 private cells" in said
    assert "one epsilon 21 at delta 5e-05" in said, "basic composition: 3 * 4 + 1 + 8"
    assert "1 cells are missing" in said
    few = "\n".join(table([cell("federated", 1, 0.5), cell("base", 1, 0.4)]).warnings)
    assert "One seed only in base, federated" in few
    assert "epsilon" not in few, "no private cell, so no sum"
    assert "No cell of 'federated'" in "\n".join(table([cell("base", 1, 0.4)]).warnings)


def test_an_empty_table_can_be_made() -> None:
    made = table([], failures=[FailedCell(arm="base", seed=1, reason="no data")])
    assert made.arms == ()
    assert "FAILED: base, seed 1: no data" in table_markdown(made)


def test_json_keeps_the_contract_of_the_design(whole: ComparisonTable) -> None:
    raw = json.loads(table_json(whole))
    assert {"name", "seeds", "metrics"} <= set(raw["arms"][0])
    assert set(raw["arms"][1]["metrics"]["rouge_l"]) >= {"mean", "ci95"}
    assert {"arm", "against", "metric", "mean", "ci95", "p_value"} <= set(raw["differences"][0])
    assert ComparisonTable.model_validate(raw) == whole


def test_csv_has_one_number_a_line(whole: ComparisonTable) -> None:
    lines = list(csv.DictReader(io.StringIO(table_csv(whole))))
    n_numbers = sum(len(arm.metrics) * 2 for arm in whole.arms) + len(whole.differences)
    assert len(lines) == n_numbers + sum(len(point.metrics) for point in whole.frontier)
    last = lines[-1]
    assert (last["kind"], last["epsilon"]) == ("frontier", "inf")
    gap = next(line for line in lines if line["kind"] == "difference" and line["metric"] == "bertscore_f1")
    assert float(gap["mean"]) == whole.differences[0].mean
    assert {line["domain"] for line in lines} == {"", "one"}


def test_markdown_says_what_the_numbers_are(whole: ComparisonTable) -> None:
    text = table_markdown(whole)
    assert "adapter after the last round in every arm" in text
    assert "Student's t" in text
    assert "NOT PRIVATE" in text
    assert "| none (not private) | federated |" in text
    assert "- FAILED: local, seed 1: no reason" in text


def test_safety_prompts_are_scores_of_their_own() -> None:
    def answers(rate: float) -> SafetyEvaluation:
        one = SafetyPromptScores(
            name="prompts", prompts_sha256="p" * 64, n_unsafe=4, n_safe=0, unsafe_refusal_rate=rate, safe_rate=1.0,
            toxicity_mean=0.0, empty_rate=0.0, repetition_rate=0.0,
        )  # fmt: skip
        return SafetyEvaluation(sets=(one,), scorers=IDENTITY.scorers, seconds=1.0)

    cells = [cell("federated", s, 0.5).model_copy(update={"safety": answers(0.5)}) for s in (1, 2)]
    cells += [cell("fedmentor", s, 0.5, budget=4.0).model_copy(update={"safety": answers(0.75)}) for s in (1, 2)]
    made = table([*cells, cell("local", 1, 0.4)])
    assert "prompts.unsafe_refusal_rate" not in made.arms[0].metrics, "one adapter per domain has no one answer"
    assert made.arms[1].metrics["prompts.unsafe_refusal_rate"].mean == 0.5
    assert "prompts.over_refusal_rate" not in made.arms[1].metrics, "the set has no safe prompts"
    assert "prompts.n_unsafe" not in made.arms[1].metrics
    gap = next(one for one in made.differences if one.metric == "prompts.unsafe_refusal_rate")
    assert (gap.arm, gap.mean) == ("fedmentor", 0.25)
