"""The artifact store: one interface, named by URL; objects are immutable and verified on every read."""

import hashlib
import json
import os
import secrets
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fedmentor_core.config import StorageConfig
from fedmentor_core.errors import AlreadyExistsError, ConfigError, IntegrityError, NotFoundError, StorageError
from fedmentor_core.hashing import canonical_json, sha256_bytes
from fedmentor_core.records import ArtifactRef
from fedmentor_core.storage.body import Body

RESERVED = ".fedmentor"
"""First part of every key that a store keeps for itself: pointers, temporary files, a probe. Never listed."""


def check_key(key: str) -> str:
    """The key itself, when it is a relative path without empty or dotted parts.

    Raises:
        StorageError: it is not.
    """
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in key:
        raise StorageError(f"invalid key {key!r}: a key is a relative path without empty or dotted parts.")
    if parts[0] == RESERVED:
        raise StorageError(f"invalid key {key!r}: {RESERVED}/ is the store's own. Choose another first part.")
    return key


@dataclass(frozen=True)
class ObjectStat:
    """An object's size in bytes and, where the store recorded it, the sha256 it was written with."""

    n_bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Pointer:
    """What a mutable pointer held when it was read. ``version`` is different after every move, even back."""

    value: bytes
    version: str


class ArtifactStore(ABC):
    """Create-if-absent, verified reads, listing by prefix, and pointers that move by compare-and-swap.

    Keys are ``/``-separated relative paths. No key may be another key's folder. An object appears whole or not at
    all, and never changes afterwards. All methods are safe to call from several threads.
    """

    url: str
    reads_at_once: int = 1
    """How many small objects are read side by side: one where a read waits for nothing."""

    # --- what a backend provides ---------------------------------------------------------------------------------

    @abstractmethod
    def _create(self, key: str, body: Body) -> None:
        """Create ``key``, or raise AlreadyExistsError when anyone else's object is there, even an equal one."""

    @abstractmethod
    def _read(self, key: str) -> tuple[bytes, str | None]:
        """The whole object and the sha256 recorded with it. Raises NotFoundError."""

    @abstractmethod
    def _pieces(self, key: str, n_bytes: int) -> Iterator[bytes]:
        """The object in order, in pieces; raises IntegrityError where its size is seen not to be ``n_bytes``."""

    @abstractmethod
    def stat(self, key: str) -> ObjectStat | None:
        """Size and recorded digest of ``key``, or None when there is no such object. Reads no content."""

    @abstractmethod
    def list_keys(self, prefix: str) -> Iterator[str]:
        """All keys below ``prefix``, sorted."""

    def list_versions(self, prefix: str) -> Iterator[tuple[str, str]]:
        """``list_keys``, each key with its version: a text that is another one once anybody has replaced the object.

        Two listings with the same version of a key vouch for its bytes as far as the backend itself can be trusted.
        Empty: not known, such as where a backend keeps none.
        """
        for key in self.list_keys(prefix):
            yield key, ""

    @abstractmethod
    def _read_pointer(self, key: str) -> tuple[bytes, str] | None:
        """A pointer's stored bytes and the backend's version of them."""

    @abstractmethod
    def _swap_pointer(self, key: str, data: bytes, expected: str | None) -> str:
        """Replace the stored bytes of version ``expected`` (None: absent), or raise ConflictError."""

    # --- writing ---------------------------------------------------------------------------------------------------

    def put_bytes(self, key: str, data: bytes) -> None:
        """Create ``key``; visible whole or not at all.

        A write whose response was lost is recognised as our own and succeeds; another writer's object never does,
        be its bytes the same. After any other StorageError the object may or may not be there.

        Raises:
            AlreadyExistsError: the key is taken (whatever it holds).
        """
        self._create(check_key(key), Body.of(data))

    def put(self, key: str, data: bytes) -> ArtifactRef:
        """Create ``key`` or accept that it already holds exactly these bytes (a retry of our own write).

        Raises:
            AlreadyExistsError: the key holds other bytes.
        """
        return self._put(key, Body.of(data))

    def put_file(self, key: str, path: Path) -> ArtifactRef:
        """``put`` of a file's content, which is streamed: memory use does not grow with the file.

        Raises:
            AlreadyExistsError: the key holds other bytes.
        """
        return self._put(key, Body.of(path))

    def put_json(self, key: str, value: BaseModel | dict[str, Any]) -> ArtifactRef:
        """Store a record in canonical JSON, create-if-absent."""
        plain = value.model_dump(mode="json", by_alias=True) if isinstance(value, BaseModel) else value
        return self.put(key, canonical_json(plain))

    def _put(self, key: str, body: Body) -> ArtifactRef:
        try:
            self._create(check_key(key), body)
        except AlreadyExistsError:
            if not self._holds(key, body):
                raise
        return ArtifactRef(key=key, sha256=body.sha256, n_bytes=body.n_bytes)

    def _holds(self, key: str, body: Body) -> bool:
        stat = self.stat(key)
        if stat is None or stat.n_bytes != body.n_bytes:
            return False
        if stat.sha256 is not None:
            return stat.sha256 == body.sha256
        digest = hashlib.sha256()
        for piece in self._pieces(key, body.n_bytes):
            digest.update(piece)
        return digest.hexdigest() == body.sha256

    # --- reading ---------------------------------------------------------------------------------------------------

    def exists(self, key: str) -> bool:
        """True when ``key`` was created."""
        return self.stat(key) is not None

    def get_bytes(self, key: str) -> bytes:
        """Read ``key`` whole, for a reader with a check of its own, such as a ledger's hash chain.

        Raises:
            NotFoundError: there is no such key.
            IntegrityError: the bytes were changed on their way (a store over a network).
        """
        return self._read(check_key(key))[0]

    def get_each(self, keys: Sequence[str]) -> Generator[bytes, None, None]:
        """``get_bytes`` of each key, in order, read ahead by ``reads_at_once`` threads; for small objects.

        Raises:
            NotFoundError, IntegrityError: as ``get_bytes``, when it is that key's turn.
        """
        n_threads = min(self.reads_at_once, len(keys))
        if n_threads < 2:
            yield from map(self.get_bytes, keys)
            return
        with ThreadPoolExecutor(n_threads) as pool:
            coming = [pool.submit(self.get_bytes, key) for key in keys]
            try:
                for one in coming:
                    yield one.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def get(self, ref: ArtifactRef) -> bytes:
        """Read and verify. Bytes that were spoilt on their way are read a second time.

        Raises:
            NotFoundError: there is no such key.
            IntegrityError: the bytes are not those that were stored.
        """
        for last_try in (False, True):
            data = self._read(check_key(ref.key))[0]
            digest = sha256_bytes(data)
            if digest == ref.sha256:
                return data
            if last_try:
                break
        raise self._spoilt(ref, digest, len(data))

    def get_json(self, key: str) -> Any:
        """Read JSON, verified against the digest recorded with the object. For a known digest use ``get``.

        Raises:
            NotFoundError: there is no such key.
            IntegrityError: the bytes are not those that were stored, or not JSON.
        """
        data, recorded = self._read(check_key(key))
        try:
            value = json.loads(data)
        except ValueError:
            raise IntegrityError(f"{key} in {self.url} is not JSON ({len(data)} bytes): torn or tampered.") from None
        if recorded is not None and sha256_bytes(data) != recorded:
            raise self._spoilt(ArtifactRef(key=key, sha256=recorded, n_bytes=len(data)), sha256_bytes(data), len(data))
        return value

    def stream(self, ref: ArtifactRef) -> Iterator[bytes]:
        """Read a large object in pieces of a few MiB; memory use does not grow with the object.

        The last piece is handed out only after the whole was verified: a reader that comes to the end has read what
        was stored. Until then it must not act on what it has.

        Raises:
            NotFoundError: there is no such key.
            IntegrityError: the bytes are not those that were stored.
        """
        digest, n_bytes, held = hashlib.sha256(), 0, b""
        for piece in self._pieces(check_key(ref.key), ref.n_bytes):
            digest.update(piece)
            n_bytes += len(piece)
            if held:
                yield held
            held = piece
        if digest.hexdigest() != ref.sha256:
            raise self._spoilt(ref, digest.hexdigest(), n_bytes)
        if held:
            yield held

    def get_to_file(self, ref: ArtifactRef, path: Path) -> None:
        """Read a large object into ``path``, which appears (or is replaced) whole and verified, or not at all.

        Raises:
            NotFoundError: there is no such key.
            IntegrityError: the bytes are not those that were stored, even on a second reading.
            StorageError: the file cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
            try:
                with os.fdopen(descriptor, "wb") as handle:
                    try:
                        handle.writelines(self.stream(ref))
                    except IntegrityError:  # perhaps only on the way: once more
                        handle.seek(0)
                        handle.truncate()
                        handle.writelines(self.stream(ref))
                    handle.flush()
                    os.fsync(handle.fileno())
                os.replace(temporary, path)
            finally:
                Path(temporary).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}. Check space and permissions.") from error

    def _spoilt(self, ref: ArtifactRef, digest: str, n_bytes: int) -> IntegrityError:
        return IntegrityError(
            f"{ref.key} in {self.url}: expected sha256 {ref.sha256} ({ref.n_bytes} bytes), got {digest} ({n_bytes} "
            "bytes). The object was changed or truncated; restore it from a copy."
        )

    # --- pointers ------------------------------------------------------------------------------------------------

    def read_pointer(self, key: str) -> Pointer | None:
        """What the pointer ``key`` holds now, or None when it was never set.

        Raises:
            IntegrityError: its bytes are not those that were stored.
        """
        stored = self._read_pointer(check_key(key))
        if stored is None:
            return None
        data, version = stored
        head, _, value = data.partition(b"\n")
        if head[32:] != sha256_bytes(value).encode():
            raise IntegrityError(f"pointer {key} in {self.url} is torn or tampered; set it anew from a copy.")
        return Pointer(value, version)

    def swap_pointer(self, key: str, value: bytes, expected: Pointer | None) -> Pointer:
        """Move the pointer ``key`` from ``expected`` (None: never set) to ``value``, atomically.

        Pointers are the one thing that changes in a store; they are not objects and not listed.

        Raises:
            ConflictError: another writer moved it; read it and decide again. When a response was lost and another
                writer moved it on before we could ask, our value may have been there for a moment.
        """
        # A fresh token makes every write different: equal values never look like the same version.
        data = secrets.token_hex(16).encode() + sha256_bytes(value).encode() + b"\n" + value
        return Pointer(value, self._swap_pointer(check_key(key), data, expected.version if expected else None))

    def _not_found(self, key: str) -> NotFoundError:
        return NotFoundError(f"no object {key} in {self.url}.")

    def _taken(self, key: str) -> AlreadyExistsError:
        return AlreadyExistsError(f"{key} already exists in {self.url}; objects are immutable.")


def open_store(url: str, settings: StorageConfig | None = None) -> ArtifactStore:
    """Open ``file:///path`` or ``s3://bucket/prefix``, encrypted where ``settings`` name a key file.

    Args:
        url: the store's place; ``settings.url`` is not looked at.
        settings: endpoint, retries, encryption; None: the defaults.

    Raises:
        ConfigError: another kind of URL, or a key file that cannot be used.
    """
    settings = settings or StorageConfig()
    store = _open(url, settings)
    if settings.encryption_key_file is None:
        return store
    from fedmentor_core.storage.encrypted import EncryptedStore, KeyRing

    return EncryptedStore(store, KeyRing.from_file(Path(settings.encryption_key_file)))


def _open(url: str, settings: StorageConfig) -> ArtifactStore:
    if url.startswith("file:///"):
        from fedmentor_core.storage.local import LocalStore

        return LocalStore.from_url(url)
    if url.startswith("s3://"):
        from fedmentor_core.storage.s3 import S3Store

        return S3Store.from_url(url, settings)
    raise ConfigError(f"store URL {url!r} must begin with file:/// or s3://; example: file:///srv/fedmentor")
