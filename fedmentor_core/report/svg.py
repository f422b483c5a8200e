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
    """One line, or one colour of bars. ``slot`` None is the overall line.

    ``errors`` holds half the length of each value's error bar; None or a missing place draws none.
    """

    name: str
    values: tuple[float | None, ...]
    slot: int | None = None
    rings: frozenset[int] = field(default=frozenset())
    errors: tuple[float | None, ...] = ()

    def error(self, i: int) -> float | None:
        """Half the length of the error bar of value ``i``."""
        return self.errors[i] if i < len(self.errors) else None


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
        f"M{num(x - s)} {num(y)}a{num(s)} {num(s)} 0 1 0 {num(2 * s)} 0a{num(s)} {num(s)} 0 1 0 {num(-2 * s)} 0z",
        f"M{num(x - s)} {num(y - s)}h{num(2 * s)}v{num(2 * s)}h{num(-2 * s)}z",
        f"M{num(x)} {num(y - 1.3 * s)}L{num(x + 1.2 * s)} {num(y + s)}H{num(x - 1.2 * s)}z",
        f"M{num(x)} {num(y - d)}L{num(x + d)} {num(y)}L{num(x)} {num(y + d)}L{num(x - d)} {num(y)}z",
        f"M{num(x)} {num(y + 1.3 * s)}L{num(x + 1.2 * s)} {num(y - s)}H{num(x - 1.2 * s)}z",
    )
    return f'<path class="mk" d="{shapes[0 if slot is None else slot % len(shapes)]}"/>'


