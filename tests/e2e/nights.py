"""Nights of a small study, each in a forked process that may be killed at any write or step.

Run as a program it reads one night per line from standard input (JSON, the arguments of ``run_night``) and answers
with the exit code of the process that lived it. It only imports and forks, so each night starts at once.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from fedmentor_core import rounds
from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import BudgetError
from fedmentor_core.rounds import RoundState
from fedmentor_core.steps import train_with_retries
from fedmentor_core.storage.local import LocalStore
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import Workspace

RESTED = 3
"""Exit status of a night that no budget carries."""


def run_night(config: dict[str, Any], out: str, meter: str, kill_at: str, failures: int) -> None:
    """Run (or resume) a night's study with the production functions of a round; evaluation is left out.

    Args:
        config: the study.
        out: the night's own folder.
        meter: file that gets one line per DP step that really happened.
        kill_at: 'write N' or 'step N': SIGKILL there; empty: never.
        failures: training attempts that fail first.
    """
    torch.set_num_threads(1)
    watch_steps(Path(meter), out, kill_at, failures)
    watch_writes(kill_at)
    workspace = Workspace(open_study(validate_config(config), out))
    try:
        state = RoundState.first(workspace)
    except BudgetError:
        os._exit(RESTED)
    for index in range(workspace.config.rounds):
        updates = [
            train_with_retries(workspace, assignment, lambda _: None)
            for assignment in rounds.assignments_for(workspace, state)
        ]
        adapter, _ = rounds.aggregate(workspace, state.adapter, updates)
        _, noise, below = rounds.adapt(workspace, state, poor_metrics(workspace), {})
        state = RoundState(index + 1, adapter, noise, below)


def poor_metrics(workspace: Workspace) -> Any:
    """Utility at its worst, so that the rule lowers noise whenever it may."""
    from fedmentor_core.records import EvaluationMetrics, Metrics

    one = Metrics(
        bertscore_f1=0.0, rouge_l=0.0, label_f1=0.0, safe_rate=0.0, toxicity_mean=1.0, toxicity_max=1.0,
        empty_rate=1.0, n_examples=1,
    )  # fmt: skip
    return EvaluationMetrics(**one.model_dump(), by_domain={d.name: one for d in workspace.config.domains})


def watch_steps(meter: Path, out: str, kill_at: str, failures: int) -> None:
    """Note every noising of a batch as it happens, from inside Opacus: (night, noise multiplier, denominator)."""
    from opacus.optimizers import DPOptimizer

    original = DPOptimizer.add_noise
    seen = {"steps": 0}

    def add_noise(self: Any) -> None:
        original(self)
        line = {"night": Path(out).name, "noise": self.noise_multiplier, "expected": self.expected_batch_size}
        with meter.open("a") as handle:
            handle.write(json.dumps(line) + "\n")
        seen["steps"] += 1
        if kill_at == f"step {seen['steps']}":
            os.kill(os.getpid(), signal.SIGKILL)
        if seen["steps"] <= failures:
            raise OSError("the disk is gone")

    DPOptimizer.add_noise = add_noise  # type: ignore[method-assign]


def watch_writes(kill_at: str) -> None:
    """Die before the N-th object is created: every line between two writes is covered by one of them."""
    original = LocalStore._create
    seen = {"writes": 0}

    def create(self: LocalStore, key: str, body: Any) -> None:
        seen["writes"] += 1
        if kill_at == f"write {seen['writes']}":
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, key, body)

    LocalStore._create = create  # type: ignore[method-assign]


def main() -> None:
    """Fork a process for each night that is asked for."""
    import datasets  # noqa: F401  imported once, so that no night has to
    import opacus.accountants
    import opacus.grad_sample  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                run_night(**asked)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
