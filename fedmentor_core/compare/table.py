"""From finished cells to ``ComparisonTable``: rows, paired differences, and the privacy-utility frontier."""

import statistics as stdlib
from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from fedmentor_core.compare.arms import ARMS, find_arm
from fedmentor_core.compare.public import summed_loss
from fedmentor_core.compare.records import (
    ArmResult,
    CellResult,
    ComparisonTable,
    Difference,
    Estimate,
    FailedCell,
    FrontierPoint,
)
from fedmentor_core.compare.statistics import estimate, paired

FINAL_METRICS = (
    "Metrics are of the test set, by the adapter after the last round in every arm: no round was chosen by its gate."
)
INTERVALS = (
    "Intervals are Student's t over seeds at 95 %; p-values are of paired t-tests, two-sided, and not corrected for "
    "how many there are."
)


def build_table(
    cells: Sequence[CellResult],
    failures: Sequence[FailedCell] = (),
    *,
    name: str,
    against: str,
    statements: Sequence[str] = (),
    machine: Mapping[str, str] | None = None,
    command: str = "",
) -> ComparisonTable:
    """The table of a grid, from whatever cells are finished.

    Args:
        cells: of one identity.
        failures: cells that could not be finished.
        name: the study's.
        against: the arm that differences are taken from.
        statements: what must be said of the data.
        machine: where it was computed.
        command: that made it.
    """
    own = {arm.name: [c for c in cells if c.arm == arm.name and c.epsilon is None] for arm in ARMS}
    arms = tuple(_arm_result(name, found) for name, found in own.items() if found)
    reference = own.get(against, [])
    return ComparisonTable(
        name=name,
        against=against,
        arms=arms,
        differences=tuple(
            difference for arm in arms if arm.name != against for difference in _differences(own[arm.name], reference)
        ),
        frontier=_frontier(cells),
        identity=cells[0].identity if cells else None,
        failures=tuple(failures),
        warnings=tuple(_warnings(cells, failures, arms, against, statements)),
        machine=dict(machine or {}),
        command=command,
        seconds_total=sum(cell.seconds for cell in cells),
    )


def scores_of(metrics: BaseModel) -> dict[str, float]:
    """The numbers among a record's fields; counts (``n_...``) and what is None are no scores."""
    return {
        name: float(value)
        for name, value in metrics
        if isinstance(value, int | float) and not isinstance(value, bool) and not name.startswith("n_")
    }


def final_scores(cell: CellResult) -> dict[str, float]:
    """A cell's final scores: of the test set, and of each set of safety prompts as ``SET.METRIC``."""
    found = scores_of(cell.final)
    for one in cell.safety.sets if cell.safety is not None else ():
        found |= {f"{one.name}.{name}": value for name, value in scores_of(one).items()}
    return found


def _shared(found: Sequence[Mapping[str, float]]) -> list[str]:
    """Names that all of ``found`` have, in the first one's order."""
    return [name for name in (found[0] if found else ()) if all(name in one for one in found)]


def _estimates(found: Sequence[Mapping[str, float]]) -> dict[str, Estimate]:
    return {name: estimate([one[name] for one in found]) for name in _shared(found)}


def _arm_result(name: str, cells: Sequence[CellResult]) -> ArmResult:
    arm = find_arm(name)
    spent: dict[str, float] = {}
    for cell in cells:
        for domain, epsilon in cell.epsilon_spent.items():
            spent[domain] = max(spent.get(domain, 0.0), epsilon)
    return ArmResult(
        name=name,
        title=arm.title,
        private=arm.private,
        seeds=tuple(sorted(cell.seed for cell in cells)),
        metrics=_estimates([final_scores(cell) for cell in cells]),
        by_domain={
            domain: _estimates([scores_of(cell.final.by_domain[domain]) for cell in cells])
            for domain in cells[0].final.by_domain
        },
        epsilon_spent=spent,
        bytes_per_round=max(cell.bytes_total // max(1, len(cell.rounds)) for cell in cells),
        seconds=stdlib.median(cell.seconds for cell in cells),
    )


def _differences(cells: Sequence[CellResult], against: Sequence[CellResult]) -> list[Difference]:
    found = []
    ours, theirs = ({cell.seed: final_scores(cell) for cell in arm} for arm in (cells, against))
    for metric in _shared([*ours.values(), *theirs.values()]):
        gap = paired(
            {seed: scores[metric] for seed, scores in ours.items()},
            {seed: scores[metric] for seed, scores in theirs.items()},
        )
        if gap is not None:
            found.append(
                Difference(
                    arm=cells[0].arm,
                    against=against[0].arm,
                    metric=metric,
                    mean=gap.mean,
                    ci95=gap.ci95,
                    p_value=gap.p_value,
                    n=gap.n,
                )
            )
    return found


def _frontier(cells: Sequence[CellResult]) -> tuple[FrontierPoint, ...]:
    """Points by budget, ending with federated learning without privacy; none where no budget was asked for.

    A table cell of the arm 'uniform' is a point too: there every domain has one budget as well.
    """
    by_budget: dict[tuple[str, float], list[CellResult]] = {}
    for cell in cells:
        if cell.epsilon is not None:
            by_budget.setdefault((cell.arm, cell.epsilon), []).append(cell)
    arms = {arm for arm, _ in by_budget}
    for cell in cells:
        if cell.epsilon is None and cell.arm == "uniform" and "uniform" in arms and cell.rounds:
            budget = cell.rounds[-1].clients[0].epsilon_budget
            if budget is not None:
                by_budget.setdefault((cell.arm, budget), []).append(cell)
    points = [
        FrontierPoint(arm=arm, epsilon=epsilon, metrics=_estimates([final_scores(cell) for cell in found]))
        for (arm, epsilon), found in sorted(by_budget.items())
    ]
    end = [cell for cell in cells if cell.arm == "federated" and cell.epsilon is None]
    if points and end:
        points.append(
            FrontierPoint(arm="federated", epsilon=None, metrics=_estimates([final_scores(cell) for cell in end]))
        )
    return tuple(points)


def _warnings(
    cells: Sequence[CellResult],
    failures: Sequence[FailedCell],
    arms: Sequence[ArmResult],
    against: str,
    statements: Sequence[str],
) -> list[str]:
    said = [summed_loss(cells), *statements]
    few = [arm.name for arm in arms if len(arm.seeds) < 2]
    if few:
        said.append(f"One seed only in {', '.join(few)}: no intervals and no tests, so no difference is shown there.")
    if arms and against not in {arm.name for arm in arms}:
        said.append(f"No cell of {against!r} is finished: there are no differences.")
    if failures:
        said.append(f"{len(failures)} cells are missing, because they failed; the table has the rest.")
    by_arm = dict.fromkeys((cell.arm, warning) for cell in cells for warning in cell.warnings)
    return [*said, *(f"{arm}: {warning}" for arm, warning in by_arm)]
