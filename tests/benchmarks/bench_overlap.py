"""What it saves to train the next round's clients while a round is evaluated: the same study with and without.

Two workers take whatever is there: three clients leave one of them idle for a third of a round's training, and an
evaluation needs one for its model alone. Overlapped, each fills the other's gaps. Noise is fixed, since a rule that
watches utility has to wait for it.
"""

import tempfile
from pathlib import Path

from bench_orchestration import QUICKSTART, StepTimes, prefect_folder
from harness import Arm, Plan, Ratio, Sample, Scale, Turn, benchmark
from harness.tree import ProcessTree


@benchmark("overlap", title="rounds with and without training ahead, two workers", minutes=8.0, cpu=False)
def overlap(scale: Scale) -> Plan:
    """Not part of ``make bench``: it needs two cores to itself."""
    rounds, rows = (2, 4) if scale.quick else (4, 48)
    changes = [
        f"rounds={rounds}", "training.steps_per_round=4", "training.batch_size=32", "tracking.enabled=false",
        f"evaluation.max_gate_examples={rows}", "evaluation.max_test_examples=4", "adaptation.rule=fixed",
        "execution.max_parallel_clients=2", "execution.torch_threads=1",
        *(f"domains.{index}.source.n_units=1500" for index in range(3)),
    ]  # fmt: skip
    names = {"one after the other": "never", "overlapped": "always"}
    return Plan(
        arms=[
            Arm(name, study, {"changes": [*changes, f"execution.overlap_rounds={how}"]}, limit_seconds=1_800.0)
            for name, how in names.items()
        ],
        ratios=[Ratio("overlapped over one after the other", of="overlapped", to="one after the other")],
        turns=1 if scale.quick else 2,
        notes=["Seconds are from the first client's start to the last round's verdict."],
    )


def study(changes: list[str]) -> Turn:
    """The study by the main flow; the time of its rounds."""
    home = prefect_folder()
    from fedmentor_core.config_io import load_config
    from flows.embedded import embedded_prefect
    from flows.federated_training import federated_training

    config = load_config(QUICKSTART, changes)
    training, judging = StepTimes(), StepTimes()
    training.watch("tasks.client_training", "train_one")
    judging.watch("tasks.evaluation", "judge")

    def turn() -> Sample:
        assert home  # lives as long as the arm
        training.forget()
        judging.forget()
        with (
            tempfile.TemporaryDirectory(prefix="fedmentor-bench-") as folder,
            ProcessTree() as tree,
            embedded_prefect(),
        ):
            federated_training(config, str(Path(folder) / "out"))
        return Sample(
            judging.last - training.first,
            peak_bytes=tree.peak_bytes,
            figures={"tree_cpu_seconds": tree.cpu_seconds},
        )

    return turn
