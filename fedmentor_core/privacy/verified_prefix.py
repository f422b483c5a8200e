"""What was verified of a ledger's chain, so that a later reading costs what changed since, and not its whole life.

A later reading skips an entry only where the store says that nobody replaced it since it was read and verified
(``ArtifactStore.list_versions``, taken before the bytes were). All others it reads: what is new, what the store gives
another version or none, and always the last one, whose digest stands for all before it because each entry holds the
digest of the one before. Where a remembered entry is another one now, or gone, nothing is charged.

The entries themselves are remembered and no sum of them: whatever is spent is added up anew for every decision, so
there is no total that could be out of date. A new process remembers nothing. What this notices later than a full
reading does, and what earlier, is in ``docs/ledger.md``.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

from fedmentor_core.records import LedgerEntry


class StoredEntry(NamedTuple):
    """An entry with the digest of the bytes that it is stored as."""

    entry: LedgerEntry
    sha256: str


class VerifiedEntry(NamedTuple):
    """A stored entry with the version that the store gave it before it was read; empty: none."""

    stored: StoredEntry
    version: str


class VerifiedPrefix:
    """One account's chain as far as it was read and verified with this object; about 2 kB an entry. Thread-safe."""

    def __init__(self) -> None:
        """Nothing is verified yet."""
        self._lock = threading.Lock()
        self._entries: tuple[VerifiedEntry, ...] = ()

    @property
    def entries(self) -> tuple[VerifiedEntry, ...]:
        """What is remembered now; a later reading can only add to it."""
        return self._entries

    def advance(self, verified: Sequence[VerifiedEntry]) -> int | None:
        """Remember a chain that was verified just now, where it is the remembered one and not shorter.

        Of readers side by side one may come with an older end: its chain is shorter, and still the same chain.

        Args:
            verified: entries of which each was found to hold the digest of the one before.

        Returns:
            None, or the sequence number of a remembered entry that is another one in ``verified``; then what was
            remembered stays.
        """
        with self._lock:
            last = min(len(verified), len(self._entries)) - 1
            if last >= 0 and verified[last].stored.sha256 != self._entries[last].stored.sha256:
                return last
            if len(verified) >= len(self._entries):
                self._entries = tuple(verified)
            return None
