"""One domain's lifetime epsilon by round, drawn: what was planned, spent and kept back, under its budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite

from fedmentor_core.report.svg import (
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    Format,
    Scale,
    colour_class,
    dash_class,
    marker,
    num,
    open_chart,
    round_words,
    ticks,
    x_axis,
    y_axis,
)

Values = tuple[float | None, ...]
_CROP_BELOW = 0.3
"""A run whose share is a smaller part of what was left is drawn alone, with the budget above the picture."""
_MARGIN = 0.2
"""Room under the lowest value, as a part of the values' span."""


@dataclass(frozen=True, slots=True)
class BudgetPath:
    """Lifetime epsilon of one domain. Place 0 of each line is before this run, place k after its k-th round.

    Attributes:
        name: the domain.
        slot: fixes its colour and marker.
        budget: lifetime epsilon.
        planned: when every round keeps to the planned noise.
        spent: what the ledger was really charged, as far as the run came.
        lowered: when the rule lowers the noise at every chance; empty where it never may.
        share: epsilon up to which this run may go; None where that is the whole budget.
    """

    name: str
    slot: int
    budget: float
    planned: Values
    spent: Values
    lowered: Values = ()
    share: float | None = None

    @property
    def limit(self) -> float:
        """Epsilon that this run may not pass."""
        return self.budget if self.share is None else self.share


def budget_chart(path: BudgetPath, *, alt: str, show: Format) -> str:
    """The lines of ``path`` on one scale, which starts near the lowest value so that rounds can be told apart.

    A place that lies under the scale, such as a fresh account's zero, is left out.
    """
    n = max(len(path.planned), len(path.spent))
    lines = (path.planned, path.spent, path.lowered)
    levels = [value for line in lines for value in _known(line) if value > 0] or [0.0]
    lowest = min(levels)
    cropped = path.limit - lowest < _CROP_BELOW * (path.budget - lowest)
    high = max([path.limit + _MARGIN * (path.limit - lowest) if cropped else path.budget, *levels])
    low = lowest - _MARGIN * (high - lowest)
    grid = ticks(max(0.0, low), high)
    scale = Scale(grid[0], grid[-1])
    xs = [LEFT + 8 + (WIDTH - LEFT - RIGHT - 16) * i / max(n - 1, 1) for i in range(n)]
    parts = [open_chart(alt, HEIGHT), *y_axis(grid, scale, show), *x_axis([str(i) for i in range(n)], xs)]
    parts += _reserve(path, scale, show)
    if cropped:
        above = escape(f"↑ budget {show(path.budget)}")
        parts.append(f'<text class="boundtext" x="{num(WIDTH - RIGHT)}" y="11">{above}</text>')
    else:
        parts += _limit("budget", path.budget, f"budget {show(path.budget)}", scale, above=True)
    if path.share is not None:
        parts += _limit("share", path.share, f"this run: up to {show(path.share)}", scale, above=cropped)
    planned, spent, lowered = (tuple(v if v is not None and v >= scale.low else None for v in line) for line in lines)
    parts.append(f'<g class="{colour_class(path.slot)}">')
    parts.append(_line("lowered", lowered, xs, scale))
    parts.append(_line(f"ln {dash_class(path.slot)} spent", spent, xs, scale))
    for i, value in _points(spent):
        tip = escape(f"{path.name}, spent, {_when(i)}: {show(value)}")
        parts.append(f"<g><title>{tip}</title>{marker(path.slot, xs[i], scale(value), 5.0 if n <= 25 else 3.0)}</g>")
    parts.append(_line("planned", planned, xs, scale))
    for i, value in _points(planned):
        tip = escape(f"{path.name}, planned, {_when(i)}: {show(value)}")
        circle = (
            f'<circle class="planneddot" cx="{num(xs[i])}" cy="{num(scale(value))}" r="{2.5 if n <= 25 else 1.5}"/>'
        )
        parts.append(f"<g><title>{tip}</title>{circle}</g>")
    parts.append("</g></svg>")
    return "".join(parts)


def key(kind: str) -> str:
    """Legend key of ``spent``, ``planned``, ``lowered``, ``reserve``, ``budget`` or ``share``."""
    inside = {
        "spent": f'<path class="ln spent" d="M1 7H29"/>{marker(0, 15, 7)}',
        "planned": '<path class="planned" d="M1 7H29"/><circle class="planneddot" cx="15" cy="7" r="2.5"/>',
        "reserve": '<rect class="reserve" x="1" y="1" width="28" height="12"/>',
    }.get(kind, f'<path class="{kind}" d="M1 7H29"/>')
    return f'<svg class="swatch call" viewBox="0 0 30 14" aria-hidden="true">{inside}</svg>'


def _reserve(path: BudgetPath, scale: Scale, show: Format) -> list[str]:
    """The band between where the plan ends and what this run may not pass."""
    end = next(reversed(_known(path.planned)), None)
    if end is None or end >= path.limit:
        return []
    y, height = scale(path.limit), scale(end) - scale(path.limit)
    tip = escape(f"{path.name}, kept back: from {show(end)} to {show(path.limit)}")
    return [
        f'<rect class="reserve" x="{num(LEFT)}" y="{num(y)}" width="{num(WIDTH - LEFT - RIGHT)}" '
        f'height="{num(height)}"><title>{tip}</title></rect>'
    ]


def _limit(kind: str, value: float, label: str, scale: Scale, *, above: bool) -> list[str]:
    y = scale(value)
    end, x = ("", WIDTH - RIGHT) if kind == "budget" else (" start", LEFT + 4)
    return [
        f'<path class="{kind}" d="M{num(LEFT)} {num(y)}H{num(WIDTH - RIGHT)}"/>',
        f'<text class="boundtext{end}" x="{num(x)}" y="{num(y - 5 if above else y + 14)}">{escape(label)}</text>',
    ]


def _line(css: str, values: Values, xs: Sequence[float], scale: Scale) -> str:
    d, previous = "", -2
    for i, value in _points(values):
        d += f"{'L' if i == previous + 1 else 'M'}{num(xs[i])} {num(scale(value))}"
        previous = i
    return f'<path class="{css}" d="{d}"/>' if d else ""


def _points(values: Values) -> list[tuple[int, float]]:
    return [(i, value) for i, value in enumerate(values) if value is not None and isfinite(value)]


def _known(values: Values) -> list[float]:
    return [value for _, value in _points(values)]


def _when(i: int) -> str:
    return f"after {round_words(str(i))}" if i else "before this run"
