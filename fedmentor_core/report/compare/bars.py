"""A bar per arm, lying, with its name above it: room for any number of arms on a narrow screen."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite

from fedmentor_core.report.svg import WIDTH, Format, colour_class, num, open_chart, shorten

_PITCH, _BAR, _EDGE = 37.0, 11.0, 3.0


@dataclass(frozen=True, slots=True)
class ArmBar:
    """One arm's value; ``interval`` is drawn as a whisker."""

    name: str
    slot: int
    value: float
    interval: tuple[float, float] | None = None


def reach(bars: Sequence[ArmBar]) -> tuple[float, float]:
    """Lowest and highest point of bars and whiskers, zero included: what charts on one scale share."""
    points = [0.0, *(bar.value for bar in bars), *(end for bar in bars for end in bar.interval or ())]
    points = [point for point in points if isfinite(point)]
    return min(points), max(points)


def arm_bars(bars: Sequence[ArmBar], *, alt: str, show: Format, limits: tuple[float, float] | None = None) -> str:
    """The chart, from zero; empty without bars.

    Args:
        bars: in the order they are drawn, top to bottom.
        alt: what the chart is; every value is added to it.
        show: formats a value.
        limits: the scale's ends; default: ``reach(bars)``.
    """
    bars = [bar for bar in bars if isfinite(bar.value)]
    if not bars:
        return ""
    low, high = limits or reach(bars)
    span = (high - low) or 1.0

    def x_of(value: float) -> float:
        return _EDGE + (WIDTH - 2 * _EDGE) * (min(max(value, low), high) - low) / span

    told = "; ".join(f"{bar.name}: {_told(bar, show)}" for bar in bars)
    parts = [open_chart(f"{alt} {told}.", _PITCH * len(bars) + 4)]
    for k, bar in enumerate(bars):
        y = _PITCH * k
        start, end = sorted((x_of(0.0), x_of(bar.value)))
        shape = f'x="{num(start)}" y="{num(y + 19)}" width="{num(max(end - start, 1.5))}" height="{num(_BAR)}"'
        parts.append(f"<g><title>{escape(f'{bar.name}: {_told(bar, show)}')}</title>")
        parts.append(f'<text class="rowname" x="{num(_EDGE)}" y="{num(y + 13)}">{escape(shorten(bar.name, 42))}</text>')
        parts.append(
            f'<text class="rownote" x="{num(WIDTH - _EDGE)}" y="{num(y + 13)}">{escape(show(bar.value))}</text>'
        )
        parts.append(f'<g class="{colour_class(bar.slot)}"><rect class="bar" {shape} rx="1.5"/></g>')
        if bar.interval is not None and all(map(isfinite, bar.interval)):
            left, right = (x_of(one) for one in bar.interval)
            middle = y + 19 + _BAR / 2
            ends = f"M{num(left)} {num(middle - 4)}v8M{num(right)} {num(middle - 4)}v8"
            parts.append(f'<path class="whisker" d="M{num(left)} {num(middle)}H{num(right)}{ends}"/>')
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def _told(bar: ArmBar, show: Format) -> str:
    within = "" if bar.interval is None else f", 95 % interval {show(bar.interval[0])} to {show(bar.interval[1])}"
    return show(bar.value) + within
