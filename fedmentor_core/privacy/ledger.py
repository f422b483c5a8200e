"""The privacy ledger: append-only, hash-chained, charged before release, outliving every run.

One account per domain *name* (and one for each of its private gate and test sets): the entries carry the dataset's
fingerprint, and a changed dataset goes on drawing from the same budget. Adding, dropping or reordering rows therefore
never buys a new one; posts under a new name are found by ``shared_posts.py``. How the entries are kept safe is in
``chain.py``; what an account looks like to a reader is in ``ledger_view.py``.

Rule for a death between charge and release: the charge stands. A retry either finds the finished update (the
identical noised bytes, free) or is a new attempt with a charge of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from fedmentor_core.errors import BudgetError, LedgerError
from fedmentor_core.privacy.chain import Chain
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.ledger_view import LedgerView, view_of
from fedmentor_core.privacy.mechanism import PrivacyLevel
from fedmentor_core.privacy.verified_prefix import StoredEntry, VerifiedPrefix
from fedmentor_core.records import DomainPlan, LedgerEntry
from fedmentor_core.storage.base import ArtifactStore

Admission = Callable[[Sequence[LedgerEntry]], None]
"""Raises BudgetError where the account, as it stands, does not admit a charge."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What an account promises besides (epsilon, delta): whom it protects, and how its budget was meant to be used.

    Attributes:
        privacy_level: one unit, or a client's whole dataset. Fixed for life, as the promise is.
        privacy_unit: what one unit is, such as a post. Fixed for life; empty where an older version did not say.
        sensitivity: from which the budget was derived; empty where it was given outright.
        planned_runs: how many runs the lifetime budget is to carry.
        policy_sha256: digest of the site's policy.
    """

    privacy_level: PrivacyLevel = "unit"
    privacy_unit: str = ""
    sensitivity: str = ""
    planned_runs: int = 1
    policy_sha256: str = ""

    @classmethod
    def of(cls, plan: DomainPlan) -> "Terms":
        """The terms that a domain's plan speaks of."""
        return cls(
            privacy_level=plan.privacy_level,
            privacy_unit=plan.privacy_unit,
            sensitivity=plan.sensitivity or "",
            planned_runs=plan.planned_runs,
            policy_sha256=plan.policy_sha256,
        )


