"""What a comparison shows on the terminal: the grid while it runs, the estimate before, and the table at the end."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmentor_core.compare.budgets import PlannedLoss
from fedmentor_core.compare.comparison import Comparison
from fedmentor_core.compare.outputs import CSV, HEADLINE, JSON, MARKDOWN, PAGE
from fedmentor_core.compare.records import ComparisonTable, Estimate
from fedmentor_core.compare.run import CellEvent, GridListener, unheard
from fedmentor_core.compare.table import FINAL_METRICS, INTERVALS
from fedmentor_core.compare.timing import TimeEstimate
from fedmentor_core.progress import ProgressEvent
from flows.progress_view import LiveView, Mode, PlainView, duration

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


@dataclass
class GridState:
    """How far the grid is. Time left goes by the optimiser steps of finished cells."""

    clock: Callable[[], float] = time.monotonic
    number: int = 0
    total: int = 0
    cell: str = "preparing"
    steps_total: int = 0
    steps_behind: int = 0
    started: float = field(init=False)
    _cell_started: float | None = None
    _timed_seconds: float = 0.0
    _timed_steps: int = 0

    def __post_init__(self) -> None:
        self.started = self.clock()

    def update(self, event: CellEvent) -> None:
        """Take in the start or the end of a cell."""
        self.number, self.total, self.steps_total = event.number, event.total, event.steps_total
        self.cell = event.cell
        if event.what == "started":
            self._cell_started = self.clock()
            return
        self.steps_behind += event.steps
        if event.what == "done" and self._cell_started is not None and event.steps:
            self._timed_seconds += self.clock() - self._cell_started
            self._timed_steps += event.steps
        self._cell_started = None

    def seconds_left(self, cell_left: float | None = None) -> float | None:
        """An estimate, or None while there is nothing to go by.

        Args:
            cell_left: what the current cell says it still needs, used while no cell is finished.
        """
        in_cell = 0.0 if self._cell_started is None else self.clock() - self._cell_started
        left = self.steps_total - self.steps_behind
        if self._timed_steps:
            return max(0.0, left * self._timed_seconds / self._timed_steps - in_cell)
        if cell_left is None or self._cell_started is None:
            return None
        n_left = self.total - self.number
        return cell_left + n_left * (in_cell + cell_left)

    def line_for(self, event: CellEvent) -> str:
        """The event as one line of text."""
        said = {"started": "", "done": " done", "reused": " was finished before", "failed": f" FAILED: {event.message}"}
        return f"cell {event.number} of {event.total}: {event.cell}{said[event.what]}"


class GridView:
    """The grid above, and below it the current cell as ``fedmentor run`` shows a study."""

    def __init__(self, console: "Console", inner: Callable[["Console"], LiveView | PlainView]) -> None:
        self.state = GridState()
        self._console, self._inner = console, inner
        self.cell_view = inner(console)

    def __call__(self, event: CellEvent | ProgressEvent) -> None:
        """Take in one event; never raises."""
        with suppress(Exception):
            if isinstance(event, ProgressEvent):
                self.cell_view(event)
                return
            self.state.update(event)
            if event.what == "started":
                self.cell_view = self._inner(self._console)
            if event.what != "started" or isinstance(self.cell_view, PlainView):
                left = self.state.seconds_left()
                ending = f" · about {duration(left)} left in all" if left else ""
                self._console.out(f"{time.strftime('%H:%M:%S')} {self.state.line_for(event)}{ending}", highlight=False)

    def __rich__(self) -> "RenderableType":
        """The view now."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        state = self.state
        left = state.seconds_left(self.cell_view.state.seconds_left())
        gone = duration(state.clock() - state.started)
        grid = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(1, state.steps_total), completed=state.steps_behind, width=28)
        where = f"cell {state.number} of {state.total}" if state.total else "preparing"
        grid.add_row(
            Text(where, "bold"), bar, Text(f"{gone} gone" + (f", about {duration(left)} left" if left else ""))
        )
        parts: list[Any] = [grid, Text(state.cell, "bold cyan")]
        return Group(*parts, self.cell_view) if isinstance(self.cell_view, LiveView) else Group(*parts)


