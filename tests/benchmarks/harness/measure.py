"""Arms in turns: every arm once, then every arm again, so that a busy moment of the machine falls on all of them."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

from harness.plan import Arm, Benchmark, Plan, Sample, Scale
from harness.process import ArmFailedError, ArmProcess, ArmSkippedError
from harness.results import ArmResult, BenchmarkResult, ratios_of

Found = TypeVar("Found")
Tell = Callable[[str, float], None]
"""What is being done, and which part of the benchmark is done, from 0 to 1."""


class Measurement:
    """One plan while it is carried out. An arm that fails is out from then on; the others go on."""

    def __init__(self, plan: Plan, tell: Tell) -> None:
        """Nothing is started yet."""
        self._plan = plan
        self._tell = tell
        self._out: dict[str, ArmResult] = {}
        self.samples: dict[str, list[Sample]] = {arm.name: [] for arm in plan.arms}

    def run(self) -> None:
        """Measure every arm in every turn."""
        with ExitStack() as stack:
            kept = {} if self._plan.fresh else self._prepared(stack)
            turns = self._plan.warm_up + self._plan.turns
            for turn in range(turns):
                for place, arm in enumerate(self._plan.arms):
                    if arm.name in self._out:
                        continue
                    counted = turn >= self._plan.warm_up
                    what = f"turn {turn - self._plan.warm_up + 1} of {self._plan.turns}" if counted else "warm-up"
                    self._tell(f"{what}, {arm.name}", (turn + place / len(self._plan.arms)) / turns)
                    sample = self._turn(arm, kept)
                    if sample is not None and counted:
                        self.samples[arm.name].append(sample)

    def _prepared(self, stack: ExitStack) -> dict[str, ArmProcess]:
        """The process of every arm. Nothing is measured yet, so two are prepared at a time."""
        self._tell("preparing the arms", 0.0)
        kept: dict[str, ArmProcess] = {}
        with ThreadPoolExecutor(max_workers=2) as pool:
            starting = {arm.name: pool.submit(ArmProcess, arm) for arm in self._plan.arms}
            for name, one in starting.items():
                process = self._unless_out(name, one.result)
                if process is not None:
                    kept[name] = stack.enter_context(process)
        return kept

    def _turn(self, arm: Arm, kept: dict[str, ArmProcess]) -> Sample | None:
        def fresh() -> Sample:
            with ArmProcess(arm) as process:
                return process.turn()

        return self._unless_out(arm.name, fresh if self._plan.fresh else kept[arm.name].turn)

    def _unless_out(self, name: str, ask: Callable[[], Found]) -> Found | None:
        """What the arm gives; one that cannot give it is out from then on."""
        try:
            return ask()
        except ArmSkippedError as reason:
            self._out[name] = ArmResult(name, skipped=str(reason))
        except ArmFailedError as error:
            self._out[name] = ArmResult(name, failed=str(error))
        return None

    @property
    def results(self) -> list[ArmResult]:
        """Every arm, in the plan's order."""
        return [self._out.get(arm.name) or ArmResult.of(arm.name, self.samples[arm.name]) for arm in self._plan.arms]

    @property
    def complete(self) -> dict[str, list[Sample]]:
        """The samples of the arms that ran in all turns."""
        return {name: samples for name, samples in self.samples.items() if name not in self._out}


def measure(one: Benchmark, scale: Scale, tell: Tell) -> BenchmarkResult:
    """Carry out a benchmark. Whatever goes wrong in it is in the result: it never ends the others."""
    started = time.monotonic()
    try:
        plan = one.plan(scale)
        _check(plan)
        measurement = Measurement(plan, tell)
        measurement.run()
    except Exception as error:
        return BenchmarkResult(one.name, one.title, (), {}, (), (), time.monotonic() - started, failed=_told(error))
    ratios, found, failed = ratios_of(plan, measurement.complete), [], None
    if plan.conclude is not None:
        try:
            found = list(plan.conclude(measurement.complete))
        except Exception as error:  # most often an arm that it needs failed: the others' figures are still good
            failed = f"nothing could be concluded ({_told(error)})"
    return BenchmarkResult(
        name=one.name,
        title=one.title,
        arms=measurement.results,
        ratios={ratio.name: ratio.value for ratio in ratios},
        findings=[*ratios, *found],
        notes=list(plan.notes),
        seconds=time.monotonic() - started,
        failed=failed,
    )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _check(plan: Plan) -> None:
    names = [arm.name for arm in plan.arms]
    if len(set(names)) != len(names):
        raise ValueError(f"Expected arms with names of their own, got {names}.")
    unknown = {name for ratio in plan.ratios for name in (ratio.of, ratio.to)} - set(names)
    if unknown:
        raise ValueError(f"Expected ratios between arms {names}, got {sorted(unknown)}.")
