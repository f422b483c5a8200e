"""What one round of local training is to the accountant: which events, at which sampling rate.

At unit level a round is ``steps`` sampled-Gaussian steps on Poisson-sampled units. At client level it is one Gaussian
release of the whole update in which every client takes part, so there is no amplification by sampling and the number
of local steps does not matter.
"""

from typing import Literal, NamedTuple

PrivacyLevel = Literal["unit", "client"]


class ChargedEvents(NamedTuple):
    """Equal mechanism invocations that one round is charged for."""

    sample_rate: float
    steps: int


def charged_events(level: PrivacyLevel, sample_rate: float, steps: int) -> ChargedEvents:
    """The events of one round.

    Args:
        level: what is protected.
        sample_rate: at which the local sampler draws units.
        steps: local optimiser steps.
    """
    return ChargedEvents(1.0, 1) if level == "client" else ChargedEvents(sample_rate, steps)
