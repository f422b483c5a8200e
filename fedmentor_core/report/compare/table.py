"""The table and the differences, as cells that a reader can compare."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from fedmentor_core.compare.records import ArmResult, ComparisonTable, Difference, Estimate
from fedmentor_core.report import words
from fedmentor_core.report.compare.arms import number_of_seeds

HEADLINE = ("bertscore_f1", "rouge_l", "label_f1", "safe_rate", "toxicity_mean", "toxicity_max")
"""Metrics of the headline table: as many as have room beside each other."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One mean, its interval, and whether it is the best of its column."""

    value: str
    interval: str = ""
    best: bool = False


@dataclass(frozen=True, slots=True)
class ArmRow:
    """One arm's line."""

    name: str
    title: str
    terms: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class DifferenceCell:
    """One paired difference; ``judgement`` is better or worse where the interval leaves out zero, else empty."""

    value: str
    interval: str
    p_value: str
    judgement: str


@dataclass(frozen=True, slots=True)
class DifferenceRow:
    """One arm against another, metric by metric; None where the table has no difference."""

    name: str
    against: str
    seeds: str
    cells: tuple[DifferenceCell | None, ...]


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """Some of the metrics: every arm's, and the differences between arms."""

    infos: tuple[words.MetricInfo, ...]
    rows: tuple[ArmRow, ...]
    differing: tuple[words.MetricInfo, ...]
    differences: tuple[DifferenceRow, ...]


def score_tables(table: ComparisonTable) -> tuple[ScoreTable, ScoreTable]:
    """The headline table and that of all further metrics."""
    headline, further = (_score_table(table, infos) for infos in metric_infos(table))
    return headline, further


def _score_table(table: ComparisonTable, infos: Sequence[words.MetricInfo]) -> ScoreTable:
    differing = differing_infos(table, infos)
    differences = difference_rows(table, differing) if differing else []
    return ScoreTable(tuple(infos), tuple(arm_rows(table, infos)), tuple(differing), tuple(differences))


def metric_infos(table: ComparisonTable) -> tuple[list[words.MetricInfo], list[words.MetricInfo]]:
    """The metrics that any arm has, as (those of the headline table, further ones)."""
    present = dict.fromkeys(key for arm in table.arms for key in arm.metrics)
    known = [info for info in words.METRIC.values() if info.key in present]
    known += [_unknown(key) for key in present if key not in words.METRIC]
    return [info for info in known if info.key in HEADLINE], [info for info in known if info.key not in HEADLINE]


def arm_rows(table: ComparisonTable, infos: Sequence[words.MetricInfo]) -> list[ArmRow]:
    """A line per arm, with the best mean of every known metric marked (more than one where they tie as shown)."""
    best = {info.key: _best(table.arms, info) for info in infos}
    return [
        ArmRow(
            arm.name,
            arm.title,
            f"{_privacy(arm)}, {number_of_seeds(len(arm.seeds))}",
            tuple(_cell(arm.metrics.get(info.key), info, best[info.key]) for info in infos),
        )
        for arm in table.arms
    ]


def difference_rows(table: ComparisonTable, infos: Sequence[words.MetricInfo]) -> list[DifferenceRow]:
    """A line per pair of arms, those against ``table.against`` first."""
    pairs = list(dict.fromkeys((one.arm, one.against) for one in table.differences))
    by_place = {(one.arm, one.against, one.metric): one for one in table.differences}
    rows = []
    for arm, against in sorted(pairs, key=lambda pair: pair[1] != table.against):
        found = [by_place.get((arm, against, info.key)) for info in infos]
        cells = tuple(None if one is None else _difference(one, info) for one, info in zip(found, infos, strict=True))
        seeds = max((one.n for one in found if one is not None), default=0)
        rows.append(DifferenceRow(arm, against, number_of_seeds(seeds), cells))
    return rows


def half_width(interval: tuple[float, float] | None) -> float | None:
    """Half of a 95 % interval: what stands after the ±."""
    return None if interval is None else (interval[1] - interval[0]) / 2


def show_p(p_value: float | None) -> str:
    """A p-value at the precision that means something."""
    if p_value is None or not isfinite(p_value):
        return ""
    return "p < 0.001" if p_value < 0.001 else f"p = {words.significant(p_value, 2)}"


def differing_infos(table: ComparisonTable, infos: Sequence[words.MetricInfo]) -> list[words.MetricInfo]:
    """The metrics in which any two arms differ at all: a column of zeros tells nobody anything."""
    moved = {one.metric for one in table.differences if one.mean or any(one.ci95 or ())}
    return [info for info in infos if info.key in moved]


def signed(info: words.MetricInfo, value: float) -> str:
    """A difference, without its unit, to at least one digit more than most metrics: margins are small."""
    text = words.number(100 * value, 2) if info.percent else words.number(value, max(info.digits, 4))
    return text if text.startswith(words.MINUS) or value == 0 or not text.strip("0.") else f"+{text}"


def _privacy(arm: ArmResult) -> str:
    if not arm.private:
        return "not private"
    return f"private, ε ≤ {words.significant(max(arm.epsilon_spent.values()))}" if arm.epsilon_spent else "private"


def _unknown(key: str) -> words.MetricInfo:
    return words.MetricInfo(key, key.replace("_", " "), "higher", "as the evaluation reports it")


def _best(arms: Sequence[ArmResult], info: words.MetricInfo) -> str | None:
    """The best mean as shown; None for a metric whose direction is not known, or where all arms are alike."""
    means = [arm.metrics[info.key].mean for arm in arms if info.key in arm.metrics]
    means = [mean for mean in means if isfinite(mean)]
    if info.key not in words.METRIC or len({info.show(mean) for mean in means}) < 2:
        return None
    return info.show(max(means) if info.better == "higher" else min(means))


def _cell(estimate: Estimate | None, info: words.MetricInfo, best: str | None) -> Cell:
    if estimate is None:
        return Cell(words.NONE)
    half = half_width(estimate.ci95)
    value = info.show(estimate.mean)
    return Cell(value, "" if half is None else f"± {info.show(half)}", value == best)


def _difference(one: Difference, info: words.MetricInfo) -> DifferenceCell:
    value, p_value = signed(info, one.mean), show_p(one.p_value)
    if one.ci95 is None:
        return DifferenceCell(value, "", p_value, "")
    low, high = one.ci95
    better = (low > 0) == (info.better == "higher")
    judgement = ("better" if better else "worse") if (low > 0 or high < 0) and info.key in words.METRIC else ""
    return DifferenceCell(value, f"{signed(info, low)} to {signed(info, high)}", p_value, judgement)
