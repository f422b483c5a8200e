"""What Prefect costs: per mapped client where clients do nothing, and as a share of a study that does real work."""

import importlib
import itertools
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness import Arm, Finding, Plan, Sample, Scale, Turn, benchmark, median_of
from harness.tree import ProcessTree

QUICKSTART = Path(__file__).resolve().parents[2] / "infra" / "configs" / "quickstart.yaml"
MS_PER_CLIENT, SHARE_OF_ROUND = 10.0, 0.05
SMALL = ["training.steps_per_round=1", "evaluation.max_gate_examples=4", "evaluation.max_test_examples=4"]


@benchmark("orchestration", title="milliseconds per mapped client that does nothing", minutes=1.0)
def orchestration(scale: Scale) -> Plan:
    """A real flow on a real Prefect server, as ``fedmentor run`` starts it; server and flow run are there already."""
    counts = (20, 100) if scale.quick else (100, 1_000)

    def conclude(samples: Mapping[str, Sequence[Sample]]) -> list[Finding]:
        name = _mapped(counts[-1])
        found = median_of(samples[name], "ms_per_client")
        return [Finding(f"milliseconds per client, {name}", found, "ms", at_most=MS_PER_CLIENT)]

    return Plan(
        arms=[
            *(Arm(_mapped(count), mapped_clients, {"count": count}) for count in counts),
            Arm(f"bare threads, {counts[-1]:,} clients", bare_threads, {"count": counts[-1]}),
        ],
        turns=2 if scale.quick else 3,
        warm_up=1,
        conclude=conclude,
        notes=[
            "The task has the options, the arguments and the wrapper of train_client, and the flow its task runner."
        ],
    )


@benchmark("orchestration-share", title="what a real study through Prefect does outside of its steps", minutes=3.0)
def orchestration_share(scale: Scale) -> Plan:
    """The quickstart's three domains, model and scorers, one round; tracking off.

    A step is one client's training, the aggregation, one domain's evaluation or the gate's verdict. All else is counted
    as orchestration, the study's own records and its report too, so the share is an upper bound. It is taken inside one
    run: the difference of two long runs would show the machine's other work, not a few per cent.
    """
    changes = ["rounds=1", "tracking.enabled=false", "privacy.noise_seed=1"]
    if scale.quick:
        changes += SMALL

    def conclude(samples: Mapping[str, Sequence[Sample]]) -> list[Finding]:
        taken = samples["through Prefect"]
        return [
            Finding("share of orchestration, by the clock", median_of(taken, "share_by_clock"), at_most=SHARE_OF_ROUND),
        ]

    return Plan(
        arms=[Arm("through Prefect", mapped_study, {"changes": changes}, limit_seconds=3_600.0)],
        turns=1 if scale.quick else 2,
        conclude=conclude,
        notes=[
            "Start-up (imports, backbone, scorers, Prefect's server) is in a small study before the first turn.",
            "Processor time and memory are those of the whole process tree, Prefect's server included.",
        ],
    )


def _mapped(count: int) -> str:
    return f"{count:,} clients"


# --- what the arms do --------------------------------------------------------------------------------------------


def mapped_clients(count: int) -> Turn:
    """A flow that maps a task which does nothing over ``count`` assignments, and waits for all results."""
    folder = prefect_folder()
    from prefect import flow, task
    from prefect.cache_policies import NO_CACHE

    from fedmentor_core.config import ExecutionConfig
    from fedmentor_core.discretion import discreet
    from fedmentor_core.records import ClientAssignment
    from fedmentor_core.study_ref import StudyRef
    from flows.task_runners import same_for_all, thread_runner
    from tasks.policies import worth_retrying

    ref, assignments = _study_with(count)

    @task(
        name="train-client",
        task_run_name="train {assignment.domain} round {assignment.round_index}",
        cache_policy=NO_CACHE,
        persist_result=False,
        log_prints=False,
        retry_condition_fn=worth_retrying,
        retry_delay_seconds=1,
        retries=1,
    )
    @discreet
    def train_nothing(ref: StudyRef, assignment: ClientAssignment) -> str:
        return assignment.domain

    @flow(name="round", task_runner=thread_runner(ExecutionConfig()), persist_result=False, log_prints=False)
    def one_round() -> float:
        started = time.perf_counter()
        futures = train_nothing.map(same_for_all(ref, ref.config.execution), assignments)
        names = [future.result() for future in futures]
        seconds = time.perf_counter() - started
        assert names == [assignment.domain for assignment in assignments]
        return seconds

    def turn() -> Sample:
        assert folder  # lives as long as the arm
        computed = time.process_time()
        seconds = one_round()
        computed = time.process_time() - computed
        return Sample(
            seconds, figures={"ms_per_client": 1e3 * seconds / count, "cpu_ms_per_client": 1e3 * computed / count}
        )

    return turn


