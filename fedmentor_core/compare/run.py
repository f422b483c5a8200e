"""The whole grid in one process, cell after cell; and joining the cells of several comparisons into one table.

``flows/compare.py`` maps the same cells as Prefect tasks.
"""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedmentor_core import __version__
from fedmentor_core.compare.arms import find_arm
from fedmentor_core.compare.comparison import FILE, Comparison, copy_cell, read_file, read_result, write_text
from fedmentor_core.compare.grid import steps_of
from fedmentor_core.compare.identity import differences, refuse_other_identity
from fedmentor_core.compare.outputs import write_outputs
from fedmentor_core.compare.public import statements
from fedmentor_core.compare.records import (
    Cell,
    CellResult,
    ComparisonFile,
    ComparisonTable,
    FailedCell,
    KeyedCell,
)
from fedmentor_core.compare.table import build_table
from fedmentor_core.discretion import failure_reason
from fedmentor_core.errors import ConfigError, OutputExistsError
from fedmentor_core.hashing import canonical_sha256
from fedmentor_core.progress import ProgressEvent
from fedmentor_core.storage.local import LocalStore


@dataclass(frozen=True, slots=True)
class CellEvent:
    """A cell of the grid started or ended.

    Attributes:
        what: happened; 'reused': it was finished before.
        cell: which one, in words.
        number: from one.
        total: cells of the grid.
        steps: optimiser steps of the cell: what its time goes by.
        steps_total: of the whole grid.
        message: of a failure.
    """

    what: Literal["started", "done", "reused", "failed"]
    cell: str
    number: int
    total: int
    steps: int
    steps_total: int
    message: str = ""


GridListener = Callable[[CellEvent | ProgressEvent], None]


def unheard(_: CellEvent | ProgressEvent) -> None:
    """The listener that shows nothing."""


def run_comparison(comparison: Comparison, listen: GridListener = unheard, command: str = "") -> ComparisonTable:
    """Run every cell that is not finished, and write the table of all that are.

    A cell that fails does not stop the others: it is a ``FailedCell`` of the table.

    Args:
        comparison: opened; its budgets and time were looked at.
        listen: told of cells, and of what goes on in the current one.
        command: that the table says it was made with.
    """
    comparison.claim()
    failures: list[FailedCell] = []
    if any(comparison.result(cell) is None for cell in comparison.cells):
        comparison.prepare(listen)
    for number, cell in enumerate(comparison.cells, start=1):
        if comparison.result(cell) is not None:
            listen(event_of(comparison, "reused", cell, number))
            continue
        listen(event_of(comparison, "started", cell, number))
        try:
            comparison.run(cell, listen)
        except Exception as error:  # any failure of a cell is a fact about the table
            failures.append(failed(cell, error))
            listen(event_of(comparison, "failed", cell, number, failures[-1].reason))
        else:
            listen(event_of(comparison, "done", cell, number))
    return finish(comparison, failures, command)


def finish(comparison: Comparison, failures: Sequence[FailedCell], command: str = "") -> ComparisonTable:
    """Build the table of all finished cells, and write the outputs."""
    cells = [result for cell in comparison.cells if (result := comparison.result(cell)) is not None]
    config, settings = comparison.config, comparison.settings
    table = build_table(
        cells,
        failures,
        name=config.name,
        against=settings.against,
        statements=statements(config, stated=settings.data_is_public),
        machine=machine(),
        command=command,
    )
    write_outputs(comparison.out, table, cells)
    return table


def failed(cell: Cell, error: BaseException) -> FailedCell:
    """A cell that could not be finished, with what may be told of why."""
    return FailedCell(arm=cell.arm, seed=cell.seed, epsilon=cell.epsilon, reason=failure_reason(error))


def event_of(
    comparison: Comparison,
    what: Literal["started", "done", "reused", "failed"],
    cell: KeyedCell,
    number: int,
    message: str = "",
) -> CellEvent:
    """The event of a cell, with its share of the grid's work."""
    steps = {one.key: steps_of(comparison.config, find_arm(one.arm)) for one in comparison.cells}
    return CellEvent(what, str(cell), number, len(comparison.cells), steps[cell.key], sum(steps.values()), message)


def join_comparisons(folders: Sequence[Path], out: Path, *, against: str | None = None) -> ComparisonTable:
    """One table of the finished cells of several comparisons, in a new folder.

    Args:
        folders: of 'fedmentor compare'.
        out: a folder that holds no comparison yet.
        against: the arm that differences are taken from; default: that of the first folder.

    Raises:
        ConfigError: other splits, scorers or backbones, or one cell with two settings; with the differences named.
        OutputExistsError: ``out`` is taken.
    """
    if (out / FILE).exists() or (out.exists() and not out.is_dir()):
        raise OutputExistsError(f"output folder {out} already holds a comparison. Nothing was changed. Give another.")
    listed = [(folder, read_file(folder)) for folder in folders]
    chosen: dict[Cell, tuple[KeyedCell, Path, CellResult]] = {}
    for folder, file in listed:
        for cell in file.cells:
            result = read_result(folder, cell)
            if result is None:
                continue
            if chosen:
                _, where, first = next(iter(chosen.values()))
                refuse_other_identity(first.identity, result.identity, f"{folder} (against {where})")
            place = Cell(arm=cell.arm, seed=cell.seed, epsilon=cell.epsilon)
            if place in chosen and chosen[place][0].key != cell.key:
                raise ConfigError(
                    f"{folder} and {chosen[place][1]} both have {place}, with different settings (this / other):\n"
                    + "\n".join(f"  {line}" for line in _settings_differ(folder, cell, *chosen[place][:2]))
                )
            chosen.setdefault(place, (cell, folder, result))
    if not chosen:
        raise ConfigError(f"no finished cell in {', '.join(map(str, folders))}: there is nothing to join.")
    for cell, folder, _ in chosen.values():
        copy_cell(folder, out, cell)
    first_file = listed[0][1]
    stated = any(file.data_is_public for _, file in listed)
    joined = ComparisonFile(
        comparison_id=f"joined-{canonical_sha256(sorted(cell.key for cell, *_ in chosen.values()))[:8]}",
        study=first_file.study,
        config_sha256="",
        against=against or first_file.against,
        data_is_public=stated,
        cells=tuple(cell for cell, *_ in chosen.values()),
    )
    write_text(out / FILE, joined.model_dump_json(indent=2) + "\n")
    cells = [result for *_, result in chosen.values()]
    table = build_table(
        cells,
        name=joined.study,
        against=joined.against,
        statements=["Joined from several comparisons.", *(["Some of them say that their data is public."] * stated)],
    )
    write_outputs(out, table, cells)
    return table


def _settings_differ(folder: Path, cell: KeyedCell, other: KeyedCell, elsewhere: Path) -> list[str]:
    parts = [LocalStore(place / "cells" / key).get_json("cell.json") for place, key in
             ((folder, cell.key), (elsewhere, other.key))]  # fmt: skip
    return differences(parts[0], parts[1])


def machine() -> dict[str, str]:
    """Where a table was computed, for whoever compares its seconds: no name, no path."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "fedmentor": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        "gpu": ", ".join(gpus) or "none",
    }