class Ledger:
    """One account in an artifact store."""

    def __init__(self, store: ArtifactStore, domain: str, verified: VerifiedPrefix | None = None) -> None:
        """Open ``domain``'s account; nothing is read or written yet.

        Args:
            store: the ledgers' store.
            domain: name of the account.
            verified: what was verified of this account before and need not be read again; None: every operation
                verifies the whole chain, as whoever reports on an account must.
        """
        self._chain = Chain(store, domain, verified)
        self.domain = domain

    def entries(self) -> list[LedgerEntry]:
        """All entries, verified now or before.

        Raises:
            LedgerError: an entry is missing, torn, changed or out of order.
        """
        return [stored.entry for stored in self.chain()]

    def chain(self) -> list[StoredEntry]:
        """The same, each entry with the digest of its stored bytes."""
        return self._chain.read()

    def open_account(
        self,
        account: PrivacyAccount,
        *,
        run_id: str,
        dataset_fingerprint: str,
        terms: Terms | None = None,
        reason: str = "",
    ) -> PrivacyAccount:
        """Record the promise before the first step, or return the one already in force.

        The order and budget are fixed by the first plan for good: the filter theorem needs it. A later plan with
        another (epsilon, delta), level or unit is refused, because a lifetime promise cannot be changed after the
        fact. Other terms, such as ``planned_runs``, may change; a further plan entry then says so.

        Args:
            account: the promise asked for.
            run_id: the run that asks.
            dataset_fingerprint: of its data.
            terms: what else is promised; None: join on whatever terms are in force.
            reason: shown with the entry.

        Raises:
            BudgetError: another promise is already in force.
        """
        entries = self.entries()
        promised = promise_in(entries)
        if promised is not None:
            if (promised.epsilon, promised.delta) != (account.epsilon, account.delta):
                raise BudgetError(
                    f"domain {self.domain!r} was promised epsilon {promised.epsilon:g} at delta {promised.delta:g} for "
                    f"its lifetime; this study asks for epsilon {account.epsilon:g} at delta {account.delta:g}. Set "
                    "the domain's epsilon and delta to the promise."
                )
            changed = None if terms is None else _changed_terms(self.domain, entries, terms)
            if changed is not None:
                raise BudgetError(changed)
            if terms is None or _last_terms(entries) == terms:
                return promised
        self._append(
            promised or account,
            kind="plan",
            run_id=run_id,
            dataset_fingerprint=dataset_fingerprint,
            reason=reason,
            **asdict(terms or Terms()),
        )
        # Another writer may have opened the account first: then its promise is in force, or refuses ours.
        return self.open_account(account, run_id=run_id, dataset_fingerprint=dataset_fingerprint)

    def account(self) -> PrivacyAccount | None:
        """The promise in force, or None before the first plan."""
        return promise_in(self.entries())

    def terms_refusal(self, terms: Terms) -> str | None:
        """Why a study on these terms cannot draw from this account, or None."""
        return _changed_terms(self.domain, self.entries(), terms)

    def spent_rdp(self) -> float:
        """Sum of all charges at the account's order."""
        return spent_rdp_in(self.entries())

    def spent_rdp_by(self, run_id: str, through_round: int | None = None) -> float:
        """Sum of one run's charges at the account's order; where ``through_round`` is given, of rounds up to it."""
        entries = self.entries()
        if through_round is not None:
            entries = [entry for entry in entries if entry.round_index is None or entry.round_index <= through_round]
        return spent_rdp_in(entries, run_id)

    def runs_charged(self, besides: str) -> int:
        """How many runs other than ``besides`` have charged this account."""
        charged = (entry for entry in self.entries() if entry.kind in ("charge", "evaluation"))
        return len({entry.run_id for entry in charged} - {besides})

    def charge(
        self,
        account: PrivacyAccount,
        *,
        run_id: str,
        round_index: int,
        attempt: int,
        dataset_fingerprint: str,
        noise_multiplier: float,
        sample_rate: float,
        steps: int,
        privacy_level: PrivacyLevel = "unit",
        run_rdp_share: float | None = None,
        seeded: bool = False,
    ) -> LedgerEntry:
        """Admit and record a charge, before any data is touched. Atomic against other writers.

        Args:
            account: the promise in force.
            run_id: what the charge is for: the run,
            round_index: its round,
            attempt: and which attempt at it.
            dataset_fingerprint: of the data that will be touched.
            noise_multiplier: of each event of the mechanism.
            sample_rate: as ``mechanism.charged_events`` counts them.
            steps: how many events.
            privacy_level: what the mechanism protects; must be the account's.
            run_rdp_share: RDP at the account's order that this run may spend in all, so that a night that is resumed
                after the next one still has its own; None: no share.
            seeded: the noise is seeded, so that nothing of this is private.

        Raises:
            BudgetError: the lifetime budget, the run's share or the level refuses; a refusal is recorded and nothing
                else changes.
            LedgerError: the chain is broken, or holds another promise than ``account``.
        """
        fields: dict[str, Any] = {
            "run_id": run_id,
            "round_index": round_index,
            "attempt": attempt,
            "dataset_fingerprint": dataset_fingerprint,
            "noise_multiplier": noise_multiplier,
            "sample_rate": sample_rate,
            "steps": steps,
            "privacy_level": privacy_level,
            "seeded": seeded,
        }
        what = f"{steps} steps at noise multiplier {noise_multiplier:g} and sample rate {sample_rate:g}"
        cost = account.charge_of(noise_multiplier, sample_rate, steps)
        return self._charge(account, "charge", cost, what, run_rdp_share, fields)

    def release(
        self,
        account: PrivacyAccount,
        *,
        run_id: str,
        round_index: int,
        attempt: int,
        digest: str,
        dataset_fingerprint: str,
    ) -> LedgerEntry:
        """Record the digest of the noised bytes that may now leave. Costs nothing: the charge did."""
        return self._append(
            account,
            kind="release",
            run_id=run_id,
            round_index=round_index,
            attempt=attempt,
            digest=digest,
            dataset_fingerprint=dataset_fingerprint,
        )

    def charge_evaluation(
        self,
        account: PrivacyAccount,
        *,
        run_id: str,
        adapter_sha256: str,
        attempt: int,
        dataset_fingerprint: str,
        noise_multiplier: float,
        run_rdp_share: float | None = None,
        seeded: bool = False,
    ) -> LedgerEntry:
        """Admit and record one noised release of a private set's metrics, before any of its rows is evaluated.

        It is one step of the Gaussian mechanism over all units of the set (see ``release.py``).

        Raises:
            BudgetError: the lifetime budget or the run's share refuses; a refusal is recorded and nothing else changes.
            LedgerError: the chain is broken, or holds another promise than ``account``.
        """
        fields: dict[str, Any] = {
            "run_id": run_id,
            "adapter_sha256": adapter_sha256,
            "attempt": attempt,
            "dataset_fingerprint": dataset_fingerprint,
            "noise_multiplier": noise_multiplier,
            "sample_rate": 1.0,
            "steps": 1,
            "privacy_level": "unit",
            "seeded": seeded,
        }
        what = f"an evaluation at noise multiplier {noise_multiplier:g}"
        cost = account.charge_of(noise_multiplier, 1.0, 1)
        return self._charge(account, "evaluation", cost, what, run_rdp_share, fields)

    def release_evaluation(self, account: PrivacyAccount, charge: LedgerEntry, digest: str) -> LedgerEntry:
        """Record the digest of the noised metrics that ``charge`` paid for. Costs nothing more."""
        return self._append(
            account,
            kind="release",
            run_id=charge.run_id,
            adapter_sha256=charge.adapter_sha256,
            attempt=charge.attempt,
            digest=digest,
            dataset_fingerprint=charge.dataset_fingerprint,
            seeded=charge.seeded,
        )

    def refuse(self, account: PrivacyAccount, *, run_id: str, round_index: int, reason: str) -> None:
        """Record that the site's policy refused a request."""
        self._append(
            account, kind="refusal", run_id=run_id, round_index=round_index, reason=reason, dataset_fingerprint=""
        )

    def next_attempt(self, run_id: str, round_index: int) -> int:
        """The number of the next attempt at a round: charges are never reused."""
        attempts = [
            entry.attempt
            for entry in self.entries()
            if entry.kind == "charge" and entry.run_id == run_id and entry.round_index == round_index
        ]
        return max(attempts, default=-1) + 1

    def view(self) -> LedgerView:
        """What ``fedmentor ledger`` shows."""
        return view_of(self.domain, self.chain())

    def _charge(
        self,
        account: PrivacyAccount,
        kind: Literal["charge", "evaluation"],
        cost: float,
        what: str,
        run_rdp_share: float | None,
        fields: dict[str, Any],
    ) -> LedgerEntry:
        """Append a charge that the lifetime filter and the run's share admit, else a refusal."""

        def admit(entries: Sequence[LedgerEntry]) -> None:
            self._check_account(account, entries)
            level = _protected(entries)[0]
            if level != fields["privacy_level"]:
                raise BudgetError(
                    f"domain {self.domain!r}: its account was opened for level {level!r} and this charge is at level "
                    f"{fields['privacy_level']!r}. Nothing was trained or released. Set privacy.level to {level!r}."
                )
            spent = spent_rdp_in(entries)
            if not account.admits(spent, cost):
                raise BudgetError(
                    f"domain {self.domain!r}: {what} would pass its lifetime epsilon of {account.epsilon:g} at delta "
                    f"{account.delta:g} ({account.epsilon_spent(spent):.4g} is spent). Nothing was trained or released."
                )
            by_this_run = spent_rdp_in(entries, run_id=fields["run_id"])
            if run_rdp_share is not None and not by_this_run + cost <= run_rdp_share:
                raise BudgetError(
                    f"domain {self.domain!r}: {what} would pass tonight's share of the budget: this run has spent "
                    f"{by_this_run:.4g} of the RDP {run_rdp_share:.4g} that it may spend "
                    f"({account.epsilon_spent(spent):.4g} of the lifetime epsilon {account.epsilon:g} is spent; "
                    "the rest is kept for later runs). Nothing was trained or released."
                )

        try:
            return self._append(account, kind=kind, admit=admit, rdp_charge=cost, **fields)
        except BudgetError as error:
            self._append(account, kind="refusal", reason=str(error), **fields)
            raise

    def _append(
        self,
        account: PrivacyAccount,
        *,
        kind: str,
        admit: Admission | None = None,
        rdp_charge: float = 0.0,
        **fields: Any,
    ) -> LedgerEntry:
        def make(chain: Sequence[StoredEntry]) -> LedgerEntry:
            if admit is not None:
                admit([stored.entry for stored in chain])
            return LedgerEntry.model_validate(
                {
                    "sequence": len(chain),
                    "kind": kind,
                    "domain": self.domain,
                    "rdp_charge": rdp_charge,
                    "rdp_order": account.rdp_order,
                    "rdp_budget": account.rdp_budget,
                    "epsilon_budget": account.epsilon,
                    "delta": account.delta,
                    "created_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    "previous": chain[-1].sha256 if chain else "",
                    **fields,
                }
            )

        return self._chain.append(make)

    def _check_account(self, account: PrivacyAccount, entries: Sequence[LedgerEntry]) -> None:
        """Only the promise in force admits, and only while every charge has its full price."""
        if promise_in(entries) != account:
            raise LedgerError(f"ledger of {self.domain!r}: charged under another promise than the one in force.")
        for entry in entries:
            if entry.kind in ("charge", "evaluation"):
                cost = account.charge_of(entry.noise_multiplier or 0.0, entry.sample_rate or 0.0, entry.steps)
                if not entry.rdp_charge >= cost * (1 - 1e-6):
                    raise self._chain.broken(entry.sequence, "it charges less than its steps cost")


