"""What was measured: medians, spreads and ratios, as bench.json and as Markdown.

The spread is the distance between the quartiles. A ratio is the median, over the turns, of what two arms took in the
same turn: on a machine that others use too, what slows one turn slows both arms of it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from harness.plan import Finding, Plan, Sample, median_of, number


@dataclass(frozen=True)
class ArmResult:
    """One arm over all turns.

    Attributes:
        median_seconds: of a turn.
        spread: distance between the quartiles, in seconds.
        peak_bytes: most memory of the arm's process (of the GPU where it uses one), median over the turns.
        bytes: traffic or size, where the benchmark is about that.
        figures: medians of further numbers.
        turns: how many were counted.
        failed: why there are no figures; None: there are.
        skipped: why the arm cannot run here.
    """

    name: str
    median_seconds: float | None = None
    spread: float | None = None
    peak_bytes: int | None = None
    bytes: int | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    turns: int = 0
    failed: str | None = None
    skipped: str | None = None

    @classmethod
    def of(cls, name: str, samples: Sequence[Sample]) -> "ArmResult":
        """Sum up the turns of an arm."""
        shared = set.intersection(*(set(sample.figures) for sample in samples))
        return cls(
            name=name,
            median_seconds=median_of(samples),
            spread=spread_of([number(sample, "seconds") for sample in samples]),
            peak_bytes=_whole_median(samples, "peak_bytes"),
            bytes=_whole_median(samples, "bytes"),
            figures={what: median_of(samples, what) for what in sorted(shared)},
            turns=len(samples),
        )


@dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark: its arms, the ratios between them, and what was found."""

    name: str
    title: str
    arms: Sequence[ArmResult]
    ratios: Mapping[str, float]
    findings: Sequence[Finding]
    notes: Sequence[str]
    seconds: float
    failed: str | None = None

    @property
    def problems(self) -> list[str]:
        """What failed, a line each."""
        own = [f"{self.name}: {self.failed}"] if self.failed else []
        return own + [f"{self.name}, {arm.name}: {arm.failed}" for arm in self.arms if arm.failed]


@dataclass(frozen=True)
class Report:
    """All benchmarks of one call, with the machine and the versions: ``bench.json``."""

    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    benchmarks: Sequence[BenchmarkResult]

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write ``bench.json`` and ``bench.md``, anew after each benchmark, so that nothing is lost to a later one."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = folder / "bench.json", folder / "bench.md"
        paths[0].write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        paths[1].write_text(self.as_markdown(), encoding="utf-8")
        return paths

    def as_markdown(self) -> str:
        """A table per benchmark, and what was found below it."""
        machine = ", ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in self.machine.items())
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        parts = [f"# Benchmarks\n\nMachine: {machine}.\n\nVersions: {versions}.\n"]
        return "\n".join(parts + [_section(result) for result in self.benchmarks])


def ratios_of(plan: Plan, samples: Mapping[str, Sequence[Sample]]) -> list[Finding]:
    """The plan's ratios. One whose arms did not both run, or lack the number, is left out."""
    found = []
    for ratio in plan.ratios:
        try:
            pairs = list(zip(samples[ratio.of], samples[ratio.to], strict=True))
            value = median(number(above, ratio.what) / number(below, ratio.what) for above, below in pairs)
        except (KeyError, ValueError, ZeroDivisionError):
            continue
        found.append(Finding(ratio.name, value, at_most=ratio.at_most))
    return found


def spread_of(values: Sequence[float]) -> float:
    """Distance between the quartiles; 0 of one value."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low


def _whole_median(samples: Sequence[Sample], what: str) -> int | None:
    try:
        return round(median_of(samples, what))
    except KeyError:
        return None


def _section(result: BenchmarkResult) -> str:
    lines = [f"## {result.name}: {result.title}", ""]
    if result.failed:
        lines += [f"Failed: {result.failed}", ""]
    if result.arms:
        lines += ["| arm | median | spread | peak memory | bytes | more |", "|---|---|---|---|---|---|"]
        lines += [_row(arm) for arm in result.arms]
        lines.append("")
    lines += [f"- {_line(finding)}" for finding in result.findings]
    lines += [f"- {note}" for note in result.notes]
    return "\n".join([*lines, ""])


def _row(arm: ArmResult) -> str:
    if arm.median_seconds is None or arm.spread is None:
        return f"| {arm.name} | {'failed' if arm.failed else 'skipped'}: {arm.failed or arm.skipped} | | | | |"
    more = ", ".join(f"{_named(name, value)}" for name, value in arm.figures.items())
    return (
        f"| {arm.name} | {seconds(arm.median_seconds)} | {seconds(arm.spread)} | {_megabytes(arm.peak_bytes)} "
        f"| {_megabytes(arm.bytes)} | {more} |"
    )


def _line(finding: Finding) -> str:
    said = f"{finding.name}: {finding.value:.4g}{' ' if finding.unit else ''}{finding.unit}"
    if finding.met is None:
        return said
    bound = f"at most {finding.at_most:g}" if finding.at_most is not None else f"at least {finding.at_least:g}"
    return f"{said} (target {bound}: {'reached' if finding.met else '**missed**'})"


def _named(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return f"{name.removesuffix('_bytes').replace('_', ' ')} {_megabytes(value)}"
    return f"{name.replace('_', ' ')} {value:.4g}"


def seconds(value: float) -> str:
    """A duration as a reader wants it."""
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def _megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:,.4g} MB"


def _plain(value: Any) -> str:
    return ", ".join(f"{one:.2f}" for one in value) if isinstance(value, list | tuple) else str(value)
