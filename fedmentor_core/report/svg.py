"""Small charts as inline SVG strings, drawn by hand: no fonts to ship, same bytes for the same numbers.

Colours are CSS classes (``c0`` ... ``c5``, ``call`` for the overall line): one chart serves light, dark and
print. A domain's slot fixes its colour, dash and marker, so that colour is never the only difference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from math import floor, isfinite, log10

N_COLOURS = 6
WIDTH, HEIGHT = 400.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 12.0, 14.0, 34.0
Format = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Series:
    """One line, or one colour of bars. ``slot`` None is the overall line."""

    name: str
    values: tuple[float | None, ...]
    slot: int | None = None
    rings: frozenset[int] = field(default=frozenset())


@dataclass(frozen=True, slots=True)
class Bound:
    """A dashed horizontal line, such as a gate threshold."""

    value: float
    label: str


def colour_class(slot: int | None) -> str:
    """CSS class that sets the colour of ``slot``."""
    return "call" if slot is None else f"c{slot % N_COLOURS}"


def marker(slot: int | None, x: float, y: float, size: float = 4.0) -> str:
    """The slot's marker as a path around (x, y)."""
    s, d = size, 1.4 * size
    shapes = (
        f"M{_n(x - s)} {_n(y)}a{_n(s)} {_n(s)} 0 1 0 {_n(2 * s)} 0a{_n(s)} {_n(s)} 0 1 0 {_n(-2 * s)} 0z",
        f"M{_n(x - s)} {_n(y - s)}h{_n(2 * s)}v{_n(2 * s)}h{_n(-2 * s)}z",
        f"M{_n(x)} {_n(y - 1.3 * s)}L{_n(x + 1.2 * s)} {_n(y + s)}H{_n(x - 1.2 * s)}z",
        f"M{_n(x)} {_n(y - d)}L{_n(x + d)} {_n(y)}L{_n(x)} {_n(y + d)}L{_n(x - d)} {_n(y)}z",
        f"M{_n(x)} {_n(y + 1.3 * s)}L{_n(x + 1.2 * s)} {_n(y - s)}H{_n(x - 1.2 * s)}z",
    )
    return f'<path class="mk" d="{shapes[0 if slot is None else slot % len(shapes)]}"/>'


def swatch(slot: int | None) -> str:
    """The key of a line, for a legend."""
    return (
        f'<svg class="swatch {colour_class(slot)}" viewBox="0 0 30 14" aria-hidden="true">'
        f'<path class="ln {_dash(slot)}" d="M1 7H29"/>{marker(slot, 15, 7)}</svg>'
    )