@contextmanager
def make_grid_listener(mode: Mode = "auto") -> Iterator[GridListener]:
    """A listener for the length of a ``with`` block; see ``progress_view.make_listener`` for the modes."""
    if mode == "quiet":
        yield unheard
        return
    from rich.console import Console
    from rich.live import Live

    console = Console()
    live = mode == "live" or (mode == "auto" and console.is_terminal and not console.is_dumb_terminal)
    if not live:
        yield GridView(console, PlainView)
        return
    view = GridView(console, LiveView)
    shown = Live(view, console=console, refresh_per_second=4, transient=True)
    with suppress(Exception):
        shown.start()
    try:
        yield view
    finally:
        with suppress(Exception):
            shown.stop()


def print_grid(comparison: Comparison, planned: PlannedLoss, time_needed: TimeEstimate) -> None:
    """What would be run, how long it takes and what it would cost: the answer of ``--dry-run``."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"Grid of {comparison.config.name}: {len(comparison.cells)} cells", title_justify="left")
    for heading in ("cell", "state", "key"):
        table.add_column(heading)
    for cell in comparison.cells:
        table.add_row(str(cell), "to run" if comparison.result(cell) is None else "finished", cell.key[:12])
    console.print(table)
    speed = time_needed.speed
    print(
        f"To run: {time_needed.n_cells} cells, about {duration(time_needed.seconds)} at {speed.seconds_per_step:.2f} s "
        f"a step and {speed.seconds_per_row:.2f} s an evaluated row."
    )
    if planned.n_cells:
        print(
            f"On private data its {planned.n_cells} private cells would cost, in sum: "
            + ", ".join(f"{name} epsilon {planned.epsilon[name]:.4g}" for name in planned.epsilon)
            + ". A comparison is for public or invented data only."
        )


def print_table(table: ComparisonTable, out: Path) -> None:
    """The table, the differences, what must be said, and where the files are."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    shown = [name for name in HEADLINE if any(name in arm.metrics for arm in table.arms)]
    rows = Table(title=f"{table.name}: test set, after the last round", title_justify="left")
    rows.add_column("arm")
    rows.add_column("privacy", no_wrap=True)
    rows.add_column("seeds", justify="right")
    for name in shown:
        rows.add_column(name, justify="right")
    for arm in table.arms:
        privacy = "private" if arm.private else "-" if arm.name == "base" else "[red]NOT PRIVATE[/]"
        rows.add_row(arm.name, privacy, str(len(arm.seeds)), *(_cell(arm.metrics.get(name)) for name in shown))
    console.print(rows)
    if table.differences:
        gaps = Table(title=f"Differences from {table.against}, paired by seed", title_justify="left")
        gaps.add_column("arm")
        for name in shown:
            gaps.add_column(name, justify="right")
        for arm in table.arms:
            own = {one.metric: one for one in table.differences if one.arm == arm.name}
            if own:
                gaps.add_row(
                    arm.name,
                    *(
                        f"{own[name].mean:+.4f}"
                        + ("" if own[name].p_value is None else f" (p {own[name].p_value:.2g})")
                        if name in own
                        else "-"
                        for name in shown
                    ),
                )
        console.print(gaps)
    if table.frontier:
        points = Table(title="Every domain at one epsilon", title_justify="left")
        points.add_column("epsilon", justify="right")
        for name in shown:
            points.add_column(name, justify="right")
        for point in table.frontier:
            epsilon = "not private" if point.epsilon is None else f"{point.epsilon:g}"
            points.add_row(epsilon, *(_cell(point.metrics.get(name)) for name in shown))
        console.print(points)
    print(f"{FINAL_METRICS} {INTERVALS if table.differences else ''}")
    for warning in table.warnings:
        console.print(f"  warning: {warning}", style="yellow", markup=False)
    for one in table.failures:
        console.print(f"  FAILED: {one}: {one.reason}", style="red", markup=False)
    print(f"Report: {(out / PAGE).resolve()}   also {JSON}, {CSV}, {MARKDOWN}")


def _cell(found: Estimate | None) -> str:
    if found is None:
        return "-"
    return f"{found.mean:.4f}" + ("" if found.ci95 is None else f" ± {(found.ci95[1] - found.ci95[0]) / 2:.4f}")
