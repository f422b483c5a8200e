"""A store that encrypts before anything leaves the machine: any other store, wrapped.

Whoever holds the store sees keys, sizes, times and pointers' moves, and no content; it can withhold an object or bring
back an old pointer, but not change or exchange objects (``envelope.py`` says how).
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedmentor_core.errors import ConfigError, IntegrityError, StorageError
from fedmentor_core.secret_file import read_secret_file
from fedmentor_core.storage.base import ArtifactStore, ObjectStat
from fedmentor_core.storage.body import Body
from fedmentor_core.storage.envelope import Key, opened_bytes, seal, sealed_bytes, unseal

_HOW = "Make one with: (umask 077; openssl rand -hex 32 > KEYFILE)"


class KeyRing:
    """Key-encryption keys: the first encrypts, all decrypt. To rotate, put a new key above the old ones."""

    def __init__(self, keys: Sequence[Key]) -> None:
        """Hold ``keys``, at least one."""
        self.first = keys[0]
        self.by_id = {key.id: key for key in keys}

    @classmethod
    def from_file(cls, path: Path) -> "KeyRing":
        """Read a key file.

        Raises:
            ConfigError: the file is missing, open to others, or holds something else. Never quotes it.
        """
        return cls.from_text(read_secret_file(path, "key file", _HOW), f"key file {path}")

    @classmethod
    def from_text(cls, text: str, source: str) -> "KeyRing":
        """Read one key of 64 hex digits a line; empty lines and lines that begin with ``#`` do not count.

        Args:
            text: a key file's content, or a secret block's.
            source: its name in messages.

        Raises:
            ConfigError: something else. Never quotes it.
        """
        keys = []
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip() or line.strip().startswith("#"):
                continue
            try:
                secret = bytes.fromhex(line.strip())
            except ValueError:
                secret = b""
            if len(secret) != 32:
                raise ConfigError(f"{source}, line {number}: a key is 64 hex digits. {_HOW}")
            keys.append(Key(secret))
        if not keys:
            raise ConfigError(f"{source} holds no key. {_HOW}")
        return cls(keys)


class EncryptedStore(ArtifactStore):
    """``inner`` with every object and pointer in an envelope. References carry digest and size of the plaintext."""

    def __init__(self, inner: ArtifactStore, ring: KeyRing) -> None:
        """Wrap ``inner``; what lies there unencrypted is refused, not read."""
        self.inner = inner
        self.url = inner.url
        self.reads_at_once = inner.reads_at_once
        self._ring = ring

    def _create(self, key: str, body: Body) -> None:
        if isinstance(body.source, bytes):
            self.inner._create(key, Body.of(b"".join(seal(key, body, self._ring.first))))
            return
        try:
            with tempfile.NamedTemporaryFile(prefix="fedmentor-") as spooled:
                spooled.writelines(seal(key, body, self._ring.first))
                spooled.flush()
                self.inner._create(key, Body.of(Path(spooled.name)))
        except OSError as error:
            raise StorageError(
                f"cannot encrypt {key}: {error.strerror}. The temporary folder needs {sealed_bytes(body.n_bytes)} B."
            ) from error

    def _read(self, key: str) -> tuple[bytes, str | None]:
        opened = unseal(key, iter([self.inner._read(key)[0]]), self._ring.by_id)
        return b"".join(opened.segments), opened.sha256

    def _pieces(self, key: str, n_bytes: int) -> Iterator[bytes]:
        opened = unseal(key, self.inner._pieces(key, sealed_bytes(n_bytes)), self._ring.by_id)
        yield from opened.segments

    def exists(self, key: str) -> bool:
        """See ``ArtifactStore``."""
        return self.inner.exists(key)

    def stat(self, key: str) -> ObjectStat | None:
        """See ``ArtifactStore``. The digest is inside the envelope, for it would tell a content that can be guessed."""
        found = self.inner.stat(key)
        if found is None:
            return None
        n_bytes = opened_bytes(found.n_bytes)
        if n_bytes is None:
            raise IntegrityError(f"{key} in {self.url} ({found.n_bytes} bytes) is no encrypted object, or was cut off.")
        return ObjectStat(n_bytes, None)

    def list_keys(self, prefix: str) -> Iterator[str]:
        """See ``ArtifactStore``."""
        yield from self.inner.list_keys(prefix)

    def list_versions(self, prefix: str) -> Iterator[tuple[str, str]]:
        """See ``ArtifactStore``; of the envelopes."""
        yield from self.inner.list_versions(prefix)

    def _read_pointer(self, key: str) -> tuple[bytes, str] | None:
        stored = self.inner._read_pointer(key)
        if stored is None:
            return None
        return b"".join(unseal(_pointer_name(key), iter([stored[0]]), self._ring.by_id).segments), stored[1]

    def _swap_pointer(self, key: str, data: bytes, expected: str | None) -> str:
        sealed = b"".join(seal(_pointer_name(key), Body.of(data), self._ring.first))
        return self.inner._swap_pointer(key, sealed, expected)


def _pointer_name(key: str) -> str:
    """A name that no object can have: a pointer's envelope does not open as an object's, nor the other way."""
    return f"pointer\0{key}"
