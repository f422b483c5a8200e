"""One adapter on one domain's gate or test set: generate, score, summarise."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedmentor_core.config import EvaluationConfig
from fedmentor_core.evaluation.generate import generate
from fedmentor_core.evaluation.labels import label_f1, parse_label
from fedmentor_core.evaluation.toxicity import ToxicityScorer
from fedmentor_core.evaluation.utility import UtilityScorer
from fedmentor_core.records import DomainEvaluation, EvaluationMetrics, Metrics, Sample, ScorerIdentities


@dataclass(frozen=True)
class EvaluationSet:
    """Rows of one domain's gate or test split, with tokenised prompts."""

    domain: str
    split: Literal["gate", "test"]
    rows: Sequence[Mapping[str, Any]]
    prompts: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Scorers:
    """Loaded once per process."""

    utility: UtilityScorer
    toxicity: ToxicityScorer
    safe_threshold: float

    @classmethod
    def load(cls, config: EvaluationConfig) -> "Scorers":
        """Load both scorers.

        Raises:
            BackboneError: a scorer's model is not found.
        """
        return cls(UtilityScorer(config.bertscore), ToxicityScorer(config.toxicity), config.toxicity.safe_threshold)

    @property
    def identities(self) -> ScorerIdentities:
        """Names and digests for the report."""
        utility, toxicity = self.utility.identity, self.toxicity.identity
        stemmed = ", stemmed" if utility.rouge_stemmer else ""
        return ScorerIdentities(
            bertscore=f"{utility.model} layer {utility.num_layers}, bert-score {utility.bert_score_version} "
            f"({utility.bert_score_hash}), weights sha256 {utility.weights_sha256[:16]}",
            rouge=f"rougeL F-measure{stemmed}, rouge-score {utility.rouge_score_version}",
            toxicity=f"{toxicity.model} ({toxicity.architecture}), detoxify {toxicity.detoxify_version}, label "
            f"{toxicity.label}, weights sha256 {toxicity.weights_sha256[:16]}",
            safe_threshold=self.safe_threshold,
        )


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
    """Score greedy outputs against references.

    An empty output scores 0 in utility, answers no label, and is not unsafe; ``empty_rate`` makes it visible.
    """
    started = time.perf_counter()
    outputs = generate(
        model,
        tokenizer,
        data.prompts,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        device=device,
        on_batch=on_batch,
    )
    references = [str(row["response"]) for row in data.rows]
    utility = scorers.utility.score(outputs, references)
    toxicity = scorers.toxicity.score(outputs)
    labelled = [index for index, row in enumerate(data.rows) if row["label"]]
    count = len(outputs)
    metrics = Metrics(
        bertscore_f1=sum(score.bertscore_f1 for score in utility) / count,
        rouge_l=sum(score.rouge_l for score in utility) / count,
        label_f1=label_f1(
            [str(data.rows[index]["label"]) for index in labelled], [parse_label(outputs[index]) for index in labelled]
        )
        if labelled
        else 0.0,
        safe_rate=sum(score < config.toxicity.safe_threshold for score in toxicity) / count,
        toxicity_mean=sum(toxicity) / count,
        toxicity_max=max(toxicity),
        empty_rate=sum(not output for output in outputs) / count,
        n_examples=count,
    )
    shown = range(min(config.samples_in_report, count)) if keep_samples else range(0)
    samples = tuple(
        Sample(
            domain=data.domain,
            post=str(data.rows[index]["post"]),
            question=str(data.rows[index]["question"]),
            reference=references[index],
            output=outputs[index],
            bertscore_f1=utility[index].bertscore_f1,
            rouge_l=utility[index].rouge_l,
            toxicity=toxicity[index],
        )
        for index in shown
    )
    return DomainEvaluation(
        domain=data.domain,
        split=data.split,
        metrics=metrics,
        samples=samples,
        scorers=scorers.identities,
        seconds=time.perf_counter() - started,
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
