"""Bootstrap intervals: how far a metric of a set would move had other units been drawn. Pure functions of row scores.

Units (posts) are drawn with replacement, each with all its rows, because rows of one post are not independent. Domains
are strata: each is resampled by itself, and the mean over domains of every resample is taken, as ``combine`` does.
Limits are percentiles of the resampled values. Two adapters on one set meet the same resamples, so their difference is
paired.

An interval is over the set's units alone: neither another seed, nor another draw of DP noise, is in it. Where a rate is
0 or 1 every resample gives the same, and the interval says nothing: with n units, a share of up to 3 / n may still have
gone unseen (the rule of three). A maximum has no interval: resampling cannot exceed it (Bickel and Freedman 1981).

References:
    Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapters 13 and 16; Koehn 2004, "Statistical
    Significance Tests for Machine Translation Evaluation" (paired).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmentor_core.hashing import derive_seed
from fedmentor_core.records import EvaluatedRows, Interval

N_RESAMPLES = 1000
LEVEL = 0.95

Array = npt.NDArray[np.float64]
Replicates = dict[str, Array]
"""By metric, its value in each resample: (N_RESAMPLES,)."""


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """One metric of two adapters on the same units, the first minus the second.

    Attributes:
        mean: the difference on the set itself.
        interval: of the resampled differences.
        p_value: two-sided: twice the smaller share of resamples on either side of 0, never below 2 / (resamples + 1).
        n_units: units that both were scored on.
    """

    mean: float
    interval: Interval
    p_value: float
    n_units: int


def replicates(rows: EvaluatedRows, stratum: str = "") -> Replicates:
    """Every metric of one set in each resample of its units.

    Args:
        rows: row scores.
        stratum: the domain: equal names and numbers of units give equal resamples.
    """
    n_units = len(set(rows.units))
    return _metrics(rows, _resamples(n_units, stratum))


def values(rows: EvaluatedRows) -> dict[str, float]:
    """Every metric of the set itself, by the same arithmetic."""
    found = _metrics(rows, np.ones((1, len(set(rows.units)))))
    return {name: float(one[0]) for name, one in found.items()}


def over_domains(by_domain: Mapping[str, Replicates]) -> Replicates:
    """The mean over domains in each resample; of the metrics that every domain has."""
    parts = list(by_domain.values())
    shared = [name for name in parts[0] if all(name in part for part in parts)] if parts else []
    return {name: np.mean([part[name] for part in parts], axis=0) for name in shared}


def intervals(found: Replicates, level: float = LEVEL) -> dict[str, Interval]:
    """Percentile interval of each metric; none where a resample is not finite."""
    return {name: interval(one, level) for name, one in found.items() if np.isfinite(one).all()}


def interval(resampled: Array, level: float = LEVEL) -> Interval:
    """The middle ``level`` of the resampled values."""
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(scores: Sequence[float], units: Sequence[Any] | None = None, level: float = LEVEL) -> Interval:
    """Of the mean of ``scores``; ``units`` names each score's unit, by default each is its own.

    Raises:
        ValueError: no scores, or lengths differ.
    """
    rows = _rows({"mean": scores}, units, len(scores))
    return interval(replicates(rows)["mean"], level)


def macro_f1_interval(
    gold: Sequence[str], predicted: Sequence[str | None], units: Sequence[Any] | None = None, level: float = LEVEL
) -> Interval:
    """Of ``labels.label_f1``; in each resample over the labels that occur in it.

    Raises:
        ValueError: no examples, or lengths differ.
    """
    rows = _rows({}, units, len(gold), tuple(gold), tuple(one or "" for one in predicted))
    return interval(replicates(rows)["label_f1"], level)


def paired_difference(
    first: Mapping[str, EvaluatedRows], second: Mapping[str, EvaluatedRows], metric: str, level: float = LEVEL
) -> PairedDifference:
    """The difference of two adapters in one metric, as the mean over domains.

    Args:
        first: row scores by domain.
        second: row scores of the same rows.
        metric: a name that ``replicates`` gives for both.
        level: of the interval.

    Raises:
        ValueError: other domains, rows or units, or no such metric.
    """
    if {name: rows.units for name, rows in first.items()} != {name: rows.units for name, rows in second.items()}:
        raise ValueError(f"{metric}: a paired difference needs the same domains, rows and units on both sides")
    here, there = (
        over_domains({name: replicates(rows, name) for name, rows in side.items()}) for side in (first, second)
    )
    if metric not in here or metric not in there:
        raise ValueError(f"{metric}: not measured on both sides; there: {sorted(here.keys() & there.keys())}")
    moved = here[metric] - there[metric]
    tail = min((moved <= 0).sum(), (moved >= 0).sum())
    mean = float(np.mean([values(first[name])[metric] - values(second[name])[metric] for name in first]))
    return PairedDifference(
        mean=mean,
        interval=interval(moved, level),
        p_value=min(1.0, 2 * (float(tail) + 1) / (len(moved) + 1)),
        n_units=sum(len(set(rows.units)) for rows in first.values()),
    )


def _rows(
    means: Mapping[str, Sequence[float]],
    units: Sequence[Any] | None,
    n_rows: int,
    labels: tuple[str, ...] = (),
    answers: tuple[str, ...] = (),
) -> EvaluatedRows:
    if not n_rows:
        raise ValueError("an interval needs at least one example, got 0")
    return EvaluatedRows(
        units=unit_numbers(range(n_rows) if units is None else units),
        labels=labels or ("",) * n_rows,
        answers=answers or ("",) * n_rows,
        means={name: tuple(scores) for name, scores in means.items()},
    )


def unit_numbers(units: Sequence[Any]) -> tuple[int, ...]:
    """Units numbered by first appearance: what a row says of its unit without naming it."""
    numbers: dict[Any, int] = {}
    return tuple(numbers.setdefault(unit, len(numbers)) for unit in units)


def _resamples(n_units: int, stratum: str) -> Array:
    """How often each unit is drawn: (N_RESAMPLES, n_units), each row adding up to n_units."""
    dice = np.random.default_rng(derive_seed("bootstrap", stratum))
    return dice.multinomial(n_units, np.full(n_units, 1 / n_units), size=N_RESAMPLES).astype(np.float64)


def _metrics(rows: EvaluatedRows, counts: Array) -> Replicates:
    """Each metric under each row of unit counts (B, U): everything is a ratio of sums over units."""
    unit = np.asarray(rows.units)
    n_units = counts.shape[1]

    def total(column: npt.ArrayLike) -> Array:
        return counts @ np.bincount(unit, weights=np.asarray(column, dtype=np.float64), minlength=n_units)

    n_rows = total(np.ones(len(unit)))
    found = {name: total(column) / n_rows for name, column in rows.means.items()}
    if any(rows.labels):
        found["label_f1"] = _macro_f1(rows, total)
    if rows.log_losses:
        with np.errstate(over="ignore"):
            found["perplexity"] = np.exp(total(rows.log_losses) / total(rows.n_tokens))
    return found


def _macro_f1(rows: EvaluatedRows, total: Any) -> Array:
    gold, answers = np.asarray(rows.labels), np.asarray(rows.answers)
    labelled = gold != ""
    names = sorted({*gold[labelled], *answers[labelled]} - {""})
    hits = np.stack([total(labelled & (gold == name) & (answers == name)) for name in names])
    occurs = np.stack([total(gold == name) + total(labelled & (answers == name)) for name in names])
    scores = np.divide(2 * hits, occurs, out=np.zeros_like(hits), where=occurs > 0)
    return np.asarray(scores.sum(axis=0) / np.maximum(1, (occurs > 0).sum(axis=0)))