def swatch(slot: int | None) -> str:
    """The key of a line, for a legend."""
    return (
        f'<svg class="swatch {colour_class(slot)}" viewBox="0 0 30 14" aria-hidden="true">'
        f'<path class="ln {dash_class(slot)}" d="M1 7H29"/>{marker(slot, 15, 7)}</svg>'
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
    spans = [(v, s.error(i) or 0.0) for s in series for i, v in enumerate(s.values) if v is not None and isfinite(v)]
    if not spans:
        return ""
    reach = [v + sign * error for v, error in spans for sign in (-1, 1)] + [bound.value for bound in bounds]
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
    scale = Scale(grid[0], grid[-1])
    n = len(labels)

    def x_of(i: int) -> float:
        inner = WIDTH - LEFT - RIGHT - 16
        return LEFT + 8 + (inner / 2 if n == 1 else inner * i / (n - 1))

    parts = [open_chart(alt, HEIGHT), *y_axis(grid, scale, show), *x_axis(labels, [x_of(i) for i in range(n)])]
    for bound in bounds:
        y = scale(bound.value)
        parts.append(f'<path class="bound" d="M{num(LEFT)} {num(y)}H{num(WIDTH - RIGHT)}"/>')
        above = num(y - 5 if y > TOP + 14 else y + 13)
        # at the end of the line where the values are further away
        room = [min((abs(v - bound.value) for s in series if (v := s.values[end]) is not None), default=0.0)
                for end in (0, -1)]  # fmt: skip
        end, x = ("", WIDTH - RIGHT) if room[1] >= room[0] else (" start", LEFT + 4)
        parts.append(f'<text class="boundtext{end}" x="{num(x)}" y="{above}">{escape(bound.label)}</text>')
    spread = 4.0 if any(one.errors for one in series) else 0.0  # so that error bars do not cover each other
    for k, one in enumerate(sorted(series, key=lambda s: s.slot is None)):
        aside = spread * (k - (len(series) - 1) / 2)
        points = [(x_of(i) + aside, v, i) for i, v in enumerate(one.values) if v is not None and isfinite(v)]
        path, previous = "", -2
        for x, v, i in points:
            path += f"{'L' if i == previous + 1 else 'M'}{num(x)} {num(scale(v))}"
            previous = i
        parts.append(f'<g class="{colour_class(one.slot)}"><path class="ln {dash_class(one.slot)}" d="{path}"/>')
        for x, v, i in points:
            error = one.error(i)
            within = "" if error is None else f" ± {show(error)}"
            tip = f"<title>{escape(f'{one.name}, {round_words(labels[i])}: {show(v)}{within}')}</title>"
            bar = "" if error is None else error_bar(x, scale(v + error), scale(v - error))
            circle = f'<circle class="ring" cx="{num(x)}" cy="{num(scale(v))}" r="8.5"/>'
            ring = circle if i in one.rings else ""
            small = 4.0 if n <= 25 else 2.5
            parts.append(f"<g>{tip}{bar}{ring}{marker(one.slot, x, scale(v), small)}</g>")
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
    scale = Scale(0.0, grid[-1])
    band = (WIDTH - LEFT - RIGHT) / len(labels)
    bar = min(26.0, 0.8 * band / len(series))
    centres = [LEFT + band * (i + 0.5) for i in range(len(labels))]
    parts = [open_chart(alt, HEIGHT), *y_axis(grid, scale, show), *x_axis(labels, centres)]
    for k, one in enumerate(series):
        parts.append(f'<g class="{colour_class(one.slot)}">')
        for i, value in enumerate(one.values):
            if value is None:
                continue
            x, y = centres[i] + bar * (k - len(series) / 2), scale(value)
            tip = escape(f"{one.name}, {round_words(labels[i])}: {show(value)}")
            parts.append(
                f'<rect class="bar" x="{num(x + 0.75)}" y="{num(y)}" width="{num(max(bar - 1.5, 1))}" '
                f'height="{num(max(scale(0.0) - y, 0))}" rx="1.5"><title>{tip}</title></rect>'
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
    parts = [open_chart(alt, height)]
    for k, row in enumerate(rows):
        y = top + pitch * k
        track = width * row.budget / longest
        parts.append(f'<text class="rowname" x="2" y="{num(y + 12)}">{escape(shorten(row.name, 34))}</text>')
        parts.append(f'<text class="rownote" x="{num(WIDTH - 2)}" y="{num(y + 12)}">{escape(row.note)}</text>')
        parts.append(
            f'<rect class="track" x="2" y="{num(y + 19)}" width="{num(track)}" height="13" rx="2"/>'
            f'<g class="{colour_class(row.slot)}">'
        )
        x = 2.0
        for label, part in row.parts:
            length = width * part / longest
            tip = escape(f"{row.name}, {label}: {show(part)}")
            parts.append(
                f'<rect class="bar" x="{num(x)}" y="{num(y + 19)}" height="13" '
                f'width="{num(max(length - 1, 0.5))}">'
                f"<title>{tip}</title></rect>"
            )
            x += length
        cap = f"M{num(2 + track)} {num(y + 16)}v19"
        tip = escape(f"budget: {show(row.budget)}")
        parts.append(f'</g><path class="cap" d="{cap}"><title>{tip}</title></path>')
    parts.append("</svg>")
    return "".join(parts)


def stamped(chart: str, text: str) -> str:
    """``chart`` with ``text`` written across it, in its picture and in its words; an empty chart stays empty."""
    if not chart:
        return ""
    label = escape(text, quote=True)
    head, _, body = chart.partition('aria-label="')
    mark = f'<text class="stamp" x="{num((LEFT + WIDTH - RIGHT) / 2)}" y="{num(TOP + 12)}">{escape(text)}</text>'
    return f'{head}aria-label="{label}. {body.removesuffix("</svg>")}{mark}</svg>'


class Scale:
    """Height on a chart of a value in [low, high]."""

    def __init__(self, low: float, high: float) -> None:
        """The axis from ``low``, at its foot, to ``high``."""
        self.low, self.high = low, high

    def __call__(self, value: float) -> float:
        """The y coordinate of ``value``."""
        share = (value - self.low) / max(self.high - self.low, 1e-12)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)


def open_chart(alt: str, height: float) -> str:
    """The opening tag of a chart; ``alt`` is what a reader who cannot see it is told."""
    label = escape(alt, quote=True)
    return f'<svg class="chart" viewBox="0 0 {num(WIDTH)} {num(height)}" role="img" aria-label="{label}">'


def y_axis(grid: Sequence[float], scale: Scale, show: Format) -> list[str]:
    """Grid lines with their values."""
    parts = []
    for value in grid:
        y = scale(value)
        parts.append(f'<path class="grid" d="M{num(LEFT)} {num(y)}H{num(WIDTH - RIGHT)}"/>')
        parts.append(f'<text class="ytick" x="{num(LEFT - 7)}" y="{num(y + 4)}">{escape(show(value))}</text>')
    return parts


def x_axis(labels: Sequence[str], xs: Sequence[float]) -> list[str]:
    """Round numbers, as many as have room."""
    every = max(1, -(-len(labels) // 11))
    parts = [
        f'<text class="xtick" x="{num(xs[i])}" y="{num(HEIGHT - BOTTOM + 17)}">{escape(label)}</text>'
        for i, label in enumerate(labels)
        if i % every == 0
    ]
    parts.append(f'<text class="xname" x="{num(WIDTH - RIGHT)}" y="{num(HEIGHT - 3)}">round</text>')
    return parts


def round_words(label: str) -> str:
    """A round's label in words."""
    return "untrained" if label == "0" else f"round {label}"


def dash_class(slot: int | None) -> str:
    """CSS class that sets the dash of ``slot``."""
    return "all" if slot is None else f"d{(slot // N_COLOURS) % 3}"


def error_bar(x: float, top: float, bottom: float) -> str:
    """An upright error bar between two heights."""
    path = f"M{num(x)} {num(top)}V{num(bottom)}M{num(x - 4)} {num(top)}h8M{num(x - 4)} {num(bottom)}h8"
    return f'<path class="error" d="{path}"/>'


def shorten(text: str, n: int) -> str:
    """``text``, or its beginning and an ellipsis, in at most ``n`` characters."""
    return text if len(text) <= n else text[: n - 1] + "…"


def num(value: float) -> str:
    """Two decimals at most: short, and the same on every machine."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
