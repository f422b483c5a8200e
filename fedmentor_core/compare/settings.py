"""What is compared: arms, seeds, budgets of the frontier. One model for the command line, the flow and its form."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from fedmentor_core.compare.arms import ARM_NAMES, find_arm
from fedmentor_core.config import Section
from fedmentor_core.errors import ConfigError


class CompareSettings(Section):
    """The grid: every arm with every seed, and one private arm at several budgets."""

    arms: tuple[str, ...] = Field(default=ARM_NAMES, min_length=1, description=f"Which arms: {', '.join(ARM_NAMES)}.")
    seeds: int = Field(default=3, ge=1, le=100, description="How many seeds, counted up from the study's own.")
    against: str = Field(default="federated", description="The arm that differences are taken from.")
    budgets: tuple[float, ...] = Field(
        default=(0.5, 1.0, 2.0, 4.0, 8.0),
        description="Privacy-utility frontier: every domain gets this epsilon. Empty: no frontier.",
    )
    budget_seeds: int = Field(default=1, ge=1, le=100, description="Seeds of each point of the frontier.")
    frontier_arm: str = Field(default="uniform", description="The private federated arm that is run at each budget.")
    uniform_epsilon: float | None = Field(
        default=None, gt=0, le=100, description="Budget of the arm 'uniform'; default: the strictest domain's."
    )
    data_is_public: bool = Field(
        default=False,
        description="State that the data of every domain is public: a comparison publishes many models of the same "
        "data, and some of its arms have no privacy at all. Invented text and the known public corpora need no word.",
    )
    max_minutes: float | None = Field(
        default=None, gt=0, description="Refuse, before it starts, a grid that is estimated to take longer."
    )
    max_parallel_cells: int = Field(default=1, ge=1, le=1024, description="Cells that the flow runs at the same time.")

    @field_validator("arms", "budgets")
    @classmethod
    def _no_repetition(cls, value: tuple[str, ...] | tuple[float, ...]) -> tuple[str, ...] | tuple[float, ...]:
        repeated = sorted({str(one) for one in value if value.count(one) > 1})
        if repeated:
            raise ValueError(f"each may be named once; repeated: {', '.join(repeated)}")
        return value

    @field_validator("budgets")
    @classmethod
    def _possible_budgets(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < one <= 100 for one in value):
            raise ValueError("each epsilon must be above 0 and at most 100; without privacy is the arm 'federated'")
        return value

    @model_validator(mode="after")
    def _known_arms(self) -> Self:
        try:
            for name in (*self.arms, self.against):
                find_arm(name)
            frontier = find_arm(self.frontier_arm)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if not (frontier.private and frontier.procedure == "federated"):
            raise ValueError(f"frontier_arm {self.frontier_arm!r} is not a private federated arm")
        if self.against not in self.arms:
            raise ValueError(
                f"against {self.against!r} is not among the arms ({', '.join(self.arms)}): add it, or take differences "
                "from another"
            )
        return self
