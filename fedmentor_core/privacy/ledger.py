"""The privacy ledger: append-only, hash-chained, charged before release, outliving every run.

Entries are objects ``ledgers/<domain>/<sequence>.json`` created with create-if-absent, each holding the sha256 of
the one before. Two writers racing for a sequence number: one wins, the other re-reads and tries again. A missing,
torn, changed or reordered entry breaks the chain, and then nothing may be charged (fail closed). A chain says nothing
about its own last entry, so a witness with that entry's digest is kept under ``ledger-witnesses/``: an end cut off or
changed is found too. (Who can rewrite entries and witnesses alike can still forge an account: keep the ledger's store
where the site alone may write.)

One account per domain *name*: the entries carry the dataset's fingerprint, and a changed dataset goes on drawing
from the same budget. Adding, dropping or reordering rows therefore never buys a new one.

Rule for a death between charge and release: the charge stands. A retry either finds the finished update (the
identical noised bytes, free) or is a new attempt with a charge of its own.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from fedmentor_core.errors import AlreadyExistsError, BudgetError, LedgerError, NotFoundError, StorageError
from fedmentor_core.hashing import canonical_json, sha256_bytes
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.records import LedgerEntry, Record
from fedmentor_core.storage.base import ArtifactStore

_MAX_RACES = 50


class LedgerView(Record):
    """``fedmentor ledger --json``, one domain."""

    domain: str
    dataset_fingerprint: str
    delta: float | None
    epsilon_budget: float | None
    epsilon_spent: float
    entries: tuple[dict[str, Any], ...]


class Ledger:
    """One domain's account in an artifact store."""

    def __init__(self, store: ArtifactStore, domain: str) -> None:
        """Open ``domain``'s account; nothing is read or written yet."""
        self._store = store
        self.domain = domain

    def entries(self) -> list[LedgerEntry]:
        """Read and verify the whole chain.

        Raises:
            LedgerError: an entry is missing, torn, changed or out of order.
        """
        witnesses = list(self._store.list_keys(f"ledger-witnesses/{self.domain}"))  # first, so none is ahead of us
        found: list[LedgerEntry] = []
        previous = ""
        for sequence, key in enumerate(self._store.list_keys(f"ledgers/{self.domain}")):
            if key != self._key(sequence):
                raise self._broken(sequence, f"expected {self._key(sequence)}, found {key}")
            try:
                data = self._store.get_bytes(key)
            except NotFoundError:
                raise self._broken(sequence, "it vanished while it was read") from None
            try:
                entry = LedgerEntry.model_validate_json(data)
            except ValidationError:
                raise self._broken(sequence, "it is torn or not an entry") from None
            if entry.sequence != sequence or entry.previous != previous or entry.domain != self.domain:
                raise self._broken(sequence, "its place in the chain does not match")
            if canonical_json(entry.model_dump(mode="json")) != data:
                raise self._broken(sequence, "its bytes are not the canonical form")
            found.append(entry)
            previous = sha256_bytes(data)
        if witnesses and witnesses[-1] >= self._witness_key(len(found)):
            raise self._broken(len(found), "it was written and is missing")
        last = self._witness_key(len(found) - 1)
        if last in witnesses and self._store.get_bytes(last) != previous.encode():
            raise self._broken(len(found) - 1, "its digest is not the one that was witnessed")
        return found

    def open_account(
        self, account: PrivacyAccount, *, run_id: str, dataset_fingerprint: str, reason: str = ""
    ) -> PrivacyAccount:
        """Record the promise before the first step, or return the one already in force.

        The order and budget are fixed by the first plan for good: the filter theorem needs it. A later plan with
        another (epsilon, delta) is refused, because a lifetime promise cannot be raised after the fact.

        Raises:
            BudgetError: another promise is already in force.
        """
        promised = self.account()
        if promised is not None:
            if (promised.epsilon, promised.delta) != (account.epsilon, account.delta):
                raise BudgetError(
                    f"domain {self.domain!r} was promised epsilon {promised.epsilon:g} at delta {promised.delta:g} for "
                    f"its lifetime; this study asks for epsilon {account.epsilon:g} at delta {account.delta:g}. Set "
                    "the domain's epsilon and delta to the promise."
                )
            return promised
        self._append(account, kind="plan", run_id=run_id, dataset_fingerprint=dataset_fingerprint, reason=reason)
        return self.open_account(account, run_id=run_id, dataset_fingerprint=dataset_fingerprint)

    def account(self) -> PrivacyAccount | None:
        """The promise in force, or None before the first plan."""
        return _in_force(self.entries())

    def spent_rdp(self) -> float:
        """Sum of all charges at the account's order."""
        return _spent(self.entries())

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
    ) -> LedgerEntry:
        """Admit and record a charge, before any data is touched. Atomic against other writers.

        Raises:
            BudgetError: the filter refuses; a refusal is recorded and nothing else changes.
        """
        cost = account.charge_of(noise_multiplier, sample_rate, steps)
        fields: dict[str, Any] = {
            "run_id": run_id,
            "round_index": round_index,
            "attempt": attempt,
            "dataset_fingerprint": dataset_fingerprint,
            "noise_multiplier": noise_multiplier,
            "sample_rate": sample_rate,
            "steps": steps,
        }
        entry = self._append(account, kind="charge", rdp_charge=cost, admit=True, **fields)
        if entry is None:
            spent = self.spent_rdp()
            reason = (
                f"domain {self.domain!r}: {steps} steps at noise multiplier {noise_multiplier:g} and sample rate "
                f"{sample_rate:g} would pass its lifetime epsilon of {account.epsilon:g} at delta {account.delta:g} "
                f"({account.epsilon_spent(spent):.4g} is spent)"
            )
            self._append(account, kind="refusal", reason=reason, **fields)
            raise BudgetError(reason + ". Nothing was trained or released.")
        return entry

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
        entry = self._append(
            account,
            kind="release",
            run_id=run_id,
            round_index=round_index,
            attempt=attempt,
            digest=digest,
            dataset_fingerprint=dataset_fingerprint,
        )
        assert entry is not None
        return entry

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
        entries = self.entries()
        plan = next((entry for entry in entries if entry.kind == "plan"), None)
        spent = 0.0
        if plan is not None:
            account = PrivacyAccount(plan.epsilon_budget, plan.delta, plan.rdp_order, plan.rdp_budget)
            spent = account.epsilon_spent(_spent(entries))
        return LedgerView(
            domain=self.domain,
            dataset_fingerprint=next((e.dataset_fingerprint for e in reversed(entries) if e.dataset_fingerprint), ""),
            delta=plan.delta if plan else None,
            epsilon_budget=plan.epsilon_budget if plan else None,
            epsilon_spent=spent,
            entries=tuple(
                {**entry.model_dump(mode="json"), "sha256": sha256_bytes(canonical_json(entry.model_dump(mode="json")))}
                for entry in entries
            ),
        )

    def _append(
        self, account: PrivacyAccount, *, kind: str, admit: bool = False, rdp_charge: float = 0.0, **fields: Any
    ) -> LedgerEntry | None:
        for _ in range(_MAX_RACES):
            entries = self.entries()
            if admit:
                self._check_account(account, entries)
                if not account.admits(_spent(entries), rdp_charge):
                    return None
            previous = canonical_json(entries[-1].model_dump(mode="json")) if entries else b""
            entry = LedgerEntry.model_validate(
                {
                    "sequence": len(entries),
                    "kind": kind,
                    "domain": self.domain,
                    "rdp_charge": rdp_charge,
                    "rdp_order": account.rdp_order,
                    "rdp_budget": account.rdp_budget,
                    "epsilon_budget": account.epsilon,
                    "delta": account.delta,
                    "created_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    "previous": sha256_bytes(previous) if previous else "",
                    **fields,
                }
            )
            try:
                self._store.put_bytes(self._key(entry.sequence), canonical_json(entry.model_dump(mode="json")))
            except AlreadyExistsError:
                continue  # another writer won this number: read again, admit again
            except StorageError as error:
                raise LedgerError(f"ledger of {self.domain!r} cannot be written: {error} Training stops.") from error
            self._witness(entry)
            return entry
        raise LedgerError(f"ledger of {self.domain!r}: {_MAX_RACES} writers were faster; try again later.")

    def _check_account(self, account: PrivacyAccount, entries: Sequence[LedgerEntry]) -> None:
        """Only the promise in force admits, and only while every charge has its full price."""
        if _in_force(entries) != account:
            raise LedgerError(f"ledger of {self.domain!r}: charged under another promise than the one in force.")
        for entry in entries:
            if entry.kind == "charge":
                cost = account.charge_of(entry.noise_multiplier or 0.0, entry.sample_rate or 0.0, entry.steps)
                if not entry.rdp_charge >= cost * (1 - 1e-6):
                    raise self._broken(entry.sequence, "it charges less than its steps cost")

    def _witness(self, entry: LedgerEntry) -> None:
        digest = sha256_bytes(canonical_json(entry.model_dump(mode="json")))
        try:
            self._store.put(self._witness_key(entry.sequence), digest.encode())
        except StorageError as error:
            raise LedgerError(f"ledger of {self.domain!r} cannot be witnessed: {error} Training stops.") from error

    def _witness_key(self, sequence: int) -> str:
        return f"ledger-witnesses/{self.domain}/{sequence:08d}"

    def _key(self, sequence: int) -> str:
        return f"ledgers/{self.domain}/{sequence:08d}.json"

    def _broken(self, sequence: int, why: str) -> LedgerError:
        return LedgerError(
            f"ledger of {self.domain!r} is broken at entry {sequence}: {why}. Nothing is charged or trained until it "
            "is restored from a copy; never delete entries, for that would forget spent budget."
        )


def ledger_domains(store: ArtifactStore) -> Sequence[str]:
    """Names of all domains that have an account in ``store``."""
    return sorted({key.split("/")[1] for key in store.list_keys("ledgers")})


def _in_force(entries: Sequence[LedgerEntry]) -> PrivacyAccount | None:
    """The first plan's promise: it holds for good."""
    for entry in entries:
        if entry.kind == "plan":
            return PrivacyAccount(entry.epsilon_budget, entry.delta, entry.rdp_order, entry.rdp_budget)
    return None


def _spent(entries: Sequence[LedgerEntry]) -> float:
    return sum(entry.rdp_charge for entry in entries if entry.kind in ("charge", "evaluation"))