def ledger_domains(store: ArtifactStore) -> Sequence[str]:
    """Names of all accounts in ``store``."""
    return sorted({key.split("/")[1] for key in store.list_keys("ledgers")})


def promise_in(entries: Sequence[LedgerEntry]) -> PrivacyAccount | None:
    """The first plan's promise: it holds for good."""
    for entry in entries:
        if entry.kind == "plan":
            return PrivacyAccount(entry.epsilon_budget, entry.delta, entry.rdp_order, entry.rdp_budget)
    return None


def _last_terms(entries: Sequence[LedgerEntry]) -> Terms:
    plan = next(entry for entry in reversed(entries) if entry.kind == "plan")
    return Terms(plan.privacy_level, plan.privacy_unit, plan.sensitivity, plan.planned_runs, plan.policy_sha256)


def _protected(entries: Sequence[LedgerEntry]) -> tuple[PrivacyLevel, str]:
    """Level and unit that the account was opened for: the first that was said holds for good."""
    plans = [entry for entry in entries if entry.kind == "plan"]
    return plans[0].privacy_level, next((plan.privacy_unit for plan in plans if plan.privacy_unit), "")


def _changed_terms(domain: str, entries: Sequence[LedgerEntry], terms: Terms) -> str | None:
    """Why ``terms`` protect something else than what the account was opened for, or None."""
    if promise_in(entries) is None:
        return None
    level, unit = _protected(entries)
    if level != terms.privacy_level:
        return (
            f"domain {domain!r}: its account was opened for privacy.level {level!r} and this study asks for "
            f"{terms.privacy_level!r}; one budget cannot speak of both. Set privacy.level to {level!r}."
        )
    if unit and terms.privacy_unit and unit != terms.privacy_unit:
        return (
            f"domain {domain!r}: its account protects the unit {unit!r} and this study asks for "
            f"{terms.privacy_unit!r}; one budget cannot speak of both. Set the domain's unit column back."
        )
    return None


def spent_rdp_in(entries: Sequence[LedgerEntry], run_id: str | None = None) -> float:
    """Sum of all charges at the account's order, or of one run's."""
    charges = (entry for entry in entries if entry.kind in ("charge", "evaluation"))
    return sum(entry.rdp_charge for entry in charges if run_id in (None, entry.run_id))
