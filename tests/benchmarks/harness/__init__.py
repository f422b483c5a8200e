"""What a benchmark is made of: arms that are measured in turns, each in a process of its own, and what they show.

A benchmark file is ``bench_<subject>.py`` beside this folder. It registers one or more functions:

    @benchmark("copy", title="Copying a list", minutes=0.5)
    def copy(scale: Scale) -> Plan:
        return Plan(
            arms=[Arm("slice", by_slice, {"n": 1_000}), Arm("loop", by_loop, {"n": 1_000})],
            ratios=[Ratio("loop over slice", of="loop", to="slice")],
        )

    def by_slice(n: int) -> Turn:          # runs once in the arm's process: what is not to be timed
        numbers = list(range(n))
        return lambda: numbers[:] and None  # runs once a turn, and is timed

Nothing but the standard library is imported here: an arm may run under another Python, with a rival's packages.
"""

from harness.plan import (
    Arm,
    Benchmark,
    Finding,
    Plan,
    Ratio,
    Sample,
    Scale,
    SkipArmError,
    Turn,
    benchmark,
    discover,
    median_of,
)
from harness.results import ArmResult, BenchmarkResult, Report

__all__ = [
    "Arm",
    "ArmResult",
    "Benchmark",
    "BenchmarkResult",
    "Finding",
    "Plan",
    "Ratio",
    "Report",
    "Sample",
    "Scale",
    "SkipArmError",
    "Turn",
    "benchmark",
    "discover",
    "median_of",
]
