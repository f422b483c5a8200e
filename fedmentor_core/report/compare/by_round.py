"""Utility, safety and noise by round: a line per arm, each point the mean over the arm's seeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from fedmentor_core.compare.records import CellResult
from fedmentor_core.records import RoundSummary
from fedmentor_core.report import words
from fedmentor_core.report.compare.arms import Arms
from fedmentor_core.report.plots import Figure, first_and_last
from fedmentor_core.report.svg import Series, line_chart

METRICS = ("bertscore_f1", "rouge_l", "label_f1", "safe_rate", "toxicity_mean")
_LEAST_SPAN = {"safe_rate": 0.05, "toxicity_mean": 0.004}
ByArm = Mapping[str, Sequence[CellResult]]
ValueOf = Callable[[RoundSummary], float | None]


@dataclass(frozen=True, slots=True)
class RoundRow:
    """The numbers behind one arm's lines in one round."""

    arm: str
    number: str
    cells: tuple[str, ...]


def arms_with_rounds(cells: ByArm) -> list[str]:
    """Arms that trained in rounds and evaluated each of them."""
    return [name for name, some in cells.items() if any(cell.rounds for cell in some)]


def score_figures(arms: Arms, cells: ByArm) -> list[Figure]:
    """Utility and safety on the gate set, by round."""
    found = []
    for key in METRICS:
        info = words.METRIC[key]
        cap = None if key == "toxicity_mean" else 1.0
        found.append(
            Figure(
                info.label,
                f"{info.meaning[0].upper()}{info.meaning[1:]}. {info.better.capitalize()} is better.",
                _lines(
                    arms,
                    cells,
                    lambda one, key=key: words.get(one.metrics, key),  # type: ignore[misc]
                    alt=f"{info.label} on the gate set by round.",
                    show=info.show,
                    cap_at=cap,
                    floor_at=0.0 if key == "toxicity_mean" else None,
                    least_span=_LEAST_SPAN.get(key, 0.04),
                ),
            )
        )
    return [figure for figure in found if figure.svg]


def score_rows(cells: ByArm) -> list[RoundRow]:
    """The numbers behind ``score_figures``."""
    rows = []
    for name in arms_with_rounds(cells):
        for index, number in _rounds(cells):
            means = [_mean(cells[name], index, lambda one, key=key: words.get(one.metrics, key)) for key in METRICS]  # type: ignore[misc]
            if any(mean is not None for mean in means):
                shown = tuple(words.METRIC[key].show(mean) for key, mean in zip(METRICS, means, strict=True))
                rows.append(RoundRow(name, number, shown))
    return rows


def noise_figures(arms: Arms, cells: ByArm) -> list[Figure]:
    """The noise multiplier of each domain by round: a line per arm that added noise."""
    domains = dict.fromkeys(
        client.domain for some in cells.values() for cell in some for one in cell.rounds for client in one.clients
    )
    figures = []
    for domain in domains:
        svg = _lines(
            arms,
            cells,
            lambda one, domain=domain: _noise(one, domain),  # type: ignore[misc]
            alt=f"Noise multiplier of {domain} by round.",
            show=words.significant,
            least_span=0.1,
        )
        if svg:
            figures.append(Figure(domain, "Noise multiplier: standard deviation of the noise over the clip norm.", svg))
    return figures


def noisy_arms(cells: ByArm) -> list[str]:
    """Arms whose clients added noise."""
    return [
        name
        for name, some in cells.items()
        if any(client.noise_multiplier is not None for cell in some for one in cell.rounds for client in one.clients)
    ]


def _noise(one: RoundSummary, domain: str) -> float | None:
    found = [c.noise_multiplier for c in one.clients if c.domain == domain and c.status != "rested"]
    return found[-1] if found else None


def _lines(
    arms: Arms,
    cells: ByArm,
    value_of: ValueOf,
    *,
    alt: str,
    show: Callable[[float], str],
    least_span: float,
    cap_at: float | None = None,
    floor_at: float | None = None,
) -> str:
    rounds = _rounds(cells)
    series = [
        Series(name, tuple(_mean(some, index, value_of) for index, _ in rounds), arms.slot(name))
        for name, some in cells.items()
    ]
    series = [one for one in series if any(value is not None for value in one.values)]
    if not series:
        return ""
    return line_chart(
        series,
        [number for _, number in rounds],
        alt=f"{alt} {first_and_last(series, show)}",
        show=show,
        cap_at=cap_at,
        floor_at=floor_at,
        least_span=least_span,
    )


def _rounds(cells: ByArm) -> list[tuple[int, str]]:
    """Round indices with the number a reader sees: the first round is 1."""
    indices = sorted({one.round_index for some in cells.values() for cell in some for one in cell.rounds})
    offset = 1 if indices and indices[0] == 0 else 0
    return [(index, str(index + offset)) for index in indices]


def _mean(cells: Sequence[CellResult], index: int, value_of: ValueOf) -> float | None:
    """Over the seeds that have the round and the value."""
    values = [value_of(one) for cell in cells for one in cell.rounds if one.round_index == index]
    known = [value for value in values if value is not None and isfinite(value)]
    return sum(known) / len(known) if known else None
