"""Progress as plain events: the core reports, a listener shows. Carries no metric of private data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["prepare", "baseline", "train", "aggregate", "evaluate", "gate", "register", "final", "report", "done"]


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """Something happened.

    ``completed`` of ``total`` units of ``stage`` are done (steps of a client, examples generated, rounds...).
    """

    stage: Stage
    message: str = ""
    round_index: int | None = None
    n_rounds: int | None = None
    domain: str | None = None
    completed: int | None = None
    total: int | None = None


Listener = Callable[[ProgressEvent], None]


def silent(_: ProgressEvent) -> None:
    """The listener that shows nothing."""
