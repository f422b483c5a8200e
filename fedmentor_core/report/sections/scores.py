"""Scores as the reader sees them: value, noise, difference from the untrained model, and whether it is better."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

from fedmentor_core.records import EvaluationMetrics, Interval, Metrics
from fedmentor_core.report import words
from fedmentor_core.report.metric_noise import MetricNoise

_NEVER_NOISED = "toxicity_max"
"""A maximum cannot be released with noise that hides one unit: it is exact (of a public set) or not released."""


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one set of outputs, against the untrained model.

    ``noise`` is its standard deviation, of a private set; ``interval`` is its bootstrap interval, of a public one.
    """

    label: str
    meaning: str
    value: str
    before: str
    difference: str
    judgement: str
    noise: str = ""
    interval: str = ""


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """A line of a score table."""

    name: str
    n_examples: int
    scores: tuple[Score, ...]


@dataclass(frozen=True, slots=True)
class Detail:
    """A line of the table of all metrics: the final model's score and the untrained one's interval."""

    score: Score
    interval_before: str


def scores(
    metrics: Metrics,
    before: Metrics | None,
    noise_std: float | None = None,
    infos: Sequence[words.MetricInfo] = words.METRICS,
) -> tuple[Score, ...]:
    """Every metric of one set.

    Args:
        metrics: the scores.
        before: the untrained model's on the same set.
        noise_std: standard deviation of the noise in each released metric of the set, and independently in
            ``before``'s; None for a public set.
        infos: the metrics to show.
    """
    found = []
    for info in infos:
        value, base = words.get(metrics, info.key), words.get(before, info.key)
        difference = None if value is None or base is None else value - base
        std = None if info.key == _NEVER_NOISED else noise_std
        found.append(
            Score(
                info.label,
                info.meaning,
                info.show(value) if value is not None else "not released",
                "" if before is None else info.show(base),
                info.show_difference(difference),
                _judge(info, difference, std),
                "" if std is None or value is None else f"± {info.show(std)}",
                shown_interval(info, metrics.intervals),
            )
        )
    return tuple(found)


def score_rows(metrics: EvaluationMetrics, before: EvaluationMetrics | None, noise: MetricNoise) -> list[ScoreRow]:
    """The mean over domains first, then each domain."""
    mean_std = noise.of_mean(list(metrics.by_domain))
    rows = [ScoreRow("all domains", metrics.n_examples, scores(metrics, before, mean_std))]
    for name, own in metrics.by_domain.items():
        base = None if before is None else before.by_domain.get(name)
        rows.append(ScoreRow(name, own.n_examples, scores(own, base, noise.of_domain(name))))
    return rows


def detail_rows(metrics: EvaluationMetrics | None, before: EvaluationMetrics | None) -> list[Detail]:
    """Every metric of a public set over all domains, the untrained model beside it, each with its interval."""
    if metrics is None or metrics.intervals is None:
        return []
    known = [info for info in words.METRIC.values() if words.get(metrics, info.key) is not None]
    if metrics.bertscore_f1 == metrics.bertscore_f1_raw:  # the raw score has a line already
        known = [info for info in known if info.key != "bertscore_f1_raw"]
    shown = scores(metrics, before, infos=known)
    intervals = None if before is None else before.intervals
    return [Detail(score, shown_interval(info, intervals)) for info, score in zip(known, shown, strict=True)]


def shown_interval(info: words.MetricInfo, intervals: Mapping[str, Interval] | None) -> str:
    """Low to high; empty where there is none."""
    if intervals is None or info.key not in intervals:
        return ""
    low, high = intervals[info.key]
    return f"{info.show(low)} to {info.show(high)}"


def _judge(info: words.MetricInfo, difference: float | None, noise_std: float | None) -> str:
    """Better, worse or the same; 'unclear' where two noised scores lie within two standard deviations."""
    if difference is not None and noise_std is not None and abs(difference) < 2 * sqrt(2) * noise_std:
        return "unclear"
    return info.judge(difference)
