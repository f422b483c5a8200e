"""What the table says about the paper's claims: holds, does not hold, or cannot be told with so few seeds.

The paper (arXiv 2509.14275) claims utility within 0.5 % of federated learning without privacy, a safe-output rate up to
three points above it, and utility close to centralized training. A claim is judged by the 95 % interval of the paired
differences and never by the means alone:

- *not below a margin* holds when the whole interval is at or above minus the margin (which rejects "worse by more than
  the margin" at the one-sided 2.5 % level), and does not hold when the whole interval is below it;
- *above* holds when the whole interval is above zero, and does not hold when none of it is.

In between, and with fewer than two seeds, nothing can be told. A claim over several metrics holds when it holds for
each of them, so no correction for their number is needed for "holds" (an intersection-union test).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedmentor_core.compare.records import ArmResult, CellResult, ComparisonTable, Difference
from fedmentor_core.compare.statistics import Paired, paired
from fedmentor_core.config import UTILITY_METRICS
from fedmentor_core.report import words
from fedmentor_core.report.compare.arms import number_of_seeds
from fedmentor_core.report.compare.table import signed

Verdict = Literal["holds", "does not hold", "cannot tell"]
Interval = tuple[float, float]

FEDMENTOR = "fedmentor"
"""Names of the arms that the claims are about begin so; that of the whole method is this."""
CENTRALIZED = "centralized"
WITHIN = 0.005
"""The paper's margin of utility, as a share of the federated arm's."""
CLOSE = 0.02
"""Our margin for "close to centralized", for which the paper gives no number."""
SAFER_BY = 0.03
"""The paper's largest gain in the safe-output rate."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One metric of one claim, in words."""

    verdict: Verdict
    sentence: str


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim about one arm."""

    title: str
    about: str
    verdict: Verdict
    verdict_words: str
    findings: tuple[Finding, ...]
    note: str = ""


def not_below(interval: Interval | None, margin: float) -> Verdict:
    """Whether a difference is no lower than ``-margin``, by its 95 % interval."""
    if interval is None:
        return "cannot tell"
    low, high = interval
    return "holds" if low >= -margin else "does not hold" if high < -margin else "cannot tell"


def above_zero(interval: Interval | None) -> Verdict:
    """Whether a difference is a gain, by its 95 % interval; an interval of exactly zero is no gain."""
    if interval is None:
        return "cannot tell"
    low, high = interval
    return "holds" if low > 0 else "does not hold" if high <= 0 else "cannot tell"


def all_of(verdicts: Sequence[Verdict]) -> Verdict:
    """A claim over several metrics: one that does not hold refutes it; without any nothing can be told."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "cannot tell" if not verdicts or "cannot tell" in verdicts else "holds"


def claims(table: ComparisonTable, cells: Mapping[str, Sequence[CellResult]]) -> list[Claim]:
    """Each of the paper's claims about each FedMentor arm that was run, the whole method first.

    Args:
        table: the comparison.
        cells: the table's own cells by arm, for differences that the table does not hold.
    """
    arms = {arm.name: arm for arm in table.arms}
    about = [arm for arm in table.arms if arm.name.startswith(FEDMENTOR)]
    judge = _Judge(table, cells)
    found = []
    for arm in sorted(about, key=lambda arm: arm.name != FEDMENTOR):
        federated, centralized = arms.get(table.against), arms.get(CENTRALIZED)
        if federated is not None and federated is not arm:
            found.append(_utility(judge, arm, federated, WITHIN, f"Utility within 0.5 % of {federated.name}"))
            found.append(_safety(judge, arm, federated))
        if centralized is not None:
            note = "The paper gives no number for “close”; 2 % is this report's."
            found.append(_utility(judge, arm, centralized, CLOSE, f"Utility close to {centralized.name}", note))
    return found


@dataclass(frozen=True, slots=True)
class _Judge:
    """Where differences come from: the table, or the cells behind it."""

    table: ComparisonTable
    cells: Mapping[str, Sequence[CellResult]]

    def difference(self, arm: str, against: str, metric: str) -> Difference | Paired | None:
        for one in self.table.differences:
            if (one.arm, one.against, one.metric) == (arm, against, metric):
                return one
        return paired(self._by_seed(arm, metric), self._by_seed(against, metric))

    def _by_seed(self, arm: str, metric: str) -> dict[int, float]:
        values = {cell.seed: words.get(cell.final, metric) for cell in self.cells.get(arm, ())}
        return {seed: value for seed, value in values.items() if value is not None}


def _utility(judge: _Judge, arm: ArmResult, against: ArmResult, share: float, title: str, note: str = "") -> Claim:
    findings = []
    for key in UTILITY_METRICS:
        if key not in arm.metrics or key not in against.metrics:
            continue
        margin = share * abs(against.metrics[key].mean)
        difference = judge.difference(arm.name, against.name, key)
        verdict = not_below(None if difference is None else difference.ci95, margin)
        allowed = f"Allowed: {_shown(key, -margin)}, which is {words.significant(100 * share)} % of it."
        findings.append(Finding(verdict, f"{_told(arm, against, key, difference)} {allowed}"))
    return _claim(title, arm, against, findings, note)


def _safety(judge: _Judge, arm: ArmResult, against: ArmResult) -> Claim:
    key = "safe_rate"
    findings, note = [], ""
    if key in arm.metrics and key in against.metrics:
        difference = judge.difference(arm.name, against.name, key)
        interval = None if difference is None else difference.ci95
        findings = [Finding(above_zero(interval), f"{_told(arm, against, key, difference)} {_three_points(interval)}")]
        room = 1 - against.metrics[key].mean
        if room < SAFER_BY:
            note = (
                f"{against.name} is already at {words.METRIC[key].show(1 - room)} on these prompts, so no arm could "
                f"gain more than {words.number(100 * max(room, 0.0), 1)} points here."
            )
    return _claim(f"More safe outputs than {against.name}, by up to 3 points", arm, against, findings, note)


def _claim(title: str, arm: ArmResult, against: ArmResult, findings: list[Finding], note: str) -> Claim:
    verdict = all_of([finding.verdict for finding in findings])
    seeds = len(set(arm.seeds) & set(against.seeds))
    in_words = f"cannot tell with {number_of_seeds(seeds)}" if verdict == "cannot tell" else verdict
    return Claim(title, arm.name, verdict, in_words, tuple(findings), note)


def _told(arm: ArmResult, against: ArmResult, key: str, difference: Difference | Paired | None) -> str:
    info = words.METRIC[key]
    mine, other = arm.metrics[key], against.metrics[key]
    values = f"{info.label}: {info.show(mine.mean)} against {info.show(other.mean)}"
    if difference is None:
        return f"{values}; the two arms share no seed, so there is no difference to judge."
    over = number_of_seeds(difference.n)
    if difference.ci95 is None:
        return f"{values}, {_shown(key, difference.mean)} (no interval: {over})."
    low, high = difference.ci95
    interval = f"95 % interval {_shown(key, low)} to {_shown(key, high)}, {over}"
    return f"{values}, {_shown(key, difference.mean)} ({interval})."


def _shown(key: str, value: float) -> str:
    info = words.METRIC[key]
    return f"{signed(info, value)}{' points' if info.percent else ''}"


def _three_points(interval: Interval | None) -> str:
    if interval is None:
        return ""
    low, high = interval
    if high < SAFER_BY:
        return "A gain of 3 points is ruled out."
    return "The gain is more than 3 points." if low > SAFER_BY else "A gain of 3 points is possible."
