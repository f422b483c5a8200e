"""How long a grid will take: a few steps and one domain's answers are timed, and multiplied by their counts."""

import time
from dataclasses import dataclass

from fedmentor_core.compare.arms import find_arm
from fedmentor_core.compare.comparison import Comparison
from fedmentor_core.compare.grid import steps_of
from fedmentor_core.compare.records import Cell
from fedmentor_core.errors import ConfigError
from fedmentor_core.training.client import LocalRound, train_locally
from fedmentor_core.workspace import Workspace

_STEPS = 3  # the first also compiles kernels and fills caches, and is not counted


@dataclass(frozen=True)
class Speed:
    """Of this machine on this study."""

    seconds_per_step: float
    seconds_per_row: float


@dataclass(frozen=True)
class TimeEstimate:
    """Of the cells that are still to be run."""

    seconds: float
    n_cells: int
    speed: Speed


def measure(workspace: Workspace) -> Speed:
    """Time private steps of one client and the evaluation of its gate set. What is trained is thrown away."""
    from fedmentor_core.evaluation.evaluate import evaluate_domain

    config = workspace.config
    domain = config.domains[0].name
    data = workspace.training_set(domain)
    clock: list[float] = []
    model = workspace.new_adapter_model()
    train_locally(
        model,
        data,
        config.training.model_copy(update={"deadline_seconds": None}),
        LocalRound(
            sample_rate=min(1.0, config.training.batch_size / data.n_units),
            steps=_STEPS,
            noise_multiplier=1.0,
            clip_norm=config.privacy.clip_norm,
            order_seed=0,
        ),
        device=workspace.backbone.device,
        on_step=lambda done, total: clock.append(time.perf_counter()),
    )
    answered = workspace.evaluation_set(domain, "gate")
    scorers = workspace.scorers
    started = time.perf_counter()
    evaluate_domain(
        model,
        workspace.backbone.tokenizer,
        answered,
        scorers,
        config.evaluation,
        device=workspace.backbone.device,
        keep_samples=False,
    )
    return Speed((clock[-1] - clock[0]) / (_STEPS - 1), (time.perf_counter() - started) / len(answered.rows))


def estimate_time(comparison: Comparison) -> TimeEstimate:
    """Measure, and multiply by what is left to be run. Writes nothing."""
    left = [cell for cell in comparison.cells if comparison.result(cell) is None]
    if not left:
        return TimeEstimate(0.0, 0, Speed(0.0, 0.0))
    speed = measure(comparison.common)
    gate, test = (_n_rows(comparison, split) for split in ("gate", "test"))
    seconds = (gate + test) * speed.seconds_per_row  # the untrained backbone, once
    return TimeEstimate(
        seconds + sum(_cell_seconds(comparison, cell, speed, gate, test) for cell in left), len(left), speed
    )


def refuse_too_long(comparison: Comparison, found: TimeEstimate) -> None:
    """Refuse a grid that does not fit ``max_minutes``.

    Raises:
        ConfigError: with the estimate, and what to lower.
    """
    limit = comparison.settings.max_minutes
    if limit is None or found.seconds <= 60 * limit:
        return
    settings, config = comparison.settings, comparison.config
    gate, test = (_n_rows(comparison, split) for split in ("gate", "test"))
    training = config.rounds * config.training.steps_per_round * len(config.domains) * found.speed.seconds_per_step
    scoring = (config.rounds * gate + test) * found.speed.seconds_per_row
    raise ConfigError(
        f"the grid would take about {found.seconds / 60:.0f} minutes, and max_minutes is {limit:g}: {found.n_cells} "
        f"cells are left, each of about {training / 60:.1f} minutes of training ({config.rounds} rounds of "
        f"{config.training.steps_per_round} steps by {len(config.domains)} clients) and {scoring / 60:.1f} of "
        f"evaluation ({config.rounds} times {gate} gate rows, {test} test rows). Nothing was started. Lower seeds (now "
        f"{settings.seeds}), the budgets (now {len(settings.budgets)}) or the arms (now {len(settings.arms)}), or "
        "rounds, training.steps_per_round, evaluation.max_gate_examples or max_test_examples; or raise max_minutes."
    )


def _cell_seconds(comparison: Comparison, cell: Cell, speed: Speed, gate: int, test: int) -> float:
    steps = steps_of(comparison.config, find_arm(cell.arm))
    if steps == 0:
        return 0.0  # the untrained backbone is scored once for the whole grid
    rows = comparison.config.rounds * gate + test
    return steps * speed.seconds_per_step + rows * speed.seconds_per_row


def _n_rows(comparison: Comparison, split: str) -> int:
    """Rows of all domains together that one evaluation scores."""
    evaluation = comparison.config.evaluation
    most = evaluation.max_gate_examples if split == "gate" else evaluation.max_test_examples
    return sum(min(most, len(getattr(comparison.common.data[one.name], split))) for one in comparison.config.domains)
