"""What a comparison leaves: a result per cell (one arm, one seed, one budget), and the table over all of them.

``ComparisonTable`` is ``table.json``, a documented and versioned contract; a ``CellResult`` is stored when its cell is
finished and is what a resumed comparison finds.
"""

from pydantic import Field

from fedmentor_core.records import (
    EvaluationMetrics,
    Record,
    RoundSummary,
    SafetyEvaluation,
    Sample,
    ScorerIdentities,
)

TABLE_SCHEMA_VERSION = 1


class Identity(Record):
    """What every cell must share, or their numbers mean different things."""

    backbone_sha256: str
    scorers: ScorerIdentities
    splits: dict[str, str] = Field(description="Digest of each domain's training, gate and test posts together.")
    evaluation_sha256: str = Field(description="Digest of the evaluation settings (rows, tokens, prompts).")
    schedule: dict[str, int] = Field(default={}, description="Rounds, steps a round, and expected units a step.")


class Cell(Record):
    """One point of the grid: an arm, a seed, and on the frontier the one budget of every domain."""

    arm: str
    seed: int
    epsilon: float | None = Field(default=None, description="None in the table's own cells.")

    def __str__(self) -> str:
        """In words."""
        budget = "" if self.epsilon is None else f" at epsilon {self.epsilon:g}"
        return f"{self.arm}{budget}, seed {self.seed}"


class KeyedCell(Cell):
    """A cell and the digest of all that decides its result."""

    key: str


class ComparisonFile(Record):
    """``comparison.json``: what an output folder holds, so that the same command resumes it and others can join it."""

    comparison_id: str
    study: str
    config_sha256: str = Field(description="Of the study; of joined tables, empty.")
    against: str
    data_is_public: bool = False
    cells: tuple[KeyedCell, ...]


class CellResult(Record):
    """One finished cell."""

    key: str = Field(description="Digest of all that decides the result; a cell with this key is not run again.")
    arm: str
    seed: int
    epsilon: float | None = Field(
        default=None, description="The one budget of a frontier cell; None in the table's own cells."
    )
    identity: Identity
    final: EvaluationMetrics = Field(description="On the test set, of the adapter after the last round.")
    rounds: tuple[RoundSummary, ...] = Field(default=(), description="Gate metrics, noise and bytes of each round.")
    samples: tuple[Sample, ...] = Field(default=(), description="Outputs on the public gate set, same prompts per arm.")
    safety: SafetyEvaluation | None = Field(
        default=None,
        description="Of the final adapter on the safety prompts; None: none are configured, or an adapter per domain.",
    )
    epsilon_spent: dict[str, float] = Field(default={}, description="By domain; empty without privacy.")
    bytes_total: int = 0
    seconds: float
    warnings: tuple[str, ...] = ()


class FailedCell(Cell):
    """A cell that could not be finished; the others are kept."""

    reason: str


class Estimate(Record):
    """A mean over seeds and its 95 % interval."""

    mean: float
    ci95: tuple[float, float] | None = Field(description="Student's t over seeds; None with fewer than two.")
    n: int = Field(description="Seeds.")


class ArmResult(Record):
    """A row of the table."""

    name: str
    title: str = Field(description="In words, for people.")
    private: bool
    seeds: tuple[int, ...]
    metrics: dict[str, Estimate]
    by_domain: dict[str, dict[str, Estimate]] = Field(description="Domain, then metric.")
    epsilon_spent: dict[str, float] = Field(default={}, description="By domain, the largest over seeds.")
    bytes_per_round: int = 0
    seconds: float = Field(description="Median over seeds.")


class Difference(Record):
    """One arm minus another on one metric, paired by seed."""

    arm: str
    against: str
    metric: str
    mean: float
    ci95: tuple[float, float] | None = Field(description="Of the paired differences, Student's t over seeds.")
    p_value: float | None = Field(description="Paired t-test, two-sided; None with fewer than two seeds.")
    n: int


class FrontierPoint(Record):
    """Utility and safety at one budget that every domain shares."""

    arm: str
    epsilon: float | None = Field(description="None: without privacy (infinite).")
    metrics: dict[str, Estimate]


class ComparisonTable(Record):
    """``table.json``."""

    schema_version: int = TABLE_SCHEMA_VERSION
    name: str
    against: str = Field(description="The arm that differences are taken from.")
    arms: tuple[ArmResult, ...]
    differences: tuple[Difference, ...]
    frontier: tuple[FrontierPoint, ...] = ()
    identity: Identity | None = None
    failures: tuple[FailedCell, ...] = ()
    warnings: tuple[str, ...] = ()
    machine: dict[str, str] = Field(default={})
    command: str = ""
    seconds_total: float = Field(description="Sum over cells, as if none had been reused.")
