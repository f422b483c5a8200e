"""Shows a study's progress: a live view on a terminal, plain lines elsewhere, or nothing.

Listeners are called from worker threads and must never disturb the study: what goes wrong here is dropped.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from fedmentor_core.progress import Listener, ProgressEvent, silent

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Mode = Literal["auto", "live", "plain", "quiet"]
Clock = Callable[[], float]

STAGE_NAMES = {
    "prepare": "preparing",
    "baseline": "scoring the untrained model",
    "train": "training",
    "aggregate": "joining the updates",
    "evaluate": "evaluating",
    "gate": "gate",
    "register": "registering the model",
    "final": "scoring on the test set",
    "report": "writing the report",
    "done": "done",
}
HEARTBEAT_SECONDS = 10.0
MAX_BARS = 12
_IN_ROUND = ("train", "aggregate", "evaluate", "gate")
_ALWAYS_TOLD = ("baseline", "gate", "register", "final", "report", "done")


@contextmanager
def make_listener(mode: Mode = "auto", console: "Console | None" = None) -> Iterator[Listener]:
    """A listener for the length of a ``with`` block.

    Args:
        mode: "auto" is "live" on a terminal and "plain" elsewhere.
        console: where to write; standard output by default (give one on standard error beside ``--json``).

    Guarantees:
        The listener may be called from any thread and never raises. The terminal is restored on every way
        out of the block, ctrl-C included.
    """
    if mode == "quiet":
        yield silent
        return
    from rich.console import Console

    console = console if console is not None else Console()
    vars(console)["on_broken_pipe"] = lambda: _go_quiet(console)
    if mode == "auto":
        mode = "live" if console.is_terminal and not console.is_dumb_terminal else "plain"
    if mode == "plain":
        yield PlainView(console)
        return
    view = LiveView(console)
    with _live(view, console):
        yield view


@dataclass(slots=True)
class Bar:
    """How far one client (or one whole stage) is."""

    completed: int = 0
    total: int = 0


@dataclass
class ProgressState:
    """What is known from the events so far. Not thread-safe: its owner holds a lock."""

    clock: Clock = time.monotonic
    stage: str = "prepare"
    message: str = ""
    n_rounds: int | None = None
    round_index: int | None = None
    counts_from_zero: bool = False
    bars: dict[str, Bar] = field(default_factory=dict)
    domains: set[str] = field(default_factory=set)
    started: float = field(init=False)
    _round_started: float | None = None
    _round_seconds: list[float] = field(default_factory=list)
    _rounds_seen: set[int] = field(default_factory=set)
    _train_from: tuple[float, float] | None = None
    _baseline: tuple[float, float] | None = None
    _guess: float | None = None

    def __post_init__(self) -> None:
        self.started = self.clock()

    def update(self, event: ProgressEvent) -> None:
        """Take in one event."""
        now = self.clock()
        if event.n_rounds is not None:
            self.n_rounds = event.n_rounds
        if event.round_index is not None and event.stage in _IN_ROUND:
            self._enter_round(event.round_index, now)
        if event.stage != self.stage:
            self.stage, self.message = event.stage, ""
            self.bars.clear()
            if event.stage in ("register", "final", "report", "done"):
                self._close_round(now)
        if event.stage == "baseline":
            self._baseline = (self._baseline[0] if self._baseline else now, now)
        if event.domain is not None:
            self.domains.add(event.domain)
        if event.message:
            self.message = event.message
        if event.completed is not None and event.total:
            bar = self.bars.setdefault(event.domain or "", Bar())
            bar.completed, bar.total = min(event.completed, event.total), event.total
            if event.stage == "train" and self._train_from is None:
                self._train_from = (now, self._trained_share())
            elif event.stage == "train" and self._train_from is not None:
                trained = self._trained_share() - self._train_from[1]
                if trained >= 0.1:
                    self._guess = (now - self._train_from[0]) / trained

    @property
    def round_number(self) -> int | None:
        """The current round as people count: from one."""
        if self.round_index is None:
            return None
        return self.round_index + 1 if self.counts_from_zero else self.round_index

    @property
    def rounds_done(self) -> float:
        """Rounds behind us, the current one counted in part."""
        if self.round_number is None:
            return 0.0
        if self.stage not in _IN_ROUND:
            return float(self.n_rounds or self.round_number) if self.stage != "prepare" else 0.0
        return self.round_number - 1 + self._share_of_round()

    @property
    def seconds_elapsed(self) -> float:
        """Since the listener was made."""
        return self.clock() - self.started

    def seconds_left(self) -> float | None:
        """An estimate, or None while there is nothing to go by.

        From the mean of the finished rounds; in the first one from its steps and the time the baseline took.
        """
        number, total = self.round_number, self.n_rounds
        if number is None or total is None or self.stage not in _IN_ROUND or self._round_started is None:
            return None
        in_round = self.clock() - self._round_started
        scoring = (self._baseline[1] - self._baseline[0]) / 2 if self._baseline else 0.0
        if self._round_seconds:
            whole = sum(self._round_seconds) / len(self._round_seconds)
        elif self._guess is not None:
            whole = self._guess + scoring
        else:
            return None
        return max(whole - in_round, 0.0) + (total - number) * whole + scoring

    def _enter_round(self, index: int, now: float) -> None:
        self.counts_from_zero |= index == 0
        if index == self.round_index and self._round_started is not None:
            return
        self._close_round(now)
        self.bars.clear()
        self.round_index, self._round_started, self._train_from = index, now, None

    def _close_round(self, now: float) -> None:
        if self._round_started is not None:
            self._round_seconds.append(now - self._round_started)
            self._round_started = None

    def _trained_share(self) -> float:
        done = sum(bar.completed / bar.total for bar in self.bars.values())
        return done / max(len(self.domains), len(self.bars), 1)

    def _share_of_round(self) -> float:
        if self.stage == "train":
            return 0.6 * self._trained_share()
        if self.stage == "evaluate":
            return 0.65 + 0.3 * self._trained_share()
        return {"aggregate": 0.62, "gate": 0.98}.get(self.stage, 0.0)

    def line_for(self, event: ProgressEvent) -> str:
        """``event`` as one line of text."""
        parts = []
        if event.round_index is not None and self.round_number is not None:
            number = event.round_index + 1 if self.counts_from_zero else event.round_index
            parts.append(f"round {number}" + (f" of {self.n_rounds}" if self.n_rounds else ""))
        stage = STAGE_NAMES.get(event.stage, event.stage)
        if not (event.stage == "done" and event.message) and not event.message.lower().startswith(stage):
            parts.append(stage)
        if event.domain and event.domain not in event.message:
            parts.append(event.domain)
        if event.message:
            parts.append(event.message)
        if event.completed is not None and event.total:
            parts.append(f"{event.completed} of {event.total}")
        return " · ".join(_printable(part) for part in parts)


class PlainView:
    """One line per event that matters: stages, messages, a client's end, and a sign of life in between."""

    def __init__(self, console: "Console", clock: Clock = time.monotonic) -> None:
        self.state = ProgressState(clock)
        self._console, self._clock, self._lock = console, clock, threading.Lock()
        self._told: set[Any] = set()
        self._last_time = clock()

    def __call__(self, event: ProgressEvent) -> None:
        """Take in one event; never raises."""
        with suppress(Exception), self._lock:
            self.state.update(event)
            if self._matters(event):
                self._print(self.state.line_for(event))

    def _matters(self, event: ProgressEvent) -> bool:
        key: tuple[Any, ...] = (event.stage, event.round_index, event.domain)
        if event.completed is None or not event.total:
            key = (*key, event.message)
        elif event.completed < event.total:
            return self._clock() - self._last_time >= HEARTBEAT_SECONDS
        if key in self._told:
            return False
        self._told.add(key)
        return True

    def _print(self, line: str) -> None:
        self._last_time = self._clock()
        left = self.state.seconds_left()
        ending = f" · about {duration(left)} left" if left is not None and left >= 1 else ""
        stamp = time.strftime("%H:%M:%S")
        # out() neither wraps, nor reads markup, nor highlights
        self._console.out(f"{stamp} {line}{ending}", highlight=False)
        with suppress(Exception):
            self._console.file.flush()


