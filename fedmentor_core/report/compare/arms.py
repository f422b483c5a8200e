"""The arms of a comparison as every part of its page needs them: order, colours, and the cells that count."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedmentor_core.compare.records import CellResult, ComparisonTable
from fedmentor_core.report import words
from fedmentor_core.report.plots import LegendItem
from fedmentor_core.report.svg import swatch


@dataclass(frozen=True, slots=True)
class Arms:
    """Arms in the table's order. An arm's place fixes its colour, dash and marker on the whole page."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, table: ComparisonTable, cells: Sequence[CellResult]) -> "Arms":
        """Every arm that appears anywhere; those that the table has no row of come last."""
        names = [arm.name for arm in table.arms] + [point.arm for point in table.frontier]
        return cls(tuple(dict.fromkeys(names + [cell.arm for cell in cells])))

    def slot(self, name: str) -> int:
        """The arm's colour, dash and marker."""
        return self.names.index(name)

    def legend(self, names: Sequence[str]) -> list[LegendItem]:
        """Keys of the lines of ``names``, in the table's order."""
        return [LegendItem(name, swatch(slot)) for slot, name in enumerate(self.names) if name in names]


def by_arm(arms: Arms, cells: Sequence[CellResult]) -> dict[str, list[CellResult]]:
    """The table's own cells (no frontier cells) of each arm that has any, by seed."""
    own = sorted((cell for cell in cells if cell.epsilon is None), key=lambda cell: cell.seed)
    return {name: some for name in arms.names if (some := [cell for cell in own if cell.arm == name])}


def seeds_of(table: ComparisonTable) -> list[int]:
    """Every seed that any arm finished."""
    return sorted({seed for arm in table.arms for seed in arm.seeds})


def domains_of(table: ComparisonTable, cells: Sequence[CellResult]) -> list[str]:
    """Every domain that any arm was measured on."""
    names = [name for arm in table.arms for name in arm.by_domain]
    return list(dict.fromkeys(names + [name for cell in cells for name in cell.final.by_domain]))


def number_of_seeds(n: int) -> str:
    """``1 seed``, ``3 seeds``."""
    return words.count(n, "seed")
