r"""The RDP filter: admits or refuses each round's steps before any data is touched.

Theorem (Feldman and Zrnic 2021, arXiv 2008.11193; Lecuyer 2021, arXiv 2103.01379): fix an order alpha > 1 and a
budget B before the first step. If every step's parameters (noise multiplier, sample rate, whether to go on) are
chosen from what was released and from public values, and the interaction stops before the summed RDP at alpha
passes B, then the whole interaction is (alpha, B)-RDP, hence (epsilon, delta)-DP. No price is paid for adaptivity.

So: one filter per domain over its lifetime, one order, checked on every charge, refused steps release nothing.
"""

from dataclasses import dataclass

from fedmentor_core.privacy.accountant import (
    calibrate_at_order,
    choose_order,
    epsilon_at_order,
    rdp_cap,
    rdp_per_step,
)
from fedmentor_core.records import DomainPlan


@dataclass(frozen=True, slots=True)
class PrivacyAccount:
    """A domain's lifetime promise, fixed before its first step.

    Attributes:
        epsilon: lifetime budget.
        delta: probability slack; below 1 / (training units).
        rdp_order: alpha, fixed in advance.
        rdp_budget: B at that order; converts to exactly ``epsilon``.
    """

    epsilon: float
    delta: float
    rdp_order: float
    rdp_budget: float

    @classmethod
    def open(cls, epsilon: float, delta: float, sample_rate: float, planned_steps: int) -> "PrivacyAccount":
        """Fix the order from the planned schedule (public numbers only).

        Raises:
            BudgetError: no noise multiplier lets the planned steps fit.
        """
        order = choose_order(epsilon, delta, sample_rate, planned_steps)
        return cls(epsilon=epsilon, delta=delta, rdp_order=order, rdp_budget=rdp_cap(epsilon, delta, order))

    @classmethod
    def of(cls, plan: DomainPlan) -> "PrivacyAccount | None":
        """The account a plan speaks of; None for a run without privacy or a refused plan."""
        if plan.epsilon_budget is None or plan.delta is None or plan.rdp_order is None or plan.rdp_budget is None:
            return None
        return cls(plan.epsilon_budget, plan.delta, plan.rdp_order, plan.rdp_budget)

    def charge_of(self, noise_multiplier: float, sample_rate: float, steps: int) -> float:
        """RDP at the fixed order that ``steps`` steps cost."""
        return steps * rdp_per_step(noise_multiplier, sample_rate, self.rdp_order)

    def admits(self, spent_rdp: float, charge: float) -> bool:
        """True when the interaction may go on with this charge. NaN, infinity and less than nothing are refused."""
        return charge >= 0 and spent_rdp + charge <= self.rdp_budget

    def epsilon_spent(self, spent_rdp: float) -> float:
        """Valid upper bound on epsilon so far, under any adaptive choice of parameters."""
        return epsilon_at_order(spent_rdp, self.rdp_order, self.delta)

    def least_noise(self, spent_rdp: float, sample_rate: float, steps: int) -> float:
        """Smallest noise multiplier at which ``steps`` further steps still fit.

        Raises:
            BudgetError: the remaining budget carries no such steps.
        """
        return calibrate_at_order(self.rdp_budget - spent_rdp, self.rdp_order, sample_rate, steps)
