"""The report's figures of scores and cost: which records go into which chart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fedmentor_core.records import ClientSummary, StudySummary
from fedmentor_core.report import words
from fedmentor_core.report.metric_noise import MetricNoise
from fedmentor_core.report.svg import Bound, Series, bar_chart, line_chart, stamped, swatch


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its title and one sentence of help. ``svg`` is empty where there is nothing to draw."""

    title: str
    note: str
    svg: str


@dataclass(frozen=True, slots=True)
class LegendItem:
    """A line of the legend; ``key`` is SVG made here."""

    name: str
    key: str


def marked(figures: Sequence[Figure], text: str) -> list[Figure]:
    """``figures`` with ``text`` written across each, so that one copied out of the report still says it."""
    return [replace(figure, svg=stamped(figure.svg, text)) for figure in figures]


def domain_order(summary: StudySummary) -> list[str]:
    """Every domain that appears anywhere, in the plan's order."""
    names = [plan.domain for plan in summary.plan.domains]
    names += [client.domain for one in summary.rounds for client in one.clients]
    names += list(summary.baseline.by_domain)
    return list(dict.fromkeys(names))


def legend(domains: Sequence[str], *, overall: bool) -> list[LegendItem]:
    """Keys of the domains and, for scores, of the mean over domains."""
    items = [LegendItem("all domains (mean)", swatch(None))] if overall and len(domains) > 1 else []
    return items + [LegendItem(name, swatch(slot)) for slot, name in enumerate(domains)]


def utility_figures(summary: StudySummary) -> list[Figure]:
    """BERTScore F1, ROUGE-L and label F1 on the gate set, by round."""
    return [
        _metric_figure(summary, "bertscore_f1", cap_at=1.0, least_span=0.04),
        _metric_figure(summary, "rouge_l", cap_at=1.0, least_span=0.04),
        _metric_figure(summary, "label_f1", cap_at=1.0, least_span=0.04),
    ]


def safety_figures(summary: StudySummary) -> list[Figure]:
    """Safe outputs and toxicity on the gate set, by round."""
    return [
        _metric_figure(summary, "safe_rate", cap_at=1.0, least_span=0.05),
        _metric_figure(summary, "toxicity_mean", floor_at=0.0, least_span=0.004),
        _metric_figure(summary, "toxicity_max", floor_at=0.0, cap_at=1.0, least_span=0.1),
    ]


def cost_figures(summary: StudySummary) -> list[Figure]:
    """Bytes and seconds of each client in each round."""
    labels = round_labels(summary)
    domains = domain_order(summary)
    traffic = [
        Series(d, tuple(client_values(summary, d, lambda c: float(c.bytes_up + c.bytes_down))), slot)
        for slot, d in enumerate(domains)
    ]
    seconds = [Series(d, tuple(client_values(summary, d, lambda c: c.seconds)), slot) for slot, d in enumerate(domains)]
    figures = []
    traffic_note = "Adapter bytes up and down together."
    time_note = "From receiving the adapter to releasing the update."
    for title, note, lines, show in (
        ("Traffic per client", traffic_note, traffic, words.show_bytes),
        ("Time per client", time_note, seconds, words.show_seconds),
    ):
        alt = f"{title} by round. " + first_and_last(lines, show)
        figures.append(Figure(title, note, bar_chart(lines, labels, alt=alt, show=show)))
    return figures


def _metric_figure(
    summary: StudySummary,
    key: str,
    *,
    floor_at: float | None = None,
    cap_at: float | None = None,
    least_span: float,
) -> Figure:
    info = words.METRIC[key]
    stages = [summary.baseline_gate, *(one.metrics for one in summary.rounds)]
    domains = domain_order(summary)
    noise = MetricNoise() if key == "toxicity_max" else MetricNoise.of(summary.plan, "gate")
    lines = [
        Series(
            domain,
            tuple(words.get(stage.by_domain.get(domain), key) for stage in stages),
            slot,
            errors=_errors(noise.of_domain(domain), len(stages)),
        )
        for slot, domain in enumerate(domains)
    ]
    if len(domains) > 1:
        name = "highest of all domains" if key == "toxicity_max" else "all domains (mean)"
        values = tuple(words.get(stage, key) for stage in stages)
        lines.append(Series(name, values, errors=_errors(noise.of_mean(domains), len(stages))))
    labels = ["0", *round_labels(summary)]
    told = first_and_last(lines, info.show)
    alt = f"{info.label} on the gate set by round, from the untrained model. {told}"
    axis: Callable[[float], str] = (
        (lambda v: f"{words.significant(100 * v)} %") if info.percent else lambda v: words.significant(v)
    )
    svg = line_chart(
        lines,
        labels,
        alt=alt,
        show=axis,
        bounds=_gate_bounds(summary, key, axis),
        floor_at=floor_at,
        cap_at=cap_at,
        least_span=least_span,
    )
    note = f"{info.meaning[0].upper()}{info.meaning[1:]}. {info.better.capitalize()} is better."
    return Figure(info.label, note, svg)


def _errors(std: float | None, n: int) -> tuple[float | None, ...]:
    return () if std is None else (std,) * n


def _gate_bounds(summary: StudySummary, key: str, show: Callable[[float], str]) -> list[Bound]:
    """The overall thresholds of the last round; a bound that moved is still one line, the newest."""
    if not summary.rounds:
        return []
    found = {}
    for result in summary.rounds[-1].gate.results:
        if result.metric == key and result.scope == "overall" and result.bound is not None:
            sign = "≥" if result.comparison == ">=" else "≤"
            found[round(result.bound, 9)] = Bound(result.bound, f"gate {sign} {show(result.bound)}")
    return list(found.values())


def round_labels(summary: StudySummary) -> list[str]:
    """The round axis: the reader's first round is 1."""
    offset = words.round_offset(summary)
    return [str(one.round_index + offset) for one in summary.rounds]


def client_values(
    summary: StudySummary, domain: str, value_of: Callable[[ClientSummary], float | None]
) -> list[float | None]:
    """One value per round: of a client that took part."""
    values: list[float | None] = []
    for one in summary.rounds:
        clients = [c for c in one.clients if c.domain == domain and c.status != "rested"]
        values.append(value_of(clients[-1]) if clients else None)
    return values


def first_and_last(lines: Sequence[Series], show: Callable[[float], str]) -> str:
    """Where each line starts and ends, in words."""
    told = []
    for line in lines:
        known = [value for value in line.values if value is not None]
        if len(known) > 1:
            told.append(f"{line.name}: from {show(known[0])} to {show(known[-1])}")
        elif known:
            told.append(f"{line.name}: {show(known[0])}")
    return "; ".join(told) + "."