def bare_threads(count: int) -> Turn:
    """The same calls through a thread pool: what is left is Prefect's."""
    ref, assignments = _study_with(count)

    def nothing(pair: tuple[Any, Any]) -> str:
        return str(pair[1].domain)

    def turn() -> Sample:
        started = time.perf_counter()
        with ThreadPoolExecutor(max_workers=1) as pool:
            list(pool.map(nothing, zip(itertools.repeat(ref), assignments)))
        seconds = time.perf_counter() - started
        return Sample(seconds, figures={"ms_per_client": 1000 * seconds / count})

    return turn


def _study_with(count: int) -> tuple[Any, list[Any]]:
    from fedmentor_core.config_io import load_config
    from fedmentor_core.records import ArtifactRef, ClientAssignment
    from fedmentor_core.study_ref import StudyRef

    ref = StudyRef(config=load_config(QUICKSTART), run_id="bench", out_dir=tempfile.gettempdir())
    adapter = ArtifactRef(key="adapters/a", sha256="0" * 64, n_bytes=1)
    return ref, [
        ClientAssignment(run_id="bench", round_index=0, domain=f"client-{index:05d}", global_adapter=adapter,
                         noise_multiplier=1.0, sample_rate=0.05, steps=3, clip_norm=0.1)
        for index in range(count)
    ]  # fmt: skip


def mapped_study(changes: list[str]) -> Turn:
    """A whole study by the main flow, with every step's time taken."""
    home = prefect_folder()
    from fedmentor_core.config_io import load_config
    from flows.embedded import embedded_prefect
    from flows.federated_training import federated_training

    steps = StepTimes()
    steps.watch("tasks.client_training", "train_one")
    steps.watch("tasks.evaluation", "evaluate_one")
    steps.watch("tasks.evaluation", "judge")
    steps.watch("tasks.aggregation", "rounds.aggregate")

    def run(config: Any) -> Sample:
        assert home  # lives as long as the arm
        steps.forget()
        with (
            tempfile.TemporaryDirectory(prefix="fedmentor-bench-") as folder,
            embedded_prefect(),
            ProcessTree() as tree,
        ):
            started = time.perf_counter()
            federated_training(config, str(Path(folder) / "out"))
            seconds = time.perf_counter() - started
        return Sample(
            seconds,
            peak_bytes=tree.peak_bytes,
            figures={
                "tree_cpu_seconds": tree.cpu_seconds,
                "step_seconds": steps.seconds,
                "share_by_clock": 1 - steps.seconds / seconds,
            },
        )

    run(load_config(QUICKSTART, [*changes, *SMALL]))
    config = load_config(QUICKSTART, changes)
    return lambda: run(config)


class StepTimes:
    """How long the steps of a study ran by the clock, overlaps counted once.

    Their processor time would miss torch's other threads, which no step owns.
    """

    def __init__(self) -> None:
        """Nothing is watched yet."""
        self._spans: list[tuple[float, float]] = []

    def forget(self) -> None:
        """Begin anew."""
        self._spans.clear()

    def watch(self, module: str, name: str) -> None:
        """Take the time of a function as ``module`` calls it."""
        *path, last = name.split(".")
        place: Any = importlib.import_module(module)
        for part in path:
            place = getattr(place, part)
        whole = getattr(place, last)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return whole(*args, **kwargs)
            finally:
                self._spans.append((started, time.perf_counter()))

        setattr(place, last, timed)

    @property
    def first(self) -> float:
        """When the first step began, as ``time.perf_counter`` counts."""
        return min(start for start, _ in self._spans)

    @property
    def last(self) -> float:
        """When the last step ended."""
        return max(end for _, end in self._spans)

    @property
    def seconds(self) -> float:
        """In which at least one step ran."""
        total, until = 0.0, 0.0
        for start, end in sorted(self._spans):
            total += max(0.0, end - max(start, until))
            until = max(until, end)
        return total


def prefect_folder() -> "tempfile.TemporaryDirectory[str]":
    """A Prefect home of the arm's own; its server starts with the first flow and ends with the process."""
    from flows.environment import prepare_environment
    from flows.prefect_database import provide_database

    folder = tempfile.TemporaryDirectory(prefix="fedmentor-bench-", ignore_cleanup_errors=True)
    os.environ.pop("PREFECT_API_URL", None)
    prepare_environment(Path(folder.name))
    provide_database()
    return folder
