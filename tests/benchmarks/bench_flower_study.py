"""A whole federated LoRA study against Flower's simulation of the same task, each in a fresh process, start-up counted.

Same backbone, same tokenised rows, three clients one at a time, same rounds, local steps, batch, microbatch, optimiser and
LoRA (rank 16, all linear layers, B trained), with and without DP (Flower's clients then train with Opacus, as its own
example does). Ours is the whole pipeline through Prefect, with ledger, gate, evaluation and report, which Flower's app has
not; what evaluating took is stated, so that the same work can be compared too.

Flower's arms run under another Python, with flwr[simulation], torch, transformers, peft and opacus, that
``FEDMENTOR_BENCH_PEERS_PYTHON`` names.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Arm, Plan, Ratio, Sample, Scale, SkipArmError, Turn, benchmark
from harness.tree import ProcessTree

QUICKSTART = Path(__file__).resolve().parents[2] / "infra" / "configs" / "quickstart.yaml"
PEERS = "FEDMENTOR_BENCH_PEERS_PYTHON"
NOISE = 1.0
"""Noise multiplier of Flower's private clients; ours is calibrated, and costs the same whatever it is."""
RATIOS = {
    "whole by the clock": "seconds",
    "processor time": "tree_cpu_seconds",
    "start-up": "startup_seconds",
    "memory": "peak_bytes",
    "bytes a round": "bytes",
}
"""What is compared, FedMentor over Flower."""


@benchmark("flower-study", title="a whole study against Flower's simulation of the same task", minutes=22.0, cpu=False)
def flower_study(scale: Scale) -> Plan:
    """Not part of ``make bench``: it needs the other Python, and takes long."""
    rounds, steps, batch = (1, 1, 16) if scale.quick else (2, 6, 64)
    changes = [
        f"rounds={rounds}", f"training.steps_per_round={steps}", f"training.batch_size={batch}", "tracking.enabled=false",
        "evaluation.max_gate_examples=4", "evaluation.max_test_examples=4",
        *(f"domains.{index}.source.n_units=600" for index in range(3)),
    ]  # fmt: skip
    arms = []
    for private in (True, False):
        mode = changes if private else [*changes, "privacy.mode=none"]
        of = {"changes": mode}
        said = "private" if private else "no privacy"
        arms.append(Arm(f"FedMentor, {said}", ours, of, limit_seconds=7_200.0))
        arms.append(Arm(f"Flower, {said}", flowers, {**of, "private": private}, limit_seconds=7_200.0))
    ratios = [
        Ratio(f"{name}, {said}", of=f"FedMentor, {said}", to=f"Flower, {said}", what=what)
        for said in ("private", "no privacy")
        for name, what in RATIOS.items()
    ]
    return Plan(
        arms=arms,
        ratios=ratios,
        turns=1 if scale.quick else 2,
        notes=[
            "The whole is a fresh process from its start to its end; start-up ends when the first client begins to train.",
            "Memory (shared pages once) and processor time are those of the whole process tree.",
            "Ours reads, splits and tokenises 600 posts a domain; Flower's finds the tokens of the same rows on disk.",
            "Ours sends updates as the quickstart says, int6 up and int7 down; Flower sends fp32.",
            "Ours evaluates 4 gate prompts and 4 test prompts a domain, which nothing switches off; Flower's does not.",
        ],
    )


# --- the two arms, watched from outside --------------------------------------------------------------------------------


def ours(changes: list[str]) -> Turn:
    """``federated_training`` in a process of its own."""
    return _whole(lambda folder: ([sys.executable, "-c", _CALL, "our_study"], {"folder": folder, "changes": changes}))


def flowers(changes: list[str], private: bool) -> Turn:
    """Flower's app on the rows that our study trains on."""
    python = os.environ.get(PEERS)
    if not python:
        raise SkipArmError(f"set {PEERS} to a Python with flwr[simulation], torch, transformers, peft and opacus.")
    kept = tempfile.TemporaryDirectory(prefix="fedmentor-bench-")
    source = Path(kept.name)
    given = {"folder": kept.name, "changes": changes, "noise": NOISE if private else None}
    subprocess.run([sys.executable, "-c", _CALL, "write_rows", json.dumps(given)], check=True)

    def command(folder: str) -> tuple[list[str], dict[str, Any]]:
        for one in source.iterdir():
            (Path(folder) / one.name).write_bytes(one.read_bytes())
        assert kept  # lives as long as the arm
        facts = json.loads((source / "settings.json").read_text()) | {"folder": folder}
        (Path(folder) / "settings.json").write_text(json.dumps(facts))
        os.environ["FLOWER_STUDY"] = folder
        return [python, "-c", "import flower_study; flower_study.main()"], facts

    return _whole(command)


