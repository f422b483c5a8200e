"""What Prefect costs: per mapped client where clients do nothing, and as a share of a study that does real work."""

import itertools
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import Arm, Finding, Plan, Ratio, Sample, Scale, Turn, benchmark, median_of

QUICKSTART = Path(__file__).resolve().parents[2] / "infra" / "configs" / "quickstart.yaml"
MS_PER_CLIENT, SHARE_OF_ROUND = 10.0, 0.05


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


@benchmark("orchestration-share", title="a study through Prefect over plain calls of the same study", minutes=2.0)
def orchestration_share(scale: Scale) -> Plan:
    """The quickstart's three domains, model and scorers, one round; tracking off, seeded noise, so both do the same."""
    changes = ["rounds=1", "tracking.enabled=false", "privacy.noise_seed=1"]
    if scale.quick:
        changes += ["training.steps_per_round=1", "evaluation.max_gate_examples=4", "evaluation.max_test_examples=4"]

    def conclude(samples: Mapping[str, Sequence[Sample]]) -> list[Finding]:
        pairs = zip(samples["plain calls"], samples["through Prefect"], strict=True)
        shares = sorted(1 - (plain.seconds or 0.0) / (mapped.seconds or 1.0) for plain, mapped in pairs)
        return [Finding("share of orchestration", shares[len(shares) // 2], at_most=SHARE_OF_ROUND)]

    return Plan(
        arms=[
            Arm("plain calls", plain_study, {"changes": changes}),
            Arm("through Prefect", mapped_study, {"changes": changes}),
        ],
        ratios=[Ratio("Prefect over plain calls", of="through Prefect", to="plain calls")],
        turns=1 if scale.quick else 2,
        warm_up=0 if scale.quick else 1,
        conclude=conclude,
        notes=["Start-up (imports, backbone, scorers, Prefect's server) is in the uncounted first turn."],
    )


def _mapped(count: int) -> str:
    return f"{count:,} clients"


# --- what the arms do --------------------------------------------------------------------------------------------


def mapped_clients(count: int) -> Turn:
    """A flow that maps a task which does nothing over ``count`` assignments, and waits for all results."""
    folder = _prefect_folder()
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


def plain_study(changes: list[str]) -> Turn:
    """The whole study by plain function calls."""
    from fedmentor_core.study import run_study
    from fedmentor_core.study_ref import open_study
    from flows.quiet import silence_libraries

    silence_libraries()
    config = _config(changes)

    def turn() -> Sample:
        with _new_folder() as folder:
            started = time.perf_counter()
            run_study(open_study(config, folder))
            return Sample(time.perf_counter() - started)

    return turn


def mapped_study(changes: list[str]) -> Turn:
    """The same study by the main flow."""
    folder = _prefect_folder()
    from flows.federated_training import federated_training

    config = _config(changes)

    def turn() -> Sample:
        assert folder  # lives as long as the arm
        with _new_folder() as out:
            started = time.perf_counter()
            federated_training(config, str(out))
            return Sample(time.perf_counter() - started)

    return turn


def _config(changes: list[str]) -> Any:
    from fedmentor_core.config_io import load_config

    return load_config(QUICKSTART, changes)


@contextmanager
def _new_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fedmentor-bench-") as folder:
        yield Path(folder) / "out"


def _prefect_folder() -> "tempfile.TemporaryDirectory[str]":
    """A Prefect home of the arm's own; its server starts with the first flow and ends with the process."""
    from flows.environment import prepare_environment

    folder = tempfile.TemporaryDirectory(prefix="fedmentor-bench-", ignore_cleanup_errors=True)
    os.environ.pop("PREFECT_API_URL", None)
    prepare_environment(Path(folder.name))
    return folder
