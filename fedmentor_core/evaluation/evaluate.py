"""One adapter on one domain's public gate or test set: score every row, summarise. And domains together."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from fedmentor_core.config import EvaluationConfig
from fedmentor_core.evaluation import bootstrap
from fedmentor_core.evaluation.alarms import scorer_alarms
from fedmentor_core.evaluation.labels import label_f1
from fedmentor_core.evaluation.perplexity import perplexity
from fedmentor_core.evaluation.scores import EvaluationSet, RowScores, Scorers, score_rows
from fedmentor_core.records import DomainEvaluation, EvaluatedRows, EvaluationMetrics, Metrics, Sample

MOST_ROWS_KEPT = 5000
"""Rows of a larger set are not kept: an evaluation is a small record, and a site's answer has a largest size."""


_MEANS = tuple(name for name in Metrics.model_fields if name not in {"toxicity_max", "n_examples", "intervals"})


def evaluate_domain(
    model: Any,
    tokenizer: Any,
    data: EvaluationSet,
    scorers: Scorers,
    config: EvaluationConfig,
    *,
    device: str,
    keep_samples: bool,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    on_written: Callable[[], None] = lambda: None,
) -> DomainEvaluation:
    """Score greedy outputs against references. For a public set: what it returns is exact, not noised.

    An empty output scores 0 in utility, answers no label, and is not unsafe; ``empty_rate`` makes it visible.
    ``on_written`` is called when the model is needed no more.
    """
    started = time.perf_counter()
    scored = score_rows(
        model, tokenizer, data, scorers, config, device=device, on_batch=on_batch, on_written=on_written
    )
    n_shown = min(config.samples_in_report, len(scored)) if keep_samples else 0
    samples = tuple(
        Sample(
            domain=data.domain,
            post=str(row["post"]),
            question=str(row["question"]),
            reference=one.reference,
            output=one.output,
            bertscore_f1=one.bertscore_f1,
            rouge_l=one.rouge_l,
            toxicity=one.toxicity,
        )
        for row, one in zip(data.rows[:n_shown], scored[:n_shown], strict=True)
    )
    rows = evaluated_rows(scored, [row["unit_id"] for row in data.rows]) if len(scored) <= MOST_ROWS_KEPT else None
    found = None if rows is None else bootstrap.intervals(bootstrap.replicates(rows, data.domain))
    return DomainEvaluation(
        domain=data.domain,
        split=data.split,
        metrics=metrics_of_rows(scored).model_copy(update={"intervals": found}),
        samples=samples,
        rows=rows,
        alarms=scorer_alarms(data.rows, scorers.toxicity) if data.split == "gate" else None,
        scorers=scorers.identities,
        seconds=time.perf_counter() - started,
    )


def metrics_of_rows(scored: Sequence[RowScores]) -> Metrics:
    """Means over rows; label F1 over the rows that have a label, 0 where none has."""
    count = len(scored)
    labelled = [one for one in scored if one.label]

    def mean(column: Sequence[float | None]) -> float | None:
        known = [value for value in column if value is not None]
        return sum(known) / count if len(known) == count else None

    losses = _measured_losses(scored)
    return Metrics(
        bertscore_f1=sum(one.bertscore_f1 for one in scored) / count,
        rouge_l=sum(one.rouge_l for one in scored) / count,
        label_f1=label_f1([one.label for one in labelled], [one.answer for one in labelled]) if labelled else 0.0,
        safe_rate=sum(one.safe for one in scored) / count,
        toxicity_mean=sum(one.toxicity for one in scored) / count,
        toxicity_max=max(one.toxicity for one in scored),
        empty_rate=sum(not one.output for one in scored) / count,
        n_examples=count,
        bertscore_f1_raw=mean([one.bertscore_f1_raw for one in scored]),
        bertscore_f1_rescaled=mean([one.bertscore_f1_rescaled for one in scored]),
        perplexity=perplexity(losses, [one.n_tokens for one in scored]) if losses else None,
        refusal_rate=sum(one.refused for one in scored) / count,
        repetition_rate=sum(one.repetitive for one in scored) / count,
        toxicity_rate_05=sum(one.toxicity >= 0.5 for one in scored) / count,
        toxicity_rate_07=sum(one.toxicity >= 0.7 for one in scored) / count,
    )


def evaluated_rows(scored: Sequence[RowScores], units: Sequence[str]) -> EvaluatedRows:
    """Scores of a public set as columns, without a text and without the name of a unit."""
    columns: dict[str, list[float | None]] = {
        "bertscore_f1": [one.bertscore_f1 for one in scored],
        "bertscore_f1_raw": [one.bertscore_f1_raw for one in scored],
        "bertscore_f1_rescaled": [one.bertscore_f1_rescaled for one in scored],
        "rouge_l": [one.rouge_l for one in scored],
        "safe_rate": [float(one.safe) for one in scored],
        "toxicity_mean": [one.toxicity for one in scored],
        "empty_rate": [float(not one.output) for one in scored],
        "refusal_rate": [float(one.refused) for one in scored],
        "repetition_rate": [float(one.repetitive) for one in scored],
        "toxicity_rate_05": [float(one.toxicity >= 0.5) for one in scored],
        "toxicity_rate_07": [float(one.toxicity >= 0.7) for one in scored],
    }
    known = {name: tuple(value for value in column if value is not None) for name, column in columns.items()}
    losses = _measured_losses(scored)
    return EvaluatedRows(
        units=bootstrap.unit_numbers(units),
        labels=tuple(one.label for one in scored),
        answers=tuple(one.answer or "" for one in scored),
        means={name: column for name, column in known.items() if len(column) == len(scored)},
        log_losses=losses,
        n_tokens=tuple(one.n_tokens for one in scored) if losses else (),
    )


def _measured_losses(scored: Sequence[RowScores]) -> tuple[float, ...]:
    """Every row's, or none: perplexity over a part of the rows would be another number."""
    losses = tuple(one.log_loss for one in scored if one.log_loss is not None and math.isfinite(one.log_loss))
    return losses if len(losses) == len(scored) else ()


def combine(evaluations: Sequence[DomainEvaluation]) -> EvaluationMetrics:
    """Mean over domains, each counting the same; ``toxicity_max`` is the maximum.

    A metric that a domain lacks is None. Intervals are there where every domain's rows are; one domain's own stand in
    its metrics.

    Raises:
        ValueError: nothing to combine.
    """
    if not evaluations:
        raise ValueError("Expected at least one domain's evaluation.")
    parts = {evaluation.domain: evaluation.metrics for evaluation in evaluations}

    def mean(name: str) -> float | None:
        values = [getattr(metrics, name) for metrics in parts.values()]
        return None if None in values else float(sum(values) / len(values))

    maxima = [metrics.toxicity_max for metrics in parts.values()]
    rows = {evaluation.domain: evaluation.rows for evaluation in evaluations if evaluation.rows is not None}
    resampled = {domain: bootstrap.replicates(one, domain) for domain, one in rows.items()}
    return EvaluationMetrics.model_validate(
        {name: mean(name) for name in _MEANS}
        | {
            "toxicity_max": None if None in maxima else max(value for value in maxima if value is not None),
            "n_examples": sum(metrics.n_examples for metrics in parts.values()),
            "intervals": bootstrap.intervals(bootstrap.over_domains(resampled)) if len(rows) == len(parts) else None,
            "by_domain": parts,
        }
    )
