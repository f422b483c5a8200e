"""How far a deployed comparison is: a progress artifact of its run, and a line in its log for every cell that ended."""

import time
from collections.abc import Callable

from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from fedmentor_core.compare.arms import find_arm
from fedmentor_core.compare.comparison import Comparison
from fedmentor_core.compare.grid import steps_of
from fedmentor_core.compare.records import KeyedCell
from flows.progress_view import duration


class GridProgress:
    """Of one flow run; cells that an earlier run finished count as done. Time left goes by optimiser steps."""

    def __init__(self, made: Comparison, comparison_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Publish the artifact; it and the log belong to the flow run that this is called in."""
        self._clock, self._started = clock, clock()
        self._steps = {cell.key: steps_of(made.config, find_arm(cell.arm)) for cell in made.cells}
        self._missing = {cell.key for cell in made.cells if made.result(cell) is None}
        self._to_do = self._steps_of(self._missing)
        self._artifact = create_progress_artifact(
            progress=self._percent(),
            key=f"{comparison_id}-cells".replace("_", "-"),
            description="Cells of the comparison that have ended, by optimiser steps.",
        )

    def ended(self, cell: KeyedCell, *, failed: bool) -> None:
        """Say that ``cell`` is finished or failed; nothing where it was finished before."""
        if cell.key not in self._missing:
            return
        self._missing.remove(cell.key)
        number, total = len(self._steps) - len(self._missing), len(self._steps)
        left = self.seconds_left()
        ending = f" · about {duration(left)} left in all" if left else ""
        get_run_logger().info("cell %d of %d: %s %s%s", number, total, cell, "failed" if failed else "done", ending)
        update_progress_artifact(artifact_id=self._artifact, progress=self._percent())

    def seconds_left(self) -> float | None:
        """As long as the steps that are missing take at the pace until now; None before a cell with steps ended."""
        missing = self._steps_of(self._missing)
        behind = self._to_do - missing
        return (self._clock() - self._started) * missing / behind if behind else None

    def _percent(self) -> float:
        total = sum(self._steps.values())
        missing = self._steps_of(self._missing)
        return 100.0 * (1 - (missing / total if total else len(self._missing) / len(self._steps)))

    def _steps_of(self, keys: set[str]) -> int:
        return sum(self._steps[key] for key in keys)
