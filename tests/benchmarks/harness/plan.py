"""What is to be measured: benchmarks, their arms, and the questions that are asked of the figures."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any


class SkipArmError(Exception):
    """Raised by an arm's preparation: it cannot run here, and why. That is no failure."""


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        quick: sizes that take seconds: to try the benchmark, not to quote it.
        gpu: the GPU set; False: the CPU set.
    """

    quick: bool = False
    gpu: bool = False


@dataclass(frozen=True)
class Sample:
    """One turn of an arm. What is None is measured by the harness.

    Attributes:
        seconds: where the turn times itself, because it does more than what is to be timed.
        peak_bytes: where the turn measured another process than its own.
        bytes: traffic or size, where the benchmark is about that.
        figures: more numbers by name, with their unit in it: ``mb_per_second``.
    """

    seconds: float | None = None
    peak_bytes: int | None = None
    bytes: int | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


Turn = Callable[[], Sample | None]


@dataclass(frozen=True)
class Arm:
    """One way of doing the thing.

    Attributes:
        name: unique in its benchmark.
        prepare: a function of a benchmark file, by whose name the arm's own process finds it. Called once there with
            ``settings``; what it returns is called once a turn.
        settings: plain values; they cross to the other process as JSON.
        python: another interpreter, for a rival's packages; None: this one.
        limit_seconds: longest preparation and longest turn; what takes longer is ended and reported.
    """

    name: str
    prepare: Callable[..., Turn]
    settings: Mapping[str, Any] = field(default_factory=dict)
    python: str | None = None
    limit_seconds: float = 900.0


@dataclass(frozen=True)
class Ratio:
    """A question: how much of something one arm takes, over what another takes.

    Attributes:
        name: what it is called in the results.
        of: name of the arm above the line.
        to: name of the arm below it.
        what: ``seconds``, ``cpu_seconds``, ``peak_bytes``, ``growth_bytes``, ``bytes``, or another of the figures.
        at_most: the target, where there is one.
    """

    name: str
    of: str
    to: str
    what: str = "seconds"
    at_most: float | None = None


@dataclass(frozen=True)
class Finding:
    """A number that a benchmark draws from all its arms, such as a fitted exponent, and its target if it has one."""

    name: str
    value: float
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        if self.at_most is None and self.at_least is None:
            return None
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )


@dataclass(frozen=True)
class Plan:
    """What one benchmark measures.

    Attributes:
        arms: measured in turns, in this order.
        ratios: of pairs of arms.
        turns: how often each arm is measured.
        warm_up: turns before those, which are not counted.
        fresh: a new process for every turn, so that each peak of memory is that of one turn alone; else an arm keeps
            its process, prepared once, over all turns.
        conclude: further findings, from the samples of each arm by name. Arms that failed are missing from them.
        notes: sentences that a reader of the figures needs.
    """

    arms: Sequence[Arm]
    ratios: Sequence[Ratio] = ()
    turns: int = 5
    warm_up: int = 0
    fresh: bool = False
    conclude: Callable[[Mapping[str, Sequence[Sample]]], Sequence[Finding]] | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Benchmark:
    """A registered benchmark: a name, a title, and the function that plans it."""

    name: str
    title: str
    plan: Callable[[Scale], Plan]
    minutes: float
    gpu: bool
    cpu: bool


_registered: dict[str, Benchmark] = {}


def benchmark(
    name: str, *, title: str, minutes: float, gpu: bool = False, cpu: bool = True
) -> Callable[[Callable[[Scale], Plan]], Callable[[Scale], Plan]]:
    """Register a benchmark.

    Args:
        name: what ``--only`` calls it.
        title: what it asks, in a line.
        minutes: about how long it takes on two cores: the first guess at the time left.
        gpu: part of the GPU set.
        cpu: part of the CPU set.
    """

    def register(plan: Callable[[Scale], Plan]) -> Callable[[Scale], Plan]:
        _registered[name] = Benchmark(name, title, plan, minutes, gpu, cpu)
        return plan

    return register


def discover(folder: Path) -> list[Benchmark]:
    """The benchmarks of all ``bench_*.py`` in a folder, by file name and then in the order of the file."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    for path in sorted(folder.glob("bench_*.py")):
        importlib.import_module(path.stem)
    found = [
        one for one in _registered.values() if Path(sys.modules[one.plan.__module__].__file__ or "").parent == folder
    ]
    return sorted(found, key=lambda one: one.plan.__module__)


def median_of(samples: Sequence[Sample], what: str = "seconds") -> float:
    """Median over the turns of one of a sample's numbers.

    Raises:
        KeyError: not every turn has that number.
    """
    return float(median(number(sample, what) for sample in samples))


def number(sample: Sample, what: str) -> float:
    """One of a sample's numbers by name.

    Raises:
        KeyError: the sample does not have it.
    """
    found = getattr(sample, what) if what in ("seconds", "peak_bytes", "bytes") else sample.figures.get(what)
    if found is None:
        raise KeyError(what)
    return float(found)
