"""What a noise rule is: it plans the noise of every round, and after each gate proposes the next round's.

A rule only proposes. ``adaptation.settle`` keeps every proposal at or above the site's floor and the least noise at
which all remaining rounds fit, and at or below the noise of the round before; the site's filter decides in the end.
So a bad rule can waste a budget and never pass it.

Everything in here is a public number (a price, a share of a budget) or was released (the utility of a public gate
set, or a noised one): the filter theorem (see ``filter.py``) asks for no more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fedmentor_core.config import AdaptationConfig
from fedmentor_core.errors import BudgetError
from fedmentor_core.privacy.accountant import calibrate_at_order, rdp_per_step
from fedmentor_core.privacy.mechanism import charged_events
from fedmentor_core.records import DomainPlan

_SCALE = 10_000  # noise multipliers have four decimals: readable, and of little effect on what they cost


@dataclass(frozen=True, slots=True)
class RunShare:
    """What one run may spend of a domain's account, and what its rounds cost there.

    Attributes:
        rdp_order: the account's order alpha.
        rdp_limit: RDP at that order up to which this run may take the account, earlier runs included.
        sample_rate: of the events that a round is charged for (see ``mechanism.py``).
        events_per_round: how many of them a round is charged for.
        floor: the site's least noise multiplier.
    """

    rdp_order: float
    rdp_limit: float
    sample_rate: float
    events_per_round: int
    floor: float

    @classmethod
    def of(cls, plan: DomainPlan) -> "RunShare | None":
        """The share a plan speaks of; None for a run without privacy or a refused plan."""
        if plan.rdp_order is None or plan.run_rdp_budget is None:
            return None
        events = charged_events(plan.privacy_level, plan.sample_rate, plan.steps_per_round)
        return cls(
            rdp_order=plan.rdp_order,
            rdp_limit=plan.run_rdp_budget,
            sample_rate=events.sample_rate,
            events_per_round=events.steps,
            floor=plan.min_noise_multiplier,
        )

    def cost(self, schedule: Sequence[float]) -> float:
        """RDP of one round at each of these noise multipliers."""
        return math.fsum(
            self.events_per_round * rdp_per_step(noise, self.sample_rate, self.rdp_order) for noise in schedule
        )

    def left(self, spent_rdp: float) -> float:
        """RDP that this run may still spend."""
        return self.rdp_limit - spent_rdp

    def fits(self, spent_rdp: float, noise_multiplier: float, rounds: int) -> bool:
        """Whether so many rounds at this noise stay within the share."""
        return spent_rdp + rounds * self.cost([noise_multiplier]) <= self.rdp_limit

    def least_noise(self, rdp: float, rounds: int) -> float:
        """Smallest noise multiplier, not below the floor, at which so many equal rounds cost at most ``rdp``.

        Raises:
            BudgetError: no noise multiplier is enough.
        """
        least = calibrate_at_order(rdp, self.rdp_order, self.sample_rate, rounds * self.events_per_round)
        return max(self.floor, least)

    def affordable(self, spent_rdp: float, noise_multiplier: float, rounds: int, at_most: float) -> float | None:
        """Least noise at which so many rounds fit what is left of the share; None when that is above ``at_most``.

        Calibration rounds up. Where the present ``noise_multiplier`` fits, the answer is never above that, so that no
        rounding error raises noise.
        """
        try:
            least = self.least_noise(self.left(spent_rdp), rounds)
        except BudgetError:
            least = math.inf
        if self.fits(spent_rdp, noise_multiplier, rounds):
            return min(least, noise_multiplier)
        return least if least <= at_most else None

    def geometric(self, rdp: float, rounds: int, ratio: float) -> tuple[float, ...]:
        """The least schedule s, s * ratio, s * ratio**2, ... of which all rounds together cost at most ``rdp``.

        Where the floor stops the fall, the rounds before it get what that leaves over.

        Args:
            rdp: what the schedule may cost.
            rounds: its length, at least 1.
            ratio: of one round's noise multiplier to the one before; in (0, 1].

        Raises:
            BudgetError: no noise multiplier is enough.
        """

        def schedule(first: float) -> tuple[float, ...]:
            return tuple(max(self.floor, _rounded_up(first * ratio**index)) for index in range(rounds))

        constant = self.least_noise(rdp, rounds)
        low, high = constant, constant / ratio ** (rounds - 1)  # the second fits: it is nowhere below the constant
        if self.cost(schedule(low)) <= rdp:
            return schedule(low)
        while high - low > 0.5 / _SCALE:
            middle = (low + high) / 2
            low, high = (low, middle) if self.cost(schedule(middle)) <= rdp else (middle, high)
        return schedule(high)


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a domain stands after a round's gate: all that a rule may look at.

    Attributes:
        noise_multiplier: of the round just done.
        planned: noise multiplier planned for each round of the run.
        rounds_left: rounds still to come; at least 1 when a rule is asked.
        spent_rdp: what the account has spent, this run included.
        least_noise: smallest noise multiplier at which all remaining rounds fit the run's share.
        utility: the watched metric on the gate set: of a public set, or noised and charged.
        threshold: below which utility is too low.
        rounds_below: gates in a row at which it was, this one included.
    """

    noise_multiplier: float
    planned: tuple[float, ...]
    rounds_left: int
    spent_rdp: float
    least_noise: float
    utility: float
    threshold: float
    rounds_below: int

    def lags(self, settings: AdaptationConfig) -> bool:
        """Whether utility was too low for as many rounds in a row as the configuration has patience."""
        return self.rounds_below >= settings.patience_rounds

    def utility_in_words(self, settings: AdaptationConfig) -> str:
        """What the metric says, as the start of a reason."""
        said = f"{settings.metric} {self.utility:.4f}"
        if self.rounds_below == 0:
            return f"{said} not below {self.threshold:.4f}"
        return f"{said} below {self.threshold:.4f} for {self.rounds_below} round(s)"


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a rule wants for the next round.

    Attributes:
        noise_multiplier: wanted; may be out of bounds.
        reason: why, in a few words.
        answers_utility: True when it reacts to low utility; then rounds below the threshold are counted anew.
    """

    noise_multiplier: float
    reason: str
    answers_utility: bool = False


@runtime_checkable
class NoiseRule(Protocol):
    """A rule. It keeps no state of its own: a resumed run must decide as one that was never interrupted."""

    @property
    def name(self) -> str:
        """What ``adaptation.rule`` calls it."""
        ...

    @property
    def watches_utility(self) -> bool:
        """Whether it looks at the gate's metric."""
        ...

    @property
    def keeps_reserve(self) -> bool:
        """Whether ``privacy.reserve_fraction`` of the run's share is left out of the plan, to pay for reductions."""
        ...

    def plan(self, settings: AdaptationConfig, share: RunShare, rdp: float, rounds: int) -> tuple[float, ...]:
        """Noise multipliers of all rounds, at or above the floor, never rising, that together cost at most ``rdp``.

        Raises:
            BudgetError: no noise multiplier is enough.
        """
        ...

    def propose(self, settings: AdaptationConfig, share: RunShare, standing: Standing) -> Proposal:
        """The noise multiplier wanted for the next round."""
        ...


def _rounded_up(noise_multiplier: float) -> float:
    return round(math.ceil(noise_multiplier * _SCALE - 1e-6) / _SCALE, 4)