_CALL = "import json, sys, bench_flower_study as b; getattr(b, sys.argv[1])(**json.loads(sys.argv[2]))"


def _whole(command: Callable[[str], tuple[list[str], dict[str, Any]]]) -> Turn:
    def turn() -> Sample:
        with tempfile.TemporaryDirectory(prefix="fedmentor-bench-", ignore_cleanup_errors=True) as folder:
            arguments, given = command(folder)
            with ProcessTree() as tree:
                started = time.time()
                done = subprocess.run(
                    [*arguments, json.dumps(given)], stdout=subprocess.PIPE, text=True, check=True, env=_environment()
                )
                seconds = time.time() - started
        said = json.loads(done.stdout.strip().splitlines()[-1])
        return Sample(
            seconds,
            peak_bytes=tree.peak_bytes,
            bytes=round(said["bytes_per_round"]),
            figures={
                "startup_seconds": said["began"] - started,
                "study_seconds": said["ended"] - said["began"],
                "tree_cpu_seconds": tree.cpu_seconds,
                "evaluation_seconds": said.get("evaluation_seconds", 0.0),
            },
        )

    return turn


def _environment() -> dict[str, str]:
    """One thread in both, no word to anybody, and time for Ray to start on a busy machine."""
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | quiet | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAY_raylet_start_wait_time_s": "900"}


# --- what our processes do ----------------------------------------------------------------------------------------------


def our_study(folder: str, changes: list[str]) -> None:
    """The whole study, by the main flow; says when the first client began."""
    from bench_orchestration import StepTimes

    from flows.environment import prepare_environment

    os.environ.pop("PREFECT_API_URL", None)
    prepare_environment(Path(folder))
    from fedmentor_core.config_io import load_config
    from flows.embedded import embedded_prefect
    from flows.federated_training import federated_training

    evaluating, training = StepTimes(), StepTimes()
    evaluating.watch("tasks.evaluation", "evaluate_one")
    training.watch("tasks.client_training", "train_one")
    with embedded_prefect():  # as 'fedmentor run' does
        summary = federated_training(load_config(QUICKSTART, changes), str(Path(folder) / "out"))
    ended = time.time()
    rounds = summary.rounds
    print(
        json.dumps(
            {
                "began": ended - (time.perf_counter() - training.first),
                "ended": ended,
                "bytes_per_round": sum(c.bytes_up + c.bytes_down for one in rounds for c in one.clients) / len(rounds),
                "evaluation_seconds": evaluating.seconds,
            }
        ),
        flush=True,
    )


def write_rows(folder: str, changes: list[str], noise: float | None) -> None:
    """Every client's tokenised units, and the task, for the rival to read."""
    from fedmentor_core.adapters.backbone import embedded_backbone_folder
    from fedmentor_core.config_io import load_config
    from fedmentor_core.study_ref import find_study
    from fedmentor_core.workspace import Workspace

    config = load_config(QUICKSTART, changes)
    workspace = Workspace(find_study(config, Path(folder) / "none"))
    for index, domain in enumerate(config.domains):
        data = workspace.training_set(domain.name)
        units = [
            [{"input_ids": list(data.input_ids[row]), "labels": list(data.labels[row])} for row in rows]
            for rows in data.rows_of_unit
        ]
        (Path(folder) / f"rows-{index}.json").write_text(json.dumps(units))
    facts = {
        "backbone": str(embedded_backbone_folder()),
        "clients": len(config.domains),
        "at_once": config.execution.max_parallel_clients,
        "rounds": config.rounds,
        "steps": config.training.steps_per_round,
        "batch": config.training.batch_size,
        "microbatch": config.training.microbatch_size,
        "learning_rate": config.training.learning_rate,
        "rank": config.adapter.rank,
        "alpha": config.adapter.alpha,
        "noise": noise,
        "clip": config.privacy.clip_norm,
    }
    (Path(folder) / "settings.json").write_text(json.dumps(facts))
