"""The privacy-utility frontier: a metric against one budget that every domain shares, on a logarithmic axis."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite, log10

from fedmentor_core.compare.records import ComparisonTable, Estimate, FrontierPoint
from fedmentor_core.report import words
from fedmentor_core.report.compare.arms import Arms
from fedmentor_core.report.compare.table import half_width
from fedmentor_core.report.plots import Figure
from fedmentor_core.report.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    colour_class,
    dash_class,
    error_bar,
    marker,
    num,
    open_chart,
    ticks,
    y_axis,
)

METRICS = ("bertscore_f1", "rouge_l", "label_f1", "safe_rate")
_WITHOUT = 52.0
"""Room at the right for infinity, which has no place on a logarithmic axis."""
_LEAST_SPAN = 0.02


@dataclass(frozen=True, slots=True)
class FrontierRow:
    """The numbers behind one point."""

    arm: str
    epsilon: str
    cells: tuple[str, ...]


def figures(table: ComparisonTable, arms: Arms) -> list[Figure]:
    """A figure per metric that any point has."""
    found = []
    for key in METRICS:
        points = [point for point in _ordered(table.frontier) if key in point.metrics]
        if points:
            info = words.METRIC[key]
            note = f"{info.meaning[0].upper()}{info.meaning[1:]}. {info.better.capitalize()} is better."
            found.append(Figure(info.label, note, _chart(points, info, arms)))
    return found


def rows(table: ComparisonTable, arms: Arms) -> list[FrontierRow]:
    """The numbers behind the figures."""
    infos = shown_metrics(table)
    return [
        FrontierRow(
            point.arm,
            show_epsilon(point.epsilon),
            tuple(_estimate(point.metrics.get(info.key), info) for info in infos),
        )
        for point in sorted(_ordered(table.frontier), key=lambda point: arms.slot(point.arm))
    ]


def shown_metrics(table: ComparisonTable) -> list[words.MetricInfo]:
    """The metrics of the figures."""
    return [words.METRIC[key] for key in METRICS if any(key in point.metrics for point in table.frontier)]


def show_epsilon(epsilon: float | None) -> str:
    """A budget; none is infinite."""
    return "∞" if epsilon is None else words.significant(epsilon)


def _ordered(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    return sorted(points, key=lambda point: float("inf") if point.epsilon is None else point.epsilon)


def _estimate(estimate: Estimate | None, info: words.MetricInfo) -> str:
    if estimate is None:
        return words.NONE
    half = half_width(estimate.ci95)
    return info.show(estimate.mean) + ("" if half is None else f" ± {info.show(half)}")


class _Budgets:
    """Places of budgets on the horizontal axis."""

    def __init__(self, points: Sequence[FrontierPoint]) -> None:
        self.finite = sorted({point.epsilon for point in points if point.epsilon is not None})
        self.infinite = any(point.epsilon is None for point in points)
        self.end = WIDTH - RIGHT - (_WITHOUT if self.infinite else 0.0)

    def __call__(self, epsilon: float | None) -> float:
        if epsilon is None:
            return WIDTH - RIGHT - 16.0
        start, width = LEFT + 16.0, self.end - LEFT - 32.0
        if len(self.finite) < 2:
            return start + width / 2
        low, high = log10(self.finite[0]), log10(self.finite[-1])
        return start + width * (log10(epsilon) - low) / (high - low)

    def axis(self) -> list[str]:
        """Every budget that was run, as far as there is room, and infinity behind a break."""
        parts, last = [], -1e9
        foot = HEIGHT - BOTTOM + 17
        for epsilon in self.finite:
            x = self(epsilon)
            parts.append(f'<path class="grid" d="M{num(x)} {num(HEIGHT - BOTTOM)}v4"/>')
            if x - last >= 22.0:
                parts.append(f'<text class="xtick" x="{num(x)}" y="{num(foot)}">{show_epsilon(epsilon)}</text>')
                last = x
        if self.infinite:
            parts.append(f'<path class="bound" d="M{num(self.end)} {num(TOP)}V{num(HEIGHT - BOTTOM)}"/>')
            parts.append(f'<text class="xtick" x="{num(self(None))}" y="{num(foot)}">∞</text>')
        parts.append(
            f'<text class="xname" x="{num(WIDTH - RIGHT)}" y="{num(HEIGHT - 3)}">ε per domain, log scale</text>'
        )
        return parts


def _chart(points: Sequence[FrontierPoint], info: words.MetricInfo, arms: Arms) -> str:
    estimates = [(point, point.metrics[info.key]) for point in points if isfinite(point.metrics[info.key].mean)]
    if not estimates:
        return ""
    ends = [end for _, one in estimates for end in (one.mean, *(one.ci95 or ())) if isfinite(end)]
    middle, half = (min(ends) + max(ends)) / 2, max(max(ends) - min(ends), _LEAST_SPAN) / 2
    above = max(0.0, middle + half - max(1.0, *ends))  # no metric here exceeds 1, so the axis does not either
    grid = ticks(middle - half - above, middle + half - above)
    scale, place = Scale(grid[0], grid[-1]), _Budgets(points)
    names = [name for name in arms.names if any(point.arm == name for point, _ in estimates)]
    told = "; ".join(f"{p.arm} at ε {show_epsilon(p.epsilon)}: {_estimate(e, info)}" for p, e in estimates)
    parts = [open_chart(f"{info.label} on the test set against epsilon, logarithmic. {told}.", HEIGHT)]
    parts += [*y_axis(grid, scale, info.show), *place.axis()]
    for k, name in enumerate(names):
        own = [(point, one) for point, one in estimates if point.arm == name]
        aside = 5.0 * (k - (len(names) - 1) / 2)  # so that whiskers do not cover each other
        line = [f"{num(place(p.epsilon) + aside)} {num(scale(e.mean))}" for p, e in own if p.epsilon is not None]
        slot = arms.slot(name)
        parts.append(f'<g class="{colour_class(slot)}">')
        if len(line) > 1:
            parts.append(f'<path class="ln {dash_class(slot)}" d="M{"L".join(line)}"/>')
        for point, one in own:
            x = place(point.epsilon) + aside
            tip = escape(f"{name}, ε {show_epsilon(point.epsilon)}: {_estimate(one, info)}")
            parts.append(f"<g><title>{tip}</title>{_whisker(x, one.ci95, scale)}{marker(slot, x, scale(one.mean))}</g>")
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def _whisker(x: float, interval: tuple[float, float] | None, scale: Scale) -> str:
    if interval is None or not all(map(isfinite, interval)):
        return ""
    return error_bar(x, scale(interval[1]), scale(interval[0]))
