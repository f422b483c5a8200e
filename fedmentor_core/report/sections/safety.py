"""Safety beside what the gate prompts show: the scorer's false alarms, and the answers to safety prompts."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedmentor_core.records import Interval, SafetyEvaluation, SafetyPromptScores, StudySummary
from fedmentor_core.report import words

ALARM_COLUMNS = ("posts", "alarms ≥ 0.5", "alarms ≥ 0.7", "references", "alarms ≥ 0.5", "alarms ≥ 0.7")
_SET_NAMES = {
    "embedded": "FedMentor's invented prompts",
    "simple_safety_tests": "SimpleSafetyTests",
    "xstest": "XSTest",
}
_PROMPT_METRICS = (
    words.MetricInfo("unsafe_refusal_rate", "Unsafe prompts refused", "higher", "", percent=True),
    words.MetricInfo("over_refusal_rate", "Safe prompts refused", "lower", "", percent=True),
    words.MetricInfo("safe_rate", "Safe outputs", "higher", "", percent=True),
    words.MetricInfo("toxicity_mean", "Toxicity, mean", "lower", "", digits=4),
    words.MetricInfo("empty_rate", "Empty outputs", "lower", "", percent=True),
    words.MetricInfo("repetition_rate", "Repetitions", "lower", "", percent=True),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """A value with its interval in words, if any."""

    value: str
    interval: str = ""


@dataclass(frozen=True, slots=True)
class AlarmLine:
    """The toxicity scorer on one domain's own texts."""

    domain: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class PromptTable:
    """One set of safety prompts: a metric per line, the untrained and the final model per column."""

    name: str
    n_unsafe: int
    n_safe: int
    lines: tuple[tuple[str, Cell, Cell], ...]


@dataclass(frozen=True, slots=True)
class SafetyView:
    """All that the safety section shows besides the figures."""

    alarms: tuple[AlarmLine, ...]
    prompts: tuple[PromptTable, ...]


def safety_view(summary: StudySummary) -> SafetyView:
    """False alarms by domain, and each set of safety prompts."""
    return SafetyView(alarms=tuple(_alarm_lines(summary)), prompts=tuple(_tables(summary)))


def _alarm_lines(summary: StudySummary) -> list[AlarmLine]:
    lines = []
    for domain, one in summary.alarms.items():
        cells = []
        for name, count in (("posts", one.n_posts), ("references", one.n_references)):
            cells.append(Cell(f"{count:,}"))
            for level in ("05", "07"):
                key = f"{name}_{level}"
                cells.append(_cell(words.MetricInfo(key, "", "lower", "", percent=True), one, one.intervals))
        lines.append(AlarmLine(domain, tuple(cells)))
    return lines


def _tables(summary: StudySummary) -> list[PromptTable]:
    finals = _by_name(summary.safety_final)
    before = _by_name(summary.safety_baseline)
    tables = []
    for name, one in finals.items():
        untrained = before.get(name)
        tables.append(
            PromptTable(
                _SET_NAMES.get(name, name),
                one.n_unsafe,
                one.n_safe,
                tuple(
                    (info.label, _of(info, untrained), _of(info, one))
                    for info in _PROMPT_METRICS
                    if getattr(one, info.key) is not None
                ),
            )
        )
    return tables


def _by_name(evaluation: SafetyEvaluation | None) -> dict[str, SafetyPromptScores]:
    return {} if evaluation is None else {one.name: one for one in evaluation.sets}


def _of(info: words.MetricInfo, one: SafetyPromptScores | None) -> Cell:
    return Cell(words.NONE) if one is None else _cell(info, one, one.intervals)


def _cell(info: words.MetricInfo, holder: object, intervals: Mapping[str, Interval]) -> Cell:
    found = intervals.get(info.key)
    shown = "" if found is None else f"{info.show(found[0])} to {info.show(found[1])}"
    return Cell(info.show(getattr(holder, info.key)), shown)
