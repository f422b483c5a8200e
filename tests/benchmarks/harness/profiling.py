"""Where an arm's time goes: its turns under Python's own profiler, as a table.

What is counted is processor time, so other work on the machine hardly changes it; the profiler itself takes some for
every call of Python, so compare shares, and take times from a run without it.
"""

import cProfile
import pstats
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from harness.plan import Plan, Turn
from harness.process import ArmFailedError, ArmProcess, ArmSkippedError

WARM_UP, TURNS, LINES = 2, 5, 40


@dataclass(frozen=True)
class Spent:
    """One function in one turn: how often it was called, and its processor seconds without and with what it called."""

    function: str
    calls: float
    own: float
    whole: float


def profiled(turn: Turn) -> list[Spent]:
    """The functions that take the most, those they call included; of each the median over some turns."""
    for _ in range(WARM_UP):
        turn()
    turns = [_one(turn) for _ in range(TURNS)]
    found = [
        Spent(name, *(median(row[place] for row in rows) for place in range(3)))
        for name in set().union(*turns)
        if len(rows := [one[name] for one in turns if name in one]) == TURNS
    ]
    return sorted(found, key=lambda spent: -spent.whole)[:LINES]


def _one(turn: Turn) -> dict[str, tuple[float, float, float]]:
    profiler = cProfile.Profile(time.process_time)
    profiler.runcall(turn)
    found: dict[str, tuple[float, float, float]] = {}
    for (file, _, name), (_, calls, own, whole, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        label = name if file == "~" else f"{Path(file).parent.name}/{Path(file).name}: {name}"
        before = found.get(label, (0.0, 0.0, 0.0))
        found[label] = (before[0] + calls, before[1] + own, max(before[2], whole))
    return found


def profile_of(name: str, plan: Plan) -> str:
    """A Markdown table for each arm of a benchmark; an arm that fails or cannot run here says so."""
    parts = [f"# Profile of {name}\n\nProcessor milliseconds of a turn, median of {TURNS}.\n"]
    for arm in plan.arms:
        try:
            with ArmProcess(arm) as process:
                parts.append(f"## {arm.name}\n\n{_table([Spent(**row) for row in process.profile()])}\n")
        except (ArmFailedError, ArmSkippedError) as reason:
            parts.append(f"## {arm.name}\n\n{reason}\n")
    return "\n".join(parts)


def _table(rows: Sequence[Spent]) -> str:
    lines = [f"| {r.whole * 1e3:.2f} | {r.own * 1e3:.2f} | {r.calls:g} | `{r.function}` |" for r in rows]
    return "\n".join(["| with what it calls | own | calls | function |", "|---|---|---|---|", *lines])
