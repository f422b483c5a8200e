"""What is to be stored: bytes in memory or a file, with size and digest known before the first byte is sent."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fedmentor_core.errors import StorageError
from fedmentor_core.hashing import sha256_bytes

PIECE_BYTES = 8 * 2**20
"""What is asked for at once over a network, where each request costs a round trip."""
FILE_PIECE_BYTES = 2**21
"""What is read from a file at once: it is still in the processor's cache when it is digested and copied."""


@dataclass(frozen=True)
class Body:
    """An object's content. It can be read as often as a retry needs; a file is never held in memory whole."""

    source: bytes | Path
    n_bytes: int
    sha256: str

    @classmethod
    def of(cls, source: bytes | Path) -> "Body":
        """Measure and digest ``source``.

        Raises:
            StorageError: the file cannot be read.
        """
        if isinstance(source, bytes):
            return cls(source, len(source), sha256_bytes(source))
        digest, n_bytes = hashlib.sha256(), 0
        try:
            with source.open("rb") as handle:
                for piece in pieces_of(handle):
                    digest.update(piece)
                    n_bytes += len(piece)
        except OSError as error:
            raise StorageError(f"cannot read {source}: {error.strerror}. Nothing was stored.") from error
        return cls(source, n_bytes, digest.hexdigest())

    def open(self) -> BinaryIO:
        """A reader from the first byte. Bytes are shared, not copied."""
        return io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source.open("rb")

    def whole(self) -> bytes:
        """All bytes: for objects that are small enough to be sent in one request."""
        return self.source if isinstance(self.source, bytes) else self.part(0, self.n_bytes)

    def part(self, start: int, n_bytes: int) -> bytes:
        """A copy of ``n_bytes`` bytes from ``start``, fewer at the end."""
        with self.open() as handle:
            handle.seek(start)
            return handle.read(n_bytes)


def pieces_of(handle: BinaryIO) -> Iterator[bytes]:
    """The rest of an open file in pieces of ``FILE_PIECE_BYTES``."""
    while piece := handle.read(FILE_PIECE_BYTES):
        yield piece
