"""What a ledger says to a reader: promise, spent, left, and how much of it is left for tonight."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from fedmentor_core.errors import BudgetError
from fedmentor_core.privacy.accountant import calibrate_at_order
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.verified_prefix import StoredEntry
from fedmentor_core.records import LedgerEntry, Record


class LastSchedule(Record):
    """What the last run that charged this account did, counted once: retries are not part of a schedule."""

    run_id: str
    noise_multiplier: float
    sample_rate: float
    steps_per_round: int
    rounds: int = Field(description="Of a private gate or test set: releases.")

    @property
    def steps(self) -> int:
        """Charged mechanism invocations of one such run."""
        return self.steps_per_round * self.rounds


class Tonight(Record):
    """What the next run may spend, and what a run like the last one would need."""

    planned_runs: int
    runs_charged: int
    epsilon_after: float = Field(description="Lifetime epsilon up to which tonight's run may go.")
    epsilon_share: float = Field(description="Of that, above what is spent.")
    rdp_share: float = Field(description="The same as RDP at the account's order, which is what adds up.")
    last: LastSchedule | None = None
    least_noise_multiplier: float | None = Field(
        default=None, description="Least noise at which a run like the last fits tonight's share; None: none does."
    )
    such_runs_left: int | None = Field(
        default=None, description="Runs like the last, at its own noise multiplier, that the whole rest carries."
    )


class LedgerView(Record):
    """``fedmentor ledger --json``, one account."""

    domain: str
    verified: bool = True
    problem: str = Field(default="", description="Which entry is broken and why; then nothing else is shown.")
    dataset_fingerprint: str = ""
    delta: float | None = None
    epsilon_budget: float | None = None
    epsilon_spent: float | None = Field(default=0.0, description="None where the chain is broken: it is not known.")
    epsilon_left: float | None = None
    privacy_level: str = "unit"
    privacy_unit: str = ""
    sensitivity: str = ""
    policy_sha256: str = ""
    private: bool = Field(default=True, description="False: at least one charge paid for seeded noise.")
    tonight: Tonight | None = None
    entries: tuple[dict[str, Any], ...] = ()


def view_of(domain: str, chain: Sequence[StoredEntry]) -> LedgerView:
    """The view of a verified chain."""
    entries = [stored.entry for stored in chain]
    shown: dict[str, Any] = {
        "domain": domain,
        "dataset_fingerprint": next((e.dataset_fingerprint for e in reversed(entries) if e.dataset_fingerprint), ""),
        "private": not any(entry.seeded for entry in entries),
        "entries": tuple({**stored.entry.model_dump(mode="json"), "sha256": stored.sha256} for stored in chain),
    }
    plans = [entry for entry in entries if entry.kind == "plan"]
    if not plans:
        return LedgerView.model_validate(shown)
    promise, latest = plans[0], plans[-1]
    account = PrivacyAccount(promise.epsilon_budget, promise.delta, promise.rdp_order, promise.rdp_budget)
    charges = [entry for entry in entries if entry.kind in ("charge", "evaluation")]
    spent = account.epsilon_spent(sum(entry.rdp_charge for entry in charges))
    return LedgerView.model_validate(
        {
            **shown,
            "delta": account.delta,
            "epsilon_budget": account.epsilon,
            "epsilon_spent": spent,
            "epsilon_left": max(0.0, account.epsilon - spent),
            "privacy_level": promise.privacy_level,
            "privacy_unit": promise.privacy_unit,
            "sensitivity": latest.sensitivity,
            "policy_sha256": latest.policy_sha256,
            "tonight": tonight(account, latest.planned_runs, charges),
        }
    )


def tonight(account: PrivacyAccount, planned_runs: int, charges: Sequence[LedgerEntry]) -> Tonight:
    """What the next run may spend: an equal share of what is left, over the planned runs that have not charged yet.

    When every planned run has charged, the next one may use all that is left. Shares are equal in RDP at the account's
    order, which adds up over runs as epsilon does not.

    Args:
        account: the promise in force.
        planned_runs: runs that the lifetime budget is to carry.
        charges: all charges so far, in order.
    """
    spent = sum(entry.rdp_charge for entry in charges)
    runs_charged = len({entry.run_id for entry in charges})
    left = max(0.0, account.rdp_budget - spent)
    share = left / max(1, planned_runs - runs_charged)
    last = _last_schedule(charges)
    return Tonight(
        planned_runs=planned_runs,
        runs_charged=runs_charged,
        epsilon_after=account.epsilon_spent(spent + share),
        epsilon_share=account.epsilon_spent(spent + share) - account.epsilon_spent(spent),
        rdp_share=share,
        last=last,
        least_noise_multiplier=None if last is None else _least_noise(account, share, last),
        such_runs_left=None if last is None else _runs_left(account, left, last),
    )


def _last_schedule(charges: Sequence[LedgerEntry]) -> LastSchedule | None:
    if not charges:
        return None
    last = charges[-1]
    return LastSchedule(
        run_id=last.run_id,
        noise_multiplier=last.noise_multiplier or 0.0,
        sample_rate=last.sample_rate or 0.0,
        steps_per_round=last.steps,
        rounds=len({(entry.round_index, entry.adapter_sha256) for entry in charges if entry.run_id == last.run_id}),
    )


def _least_noise(account: PrivacyAccount, share: float, last: LastSchedule) -> float | None:
    try:
        return calibrate_at_order(share, account.rdp_order, last.sample_rate, last.steps)
    except BudgetError:
        return None


def _runs_left(account: PrivacyAccount, left: float, last: LastSchedule) -> int | None:
    cost = account.charge_of(last.noise_multiplier, last.sample_rate, last.steps)
    return int(left / cost) if cost > 0 else None
