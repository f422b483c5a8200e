"""The hash chain under a ledger: entries that can be added, and neither changed, reordered, cut off nor lost unnoticed.

Entries are objects ``ledgers/<account>/<sequence>.json`` created with create-if-absent, each holding the sha256 of
the one before. Two writers racing for a sequence number: one wins, the other re-reads and decides again. A chain says
nothing about its own last entry, so a witness with that entry's digest is kept under ``ledger-witnesses/``: an end cut
off or changed is found too. (Who can rewrite entries and witnesses alike can still forge an account: keep the ledger's
store where the site alone may write.)

What is chained and checked is the stored bytes themselves, which must be canonical JSON. An entry that an older version
wrote, with fewer fields, therefore stays valid; one with fields that this version does not know is refused.

A reading verifies everything, or what is not as it was verified before (``verified_prefix.py``).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from pydantic import ValidationError

from fedmentor_core.errors import AlreadyExistsError, IntegrityError, LedgerError, NotFoundError, StorageError
from fedmentor_core.hashing import canonical_json, sha256_bytes
from fedmentor_core.privacy.verified_prefix import StoredEntry, VerifiedEntry, VerifiedPrefix
from fedmentor_core.records import LedgerEntry
from fedmentor_core.storage.base import ArtifactStore

_MAX_RACES = 50


class Chain:
    """One account's chain in an artifact store."""

    def __init__(self, store: ArtifactStore, account: str, verified: VerifiedPrefix | None = None) -> None:
        """Open ``account``'s chain; nothing is read or written yet.

        Args:
            store: the ledgers' store.
            account: whose chain.
            verified: what was verified of it before, which is then not read again; None: every reading verifies all.
        """
        self._store = store
        self._verified = verified
        self.account = account

    def read(self) -> list[StoredEntry]:
        """Read and verify the whole chain; what was verified before is read again where the store says it changed.

        Raises:
            LedgerError: an entry is missing, torn, changed or out of order, or the chain is not the one that was
                verified before.
        """
        known = () if self._verified is None else self._verified.entries  # first, and then what may have grown since
        witnesses = list(self._store.list_keys(f"ledger-witnesses/{self.account}"))  # before entries: none is ahead
        versions = []
        for sequence, (key, version) in enumerate(self._store.list_versions(f"ledgers/{self.account}")):
            if key != self._key(sequence):
                raise self.broken(sequence, f"expected {self._key(sequence)}, found {key}")
            versions.append(version)

        def is_verified(sequence: int) -> bool:
            version = versions[sequence]
            return sequence < len(known) - 1 and version != "" and version == known[sequence].version

        to_read = [sequence for sequence in range(len(versions)) if not is_verified(sequence)]
        found: list[VerifiedEntry] = []
        with closing(self._store.get_each([self._key(sequence) for sequence in to_read])) as arriving:
            for sequence, version in enumerate(versions):
                if is_verified(sequence):
                    found.append(known[sequence])
                    continue
                stored = self._next_entry(arriving, sequence, found[-1].stored.sha256 if found else "")
                if sequence < len(known) and stored.sha256 != known[sequence].stored.sha256:
                    raise self.broken(sequence, "it is not the entry that was verified before")
                found.append(VerifiedEntry(stored, version))
        n_entries, newest = len(found), found[-1].stored.sha256 if found else ""
        if n_entries < len(known) or (witnesses and witnesses[-1] >= self._witness_key(n_entries)):
            raise self.broken(n_entries, "it was written and is missing")
        last = self._witness_key(n_entries - 1)
        if last in witnesses and self._witnessed(last) != newest:
            raise self.broken(n_entries - 1, "its digest is not the one that was witnessed")
        changed = None if self._verified is None else self._verified.advance(found)
        if changed is not None:
            raise self.broken(changed, "it is not the entry that was verified before")
        return [one.stored for one in found]

    def append(self, make: Callable[[Sequence[StoredEntry]], LedgerEntry]) -> LedgerEntry:
        """Add the entry that ``make`` makes of the whole chain, which no other writer has added to meanwhile.

        Args:
            make: called again after every lost race; must take ``sequence`` and ``previous`` from what it is given.

        Raises:
            LedgerError: the chain is broken, cannot be written, or other writers were always faster.
            FedMentorError: whatever ``make`` raises; then nothing is added.
        """
        for _ in range(_MAX_RACES):
            entry = make(self.read())
            data = canonical_json(entry.model_dump(mode="json"))
            try:
                self._store.put_bytes(self._key(entry.sequence), data)
            except AlreadyExistsError:
                continue  # another writer won this number: read again, decide again
            except StorageError as error:
                raise LedgerError(f"ledger of {self.account!r} cannot be written: {error} Training stops.") from error
            self._witness(entry.sequence, sha256_bytes(data))
            return entry
        raise LedgerError(f"ledger of {self.account!r}: {_MAX_RACES} writers were faster; try again later.")

    def broken(self, sequence: int, why: str) -> LedgerError:
        """The error of a chain that cannot be trusted from ``sequence`` on."""
        return LedgerError(
            f"ledger of {self.account!r} is broken at entry {sequence}: {why}. Nothing is charged or trained until it "
            "is restored from a copy; never delete entries, for that would forget spent budget."
        )

    def _next_entry(self, arriving: Iterator[bytes], sequence: int, previous: str) -> StoredEntry:
        """The entry at ``sequence``, which must follow the one whose bytes have the digest ``previous``."""
        try:
            data = next(arriving)
        except NotFoundError:
            raise self.broken(sequence, "it vanished while it was read") from None
        except IntegrityError:
            raise self.broken(sequence, "its bytes are not those that were stored") from None
        entry = self._parse(sequence, data)
        if entry.sequence != sequence or entry.previous != previous or entry.domain != self.account:
            raise self.broken(sequence, "its place in the chain does not match")
        return StoredEntry(entry, sha256_bytes(data))

    def _parse(self, sequence: int, data: bytes) -> LedgerEntry:
        try:
            plain = json.loads(data)
            canonical = canonical_json(plain) == data
            entry = LedgerEntry.model_validate_json(data, strict=True)
        except (ValidationError, ValueError):
            raise self.broken(sequence, "it is torn or not an entry") from None
        if not canonical:
            raise self.broken(sequence, "its bytes are not the canonical form")
        return entry

    def _witness(self, sequence: int, digest: str) -> None:
        try:
            self._store.put(self._witness_key(sequence), digest.encode())
        except StorageError as error:
            raise LedgerError(f"ledger of {self.account!r} cannot be witnessed: {error} Training stops.") from error

    def _witnessed(self, key: str) -> str:
        """The digest in a witness; empty where the witness itself was changed, which fits no entry."""
        try:
            return self._store.get_bytes(key).decode("ascii", "replace")
        except IntegrityError:
            return ""

    def _witness_key(self, sequence: int) -> str:
        return f"ledger-witnesses/{self.account}/{sequence:08d}"

    def _key(self, sequence: int) -> str:
        return f"ledgers/{self.account}/{sequence:08d}.json"
