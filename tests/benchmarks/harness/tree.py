"""A process with all its children, from Linux' /proc: how much memory they hold together, and what they computed.

Shared pages count once (``Pss``), so that forked workers are not charged for what they share. A child that ended
between two looks is missing with what it computed since the first of them.
"""

import os
import threading
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


class ProcessTree:
    """Watches this process and its descendants while a block runs; a context manager.

    Attributes:
        peak_bytes: most memory that they held together at one look.
        cpu_seconds: processor time of all of them within the block.
    """

    def __init__(self, every_seconds: float = 0.5) -> None:
        """Nothing is looked at yet. ``every_seconds``: between two looks."""
        self._every = every_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._used: dict[int, float] = {}
        self._before: dict[int, float] = {}
        self.peak_bytes = 0

    @property
    def cpu_seconds(self) -> float:
        """Of children that began before the block, only what they computed in it."""
        return sum(seconds - self._before.get(pid, 0.0) for pid, seconds in self._used.items())

    def __enter__(self) -> "ProcessTree":
        self._before = {pid: _computed(pid) for pid in _family()}
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._ended.wait(self._every):
            self._look()

    def _look(self) -> None:
        family = _family()
        self._used |= {pid: seconds for pid in family if (seconds := _computed(pid)) > 0}
        self.peak_bytes = max(self.peak_bytes, sum(map(_held, family)))


def _family() -> list[int]:
    """This process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(folder.name))
        if fields:
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found


def _computed(pid: int) -> float:
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS if fields else 0.0


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty where the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _held(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
