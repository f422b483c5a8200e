"""One adapter on one domain's public gate or test set: score every row, summarise. And domains together."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from fedmentor_core.config import EvaluationConfig
from fedmentor_core.evaluation.labels import label_f1
from fedmentor_core.evaluation.scores import EvaluationSet, RowScores, Scorers, score_rows
from fedmentor_core.records import DomainEvaluation, EvaluationMetrics, Metrics, Sample


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
) -> DomainEvaluation:
    """Score greedy outputs against references. For a public set: what it returns is exact, not noised.

    An empty output scores 0 in utility, answers no label, and is not unsafe; ``empty_rate`` makes it visible.
    """
    started = time.perf_counter()
    scored = score_rows(model, tokenizer, data, scorers, config, device=device, on_batch=on_batch)
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
    return DomainEvaluation(
        domain=data.domain,
        split=data.split,
        metrics=metrics_of_rows(scored),
        samples=samples,
        scorers=scorers.identities,
        seconds=time.perf_counter() - started,
    )


def metrics_of_rows(scored: Sequence[RowScores]) -> Metrics:
    """Means over rows; label F1 over the rows that have a label, 0 where none has."""
    count = len(scored)
    labelled = [one for one in scored if one.label]
    return Metrics(
        bertscore_f1=sum(one.bertscore_f1 for one in scored) / count,
        rouge_l=sum(one.rouge_l for one in scored) / count,
        label_f1=label_f1([one.label for one in labelled], [one.answer for one in labelled]) if labelled else 0.0,
        safe_rate=sum(one.safe for one in scored) / count,
        toxicity_mean=sum(one.toxicity for one in scored) / count,
        toxicity_max=max(one.toxicity for one in scored),
        empty_rate=sum(not one.output for one in scored) / count,
        n_examples=count,
    )


def combine(evaluations: Sequence[DomainEvaluation]) -> EvaluationMetrics:
    """Mean over domains, each counting the same; ``toxicity_max`` is the maximum.

    Raises:
        ValueError: nothing to combine.
    """
    if not evaluations:
        raise ValueError("Expected at least one domain's evaluation.")
    parts = {evaluation.domain: evaluation.metrics for evaluation in evaluations}

    def mean(name: str) -> float:
        return float(sum(getattr(metrics, name) for metrics in parts.values()) / len(parts))

    maxima = [metrics.toxicity_max for metrics in parts.values()]
    return EvaluationMetrics(
        **{
            name: mean(name)
            for name in ("bertscore_f1", "rouge_l", "label_f1", "safe_rate", "toxicity_mean", "empty_rate")
        },
        toxicity_max=None if None in maxima else max(value for value in maxima if value is not None),
        n_examples=sum(metrics.n_examples for metrics in parts.values()),
        by_domain=parts,
    )
