"""Envelope encryption of one object: AES-256-GCM in segments, under a data key that only this object has.

Layout: ``FMENC``, version (1 byte), id of the key-encryption key (8), nonce (12), then the data key, the plaintext's
sha256 and its size, encrypted by the key-encryption key; then segments of 1 MiB of plaintext, each with its own tag.

A segment's nonce is its number and whether it is the last (the STREAM construction of Hoang, Reyhanitabar, Rogaway and
Vizar, CRYPTO 2015), so that segments cannot be reordered, repeated or cut off; the data key is fresh, so no nonce
repeats. The associated data of every part are the object's key and all of the header before it: an object that is
moved to another key, or given another header, does not open. The header's nonces are random: one key-encryption key
should encrypt at most 2**32 objects (NIST SP 800-38D, section 8.3).
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedmentor_core.errors import IntegrityError, StorageError
from fedmentor_core.storage.body import Body

_MAGIC = b"FMENC\x01"
_ID_BYTES = 8
_NONCE_BYTES = 12
_TAG_BYTES = 16
_DATA_KEY_BYTES = 32
_WRAPPED_BYTES = _DATA_KEY_BYTES + 32 + 8 + _TAG_BYTES
HEADER_BYTES = len(_MAGIC) + _ID_BYTES + _NONCE_BYTES + _WRAPPED_BYTES
SEGMENT_BYTES = 2**20


@dataclass(frozen=True)
class Key:
    """A key-encryption key of 32 bytes. Its id is public and says nothing about it."""

    secret: bytes

    @property
    def id(self) -> bytes:
        """First 8 bytes of a digest, as written in headers."""
        return hashlib.sha256(b"fedmentor key id\0" + self.secret).digest()[:_ID_BYTES]

    def __repr__(self) -> str:
        """The id only."""
        return f"Key({self.id.hex()})"


def sealed_bytes(n_bytes: int) -> int:
    """Size of the envelope of ``n_bytes`` bytes."""
    return HEADER_BYTES + n_bytes + _TAG_BYTES * max(1, -(-n_bytes // SEGMENT_BYTES))


def opened_bytes(n_sealed: int) -> int | None:
    """Size of what an envelope of ``n_sealed`` bytes holds; None: no envelope has that size."""
    segments = -(-(n_sealed - HEADER_BYTES) // (SEGMENT_BYTES + _TAG_BYTES))
    n_bytes = n_sealed - HEADER_BYTES - _TAG_BYTES * segments
    return n_bytes if n_bytes >= 0 and sealed_bytes(n_bytes) == n_sealed else None


def seal(name: str, body: Body, key: Key) -> Iterator[bytes]:
    """The envelope of ``body``, in pieces.

    Args:
        name: the object's key in its store; only under this name will it open.
        body: the plaintext; it is read once.
        key: encrypts the object's own data key.
    """
    data_key, nonce, head = os.urandom(_DATA_KEY_BYTES), os.urandom(_NONCE_BYTES), _MAGIC + key.id
    inside = data_key + bytes.fromhex(body.sha256) + body.n_bytes.to_bytes(8, "big")
    header = head + nonce + AESGCM(key.secret).encrypt(nonce, inside, _associated(head, name))
    yield header
    cipher, associated, left = AESGCM(data_key), _associated(header, name), body.n_bytes
    with body.open() as source:
        for number in range(max(1, -(-body.n_bytes // SEGMENT_BYTES))):
            plain = source.read(SEGMENT_BYTES)
            left -= len(plain)
            yield cipher.encrypt(_segment_nonce(number, last=left == 0), plain, associated)
    if left != 0:
        raise StorageError(f"{name}: its file changed while it was encrypted; nothing was stored. Try again.")


@dataclass(frozen=True)
class Opened:
    """An envelope whose header is authentic; ``segments`` are authenticated one by one as they are read."""

    n_bytes: int
    sha256: str
    segments: Iterator[bytes]


def unseal(name: str, pieces: Iterator[bytes], keys: Mapping[bytes, Key]) -> Opened:
    """Open the envelope that ``pieces`` make up.

    Args:
        name: the object's key in its store.
        pieces: the envelope, cut anywhere.
        keys: all keys that may have encrypted it, by id.

    Raises:
        IntegrityError: not an envelope, changed, cut off, or moved from another key. ``segments`` raises it too.
        StorageError: encrypted with a key that is not at hand.
    """
    reader = _Reader(pieces)
    header = reader.take(HEADER_BYTES)
    if not header.startswith(_MAGIC) or len(header) < HEADER_BYTES:
        raise IntegrityError(
            f"{name} is not encrypted (or in an unknown version); this store is opened with an encryption key, so only "
            "encrypted objects are read. Open it without storage.encryption_key_file, or store the object anew."
        )
    head, rest = header[: len(_MAGIC) + _ID_BYTES], header[len(_MAGIC) + _ID_BYTES :]
    key = keys.get(head[len(_MAGIC) :])
    if key is None:
        raise StorageError(
            f"{name} is encrypted with key {head[len(_MAGIC) :].hex()}; the key file holds "
            f"{', '.join(one.hex() for one in keys)}. Add that key to the file, below the first."
        )
    try:
        inside = AESGCM(key.secret).decrypt(rest[:_NONCE_BYTES], rest[_NONCE_BYTES:], _associated(head, name))
    except InvalidTag:
        raise _not_authentic(name) from None
    n_bytes = int.from_bytes(inside[-8:], "big")
    cipher = AESGCM(inside[:_DATA_KEY_BYTES])
    segments = _open_segments(name, reader, cipher, _associated(header, name), n_bytes)
    return Opened(n_bytes, inside[_DATA_KEY_BYTES:-8].hex(), segments)


def _open_segments(name: str, reader: "_Reader", cipher: AESGCM, associated: bytes, n_bytes: int) -> Iterator[bytes]:
    count = max(1, -(-n_bytes // SEGMENT_BYTES))
    for number in range(count):
        sealed = reader.take(SEGMENT_BYTES + _TAG_BYTES)
        try:
            plain = cipher.decrypt(_segment_nonce(number, last=number == count - 1), sealed, associated)
        except (InvalidTag, ValueError):
            raise _not_authentic(name) from None
        if plain:
            yield plain
    if reader.take(1):
        raise _not_authentic(name)


class _Reader:
    """Takes exact amounts from pieces that are cut anywhere."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._held = memoryview(b"")

    def take(self, n_bytes: int) -> bytes:
        """The next ``n_bytes`` bytes, fewer at the end."""
        taken = [self._held[:n_bytes]]
        self._held = self._held[n_bytes:]
        missing = n_bytes - len(taken[0])
        while missing and (piece := next(self._pieces, None)) is not None:
            taken.append(memoryview(piece)[:missing])
            self._held = memoryview(piece)[missing:]
            missing -= len(taken[-1])
        return b"".join(taken)


def _segment_nonce(number: int, *, last: bool) -> bytes:
    return number.to_bytes(_NONCE_BYTES - 1, "big") + bytes([last])


def _associated(header: bytes, name: str) -> bytes:
    return header + name.encode()


def _not_authentic(name: str) -> IntegrityError:
    return IntegrityError(
        f"{name} does not open: it was changed, cut off, or copied from another key. Restore it from a copy."
    )
