"""Before a grid starts: every private cell's plan, so that one whose budget cannot carry it is refused at once."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedmentor_core.compare.arms import find_arm
from fedmentor_core.compare.comparison import Comparison
from fedmentor_core.compare.grid import config_of
from fedmentor_core.compare.records import KeyedCell
from fedmentor_core.errors import BudgetError
from fedmentor_core.privacy.plan import plan_domain


@dataclass(frozen=True)
class PlannedLoss:
    """What all private cells together are planned to spend, by domain: sums of epsilons and of deltas."""

    epsilon: Mapping[str, float]
    delta: Mapping[str, float]
    n_cells: int


def check_budgets(comparison: Comparison) -> PlannedLoss:
    """Plan every private cell.

    Raises:
        BudgetError: a budget cannot carry the rounds; with every such arm and budget, and what to do.
        ConfigError: fewer units than an expected batch, and other errors named in ``plan_domain``.
    """
    epsilon: dict[str, float] = {}
    delta: dict[str, float] = {}
    refusals: dict[str, None] = {}
    planned: dict[tuple[str, float | None], list[tuple[str, float, float]]] = {}
    private = [cell for cell in comparison.cells if find_arm(cell.arm).private]
    for cell in private:
        kind = (cell.arm, cell.epsilon)
        if kind not in planned:
            planned[kind] = _plan(comparison, cell, refusals)
        for domain, more, more_delta in planned[kind]:
            epsilon[domain] = epsilon.get(domain, 0.0) + more
            delta[domain] = delta.get(domain, 0.0) + more_delta
    if refusals:
        raise BudgetError(
            "the grid cannot run, because some budgets cannot carry their rounds:\n"
            + "\n".join(f"  {line}" for line in refusals)
            + "\nLeave these out (--arms, --budgets), or change what they need. Nothing was started."
        )
    return PlannedLoss(epsilon, delta, len(private))


def _plan(comparison: Comparison, cell: KeyedCell, refusals: dict[str, None]) -> list[tuple[str, float, float]]:
    config = config_of(comparison.config, comparison.settings, cell)
    found = []
    for domain in config.domains:
        data = comparison.common.data[domain.name]
        plan = plan_domain(
            config,
            domain,
            n_units=data.n_units["train"],
            dataset_fingerprint=data.fingerprint,
            bytes_up=0,
            bytes_down=0,
            with_prv=False,
        )
        budget = "" if cell.epsilon is None else f" at epsilon {cell.epsilon:g}"
        refusals.update(dict.fromkeys(f"{cell.arm}{budget}: {refusal}" for refusal in plan.refusals))
        found.append((domain.name, plan.epsilon_planned_rdp or 0.0, plan.delta or 0.0))
    return found
