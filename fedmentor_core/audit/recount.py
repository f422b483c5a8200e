"""The ledger against what was really done, counted again by other code.

Evidence of what was done is not the ledger's: optimizer steps are counted by the step meter, noise multiplier and
sample rate are those that training was called with, releases are the files in the store. The price of it all is
computed by Google's dp-accounting and not by our accountant.
"""

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from fedmentor_core.privacy.accountant import epsilon_at_order
from fedmentor_core.records import LedgerEntry, PrivacySpend

RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 3e-3, 1e-3
"""Two accountants of the same mechanism differ by this much at fractional orders."""


@dataclass(frozen=True, slots=True)
class RoundDone:
    """What one client really did in one round.

    Attributes:
        round_index: the round.
        noise_multiplier: what training was called with.
        sample_rate: what training was called with.
        steps: optimizer steps seen, over all attempts.
        n_attempts: attempts that took at least one step.
        n_stored: update files of this client and round in the store.
        handed_out: digest of the update that was handed to the server.
    """

    round_index: int
    noise_multiplier: float
    sample_rate: float
    steps: int
    n_attempts: int
    n_stored: int
    handed_out: str

    @property
    def spend(self) -> PrivacySpend:
        """As the accountants see it."""
        return PrivacySpend(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=self.steps)


def epsilon_rdp_elsewhere(history: Sequence[PrivacySpend], order: float, delta: float) -> float:
    """Epsilon at a fixed RDP order by dp-accounting; infinite where it knows no bound."""
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant

    spends = [spend for spend in history if spend.steps]
    if not spends:
        return 0.0
    if any(spend.noise_multiplier <= 0 for spend in spends):
        return math.inf
    accountant = RdpAccountant(orders=[order])
    with _quiet():
        for spend in spends:
            event = dp.PoissonSampledDpEvent(spend.sample_rate, dp.GaussianDpEvent(spend.noise_multiplier))
            accountant.compose(event, spend.steps)
        return float(accountant.get_epsilon(delta))


def epsilon_pld_elsewhere(history: Sequence[PrivacySpend], delta: float) -> float:
    """The tight epsilon of the schedule as it was run, by dp-accounting's privacy loss distributions."""
    import dp_accounting as dp

    spends = [spend for spend in history if spend.steps]
    if not spends:
        return 0.0
    if any(spend.noise_multiplier <= 0 for spend in spends):
        return math.inf
    accountant = dp.pld.PLDAccountant(value_discretization_interval=1e-3)
    with _quiet():
        for spend in spends:
            event = dp.PoissonSampledDpEvent(spend.sample_rate, dp.GaussianDpEvent(spend.noise_multiplier))
            accountant.compose(event, spend.steps)
        return float(accountant.get_epsilon(delta))


def epsilon_of_ledger(entries: Sequence[LedgerEntry]) -> float:
    """What the ledger claims was spent."""
    plan = next((entry for entry in entries if entry.kind == "plan"), None)
    if plan is None:
        return 0.0
    spent = math.fsum(entry.rdp_charge for entry in entries if entry.kind in ("charge", "evaluation"))
    return epsilon_at_order(spent, plan.rdp_order, plan.delta)


def ledger_findings(entries: Sequence[LedgerEntry], done: Sequence[RoundDone], recomputed: float) -> list[str]:
    """Where the ledger says less than what was done; empty when it is right.

    Args:
        entries: the domain's verified chain.
        done: what was really done, round by round.
        recomputed: epsilon of that at the ledger's order, by ``epsilon_rdp_elsewhere``.
    """
    found = []
    for one in done:
        charges = [e for e in entries if e.kind == "charge" and e.round_index == one.round_index]
        where = f"round {one.round_index}"
        if len(charges) < one.n_attempts:
            found.append(f"{where}: {one.n_attempts} attempts trained and {len(charges)} were charged")
        charged_steps = sum(entry.steps for entry in charges)
        if charged_steps < one.steps:
            found.append(f"{where}: {one.steps} optimizer steps were taken and {charged_steps} were charged")
        for entry in charges:
            if (entry.noise_multiplier or math.inf) > one.noise_multiplier:
                found.append(
                    f"{where}: charged at noise multiplier {entry.noise_multiplier}, trained with "
                    f"{one.noise_multiplier:g}"
                )
            if (entry.sample_rate or 0.0) < one.sample_rate:
                found.append(f"{where}: charged at sample rate {entry.sample_rate}, trained with {one.sample_rate:g}")
        if one.n_stored > len(charges):
            found.append(f"{where}: {one.n_stored} updates lie in the store and {len(charges)} were charged")
        recorded = {e.digest for e in entries if e.kind == "release" and e.round_index == one.round_index}
        if one.handed_out not in recorded:
            found.append(f"{where}: the update that was handed out has no release entry")
    claimed = epsilon_of_ledger(entries)
    if not claimed >= recomputed * (1 - RELATIVE_TOLERANCE) - ABSOLUTE_TOLERANCE:
        found.append(f"the ledger says epsilon {claimed:.4f}; what was done costs {recomputed:.4f} by dp-accounting")
    return found


class _quiet:  # noqa: N801
    """dp-accounting warns, harmlessly, of orders that do not converge."""

    def __enter__(self) -> None:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")
        self._level = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(self._level)
        self._warnings.__exit__(None, None, None)