class LiveView:
    """Bars that redraw in place; verdicts and other finished things scroll away above them."""

    def __init__(self, console: "Console", clock: Clock = time.monotonic) -> None:
        self.state = ProgressState(clock)
        self._console, self._lock = console, threading.Lock()
        self._told: set[Any] = set()

    def __call__(self, event: ProgressEvent) -> None:
        """Take in one event; never raises."""
        line = ""
        with suppress(Exception), self._lock:
            self.state.update(event)
            key = (event.stage, event.round_index, event.message)
            counted = event.completed is not None and event.total and event.completed < event.total
            if event.stage in _ALWAYS_TOLD and event.message and not counted and key not in self._told:
                self._told.add(key)
                line = self.state.line_for(event)
        if line:  # outside the lock: the refreshing thread holds the console's lock when it asks for ours
            with suppress(Exception):
                from rich.text import Text

                self._console.print(Text(f"  {line}"), highlight=False)

    def __rich__(self) -> "RenderableType":
        """The view now."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        with self._lock:
            state = self.state
            stage = STAGE_NAMES.get(state.stage, state.stage)
            bars = [(name, bar.completed, bar.total) for name, bar in state.bars.items()]
            number, total, done = state.round_number, state.n_rounds, state.rounds_done
            elapsed, left, message = state.seconds_elapsed, state.seconds_left(), state.message
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True, max_width=32, overflow="ellipsis")
        grid.add_column(width=28)
        grid.add_column(no_wrap=True)
        times = f"{duration(elapsed)} gone" + (f", about {duration(left)} left" if left is not None else "")
        if total:
            where = f"round {min(number, total)} of {total}" if number is not None else f"{total} rounds"
            grid.add_row(Text(where, "bold"), _bar(done, total), Text(times))
        else:
            grid.add_row(Text("starting", "bold"), Text(""), Text(times))
        named = [bar for bar in bars if bar[0]]
        for name, completed, of in (named or bars)[:MAX_BARS]:
            bar = _bar(completed, of)
            grid.add_row(Text(f"  {_printable(name or stage)}"), bar, Text(f"{completed} of {of}", "dim"))
        if len(named) > MAX_BARS:
            finished = sum(completed >= of for _, completed, of in named[MAX_BARS:])
            rest = f"  and {len(named) - MAX_BARS} more, {finished} finished"
            grid.add_row(Text(rest, "dim"), Text(""), Text(""))
        doing = stage if not message or message.lower().startswith(stage) else f"{stage}: {message}"
        what = Text(_printable(doing if not message.lower().startswith(stage) else message), "cyan")
        what.no_wrap, what.overflow = True, "ellipsis"
        return Group(grid, what)


def _bar(completed: float, total: float) -> "RenderableType":
    from rich.progress_bar import ProgressBar

    return ProgressBar(total=total, completed=completed, width=28, complete_style="cyan", finished_style="green")


@contextmanager
def _live(view: LiveView, console: "Console") -> Iterator[None]:
    from rich.live import Live

    live = Live(view, console=console, refresh_per_second=5, transient=True)
    with suppress(Exception):  # another live view on this console: lines are still printed
        live.start()
    try:
        yield
    finally:
        with suppress(Exception):
            live.stop()
        with suppress(Exception):
            console.show_cursor(True)


def _go_quiet(console: "Console") -> None:
    """Whoever read our lines has gone (``| head``): rich would end the program, but the study goes on."""
    console.quiet = True
    with suppress(Exception):
        if console.file is sys.stdout:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)


def duration(seconds: float) -> str:
    """``47 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole < 600 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _printable(text: str) -> str:
    """One line without control characters, so that no message can steer the terminal."""
    return "".join(char if char.isprintable() else " " for char in text).strip()