def ticks(low: float, high: float, target: int = 4) -> list[float]:
    """Round values that span [low, high]."""
    span = max(high - low, 1e-12)
    raw = span / target
    power = 10.0 ** floor(log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = floor(low / step + 1e-9), -floor(-high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def line_chart(
    series: Sequence[Series],
    labels: Sequence[str],
    *,
    alt: str,
    show: Format,
    bounds: Sequence[Bound] = (),
    floor_at: float | None = None,
    cap_at: float | None = None,
    least_span: float = 0.02,
) -> str:
    """Lines over rounds; a missing value breaks its line.

    Args:
        series: lines; the overall line, if any, is drawn last so that it lies on top.
        labels: the round axis.
        alt: what a reader who cannot see the chart is told.
        show: formats a value.
        bounds: horizontal lines.
        floor_at: the axis starts here, unless a value is lower; None follows the values.
        cap_at: the axis does not go above this, unless a value does.
        least_span: least height of the axis, so that noise is not blown up.
    """
    values = [v for s in series for v in s.values if v is not None and isfinite(v)]
    if not values:
        return ""
    reach = values + [bound.value for bound in bounds]
    low, high = min(reach), max(reach)
    if high - low < least_span:
        middle = (low + high) / 2
        low, high = middle - least_span / 2, middle + least_span / 2
    if floor_at is not None:
        low = min(floor_at, *reach)
    if cap_at is not None and high >= cap_at:
        high = max(cap_at, *reach)
        low = min(low, high - least_span)
    grid = ticks(low, high)
    scale = _Scale(grid[0], grid[-1])
    n = len(labels)

    def x_of(i: int) -> float:
        inner = WIDTH - LEFT - RIGHT - 16
        return LEFT + 8 + (inner / 2 if n == 1 else inner * i / (n - 1))

    parts = [_open(alt, HEIGHT), *_y_axis(grid, scale, show), *_x_axis(labels, [x_of(i) for i in range(n)])]
    for bound in bounds:
        y = scale(bound.value)
        parts.append(f'<path class="bound" d="M{_n(LEFT)} {_n(y)}H{_n(WIDTH - RIGHT)}"/>')
        above = _n(y - 5 if y > TOP + 14 else y + 13)
        # at the end of the line where the values are further away
        room = [min((abs(v - bound.value) for s in series if (v := s.values[end]) is not None), default=0.0)
                for end in (0, -1)]  # fmt: skip
        end, x = ("", WIDTH - RIGHT) if room[1] >= room[0] else (" start", LEFT + 4)
        parts.append(f'<text class="boundtext{end}" x="{_n(x)}" y="{above}">{escape(bound.label)}</text>')
    for one in sorted(series, key=lambda s: s.slot is None):
        points = [(x_of(i), v, i) for i, v in enumerate(one.values) if v is not None and isfinite(v)]
        path, previous = "", -2
        for x, v, i in points:
            path += f"{'L' if i == previous + 1 else 'M'}{_n(x)} {_n(scale(v))}"
            previous = i
        parts.append(f'<g class="{colour_class(one.slot)}"><path class="ln {_dash(one.slot)}" d="{path}"/>')
        for x, v, i in points:
            tip = f"<title>{escape(f'{one.name}, {_round_words(labels[i])}: {show(v)}')}</title>"
            circle = f'<circle class="ring" cx="{_n(x)}" cy="{_n(scale(v))}" r="8.5"/>'
            ring = circle if i in one.rings else ""
            small = 4.0 if n <= 25 else 2.5
            parts.append(f"<g>{tip}{ring}{marker(one.slot, x, scale(v), small)}</g>")
        parts.append("</g>")
    parts.append("</svg>")
    return "".join(parts)


def bar_chart(series: Sequence[Series], labels: Sequence[str], *, alt: str, show: Format) -> str:
    """Grouped bars over rounds, from zero; with very many bars, lines instead."""
    if len(series) * len(labels) > 60:
        return line_chart(series, labels, alt=alt, show=show, floor_at=0.0)
    values = [v for s in series for v in s.values if v is not None]
    if not values:
        return ""
    grid = ticks(0.0, max(max(values), 1e-9))
    scale = _Scale(0.0, grid[-1])
    band = (WIDTH - LEFT - RIGHT) / len(labels)
    bar = min(26.0, 0.8 * band / len(series))
    centres = [LEFT + band * (i + 0.5) for i in range(len(labels))]
    parts = [_open(alt, HEIGHT), *_y_axis(grid, scale, show), *_x_axis(labels, centres)]
    for k, one in enumerate(series):
        parts.append(f'<g class="{colour_class(one.slot)}">')
        for i, value in enumerate(one.values):
            if value is None:
                continue
            x, y = centres[i] + bar * (k - len(series) / 2), scale(value)
            tip = escape(f"{one.name}, {_round_words(labels[i])}: {show(value)}")
            parts.append(
                f'<rect class="bar" x="{_n(x + 0.75)}" y="{_n(y)}" width="{_n(max(bar - 1.5, 1))}" '
                f'height="{_n(max(scale(0.0) - y, 0))}" rx="1.5"><title>{tip}</title></rect>'
            )
        parts.append("</g>")
    parts.append("</svg>")
    return "".join(parts)


@dataclass(frozen=True, slots=True)
class BudgetRow:
    """One domain's budget: what each round took of it."""

    name: str
    slot: int
    budget: float
    parts: tuple[tuple[str, float], ...]
    note: str


def budget_bars(rows: Sequence[BudgetRow], *, alt: str, show: Format) -> str:
    """A bar per domain on one scale: a track as long as the budget, filled round by round."""
    if not rows:
        return ""
    pitch, top = 46.0, 6.0
    height = top + pitch * len(rows) + 4
    longest = max(max(row.budget, sum(p for _, p in row.parts)) for row in rows) or 1.0
    width = WIDTH - 4.0
    parts = [_open(alt, height)]
    for k, row in enumerate(rows):
        y = top + pitch * k
        track = width * row.budget / longest
        parts.append(f'<text class="rowname" x="2" y="{_n(y + 12)}">{escape(_shorten(row.name, 34))}</text>')
        parts.append(f'<text class="rownote" x="{_n(WIDTH - 2)}" y="{_n(y + 12)}">{escape(row.note)}</text>')
        parts.append(
            f'<rect class="track" x="2" y="{_n(y + 19)}" width="{_n(track)}" height="13" rx="2"/>'
            f'<g class="{colour_class(row.slot)}">'
        )
        x = 2.0
        for label, part in row.parts:
            length = width * part / longest
            tip = escape(f"{row.name}, {label}: {show(part)}")
            parts.append(
                f'<rect class="bar" x="{_n(x)}" y="{_n(y + 19)}" height="13" '
                f'width="{_n(max(length - 1, 0.5))}">'
                f"<title>{tip}</title></rect>"
            )
            x += length
        cap = f"M{_n(2 + track)} {_n(y + 16)}v19"
        tip = escape(f"budget: {show(row.budget)}")
        parts.append(f'</g><path class="cap" d="{cap}"><title>{tip}</title></path>')
    parts.append("</svg>")
    return "".join(parts)


class _Scale:
    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __call__(self, value: float) -> float:
        share = (value - self.low) / max(self.high - self.low, 1e-12)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)


def _open(alt: str, height: float) -> str:
    label = escape(alt, quote=True)
    return f'<svg class="chart" viewBox="0 0 {_n(WIDTH)} {_n(height)}" role="img" aria-label="{label}">'


def _y_axis(grid: Sequence[float], scale: _Scale, show: Format) -> list[str]:
    parts = []
    for value in grid:
        y = scale(value)
        parts.append(f'<path class="grid" d="M{_n(LEFT)} {_n(y)}H{_n(WIDTH - RIGHT)}"/>')
        parts.append(f'<text class="ytick" x="{_n(LEFT - 7)}" y="{_n(y + 4)}">{escape(show(value))}</text>')
    return parts


def _x_axis(labels: Sequence[str], xs: Sequence[float]) -> list[str]:
    every = max(1, -(-len(labels) // 11))
    parts = [
        f'<text class="xtick" x="{_n(xs[i])}" y="{_n(HEIGHT - BOTTOM + 17)}">{escape(label)}</text>'
        for i, label in enumerate(labels)
        if i % every == 0
    ]
    parts.append(f'<text class="xname" x="{_n(WIDTH - RIGHT)}" y="{_n(HEIGHT - 3)}">round</text>')
    return parts


def _round_words(label: str) -> str:
    return "untrained" if label == "0" else f"round {label}"


def _dash(slot: int | None) -> str:
    return "all" if slot is None else f"d{(slot // N_COLOURS) % 3}"


def _shorten(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n - 1] + "…"


def _n(value: float) -> str:
    """Two decimals at most: short, and the same on every machine."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
