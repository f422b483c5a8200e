"""The artifact store: one interface, named by URL; objects are immutable and verified on every read."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from fedmentor_core.errors import AlreadyExistsError, IntegrityError, StorageError
from fedmentor_core.hashing import canonical_json, sha256_bytes
from fedmentor_core.records import ArtifactRef


def check_key(key: str) -> str:
    """The key itself, when it is a relative path without empty or dotted parts.

    Raises:
        StorageError: it is not.
    """
    if any(part in ("", ".", "..") for part in key.split("/")) or "\0" in key:
        raise StorageError(f"invalid key {key!r}: a key is a relative path without empty or dotted parts.")
    return key


class ArtifactStore(ABC):
    """Create-if-absent, verified reads, listing by prefix. Keys are ``/``-separated relative paths."""

    url: str

    @abstractmethod
    def put_bytes(self, key: str, data: bytes) -> None:
        """Create ``key``; visible whole or not at all.

        Raises:
            AlreadyExistsError: the key is taken (whatever it holds).
        """

    @abstractmethod
    def get_bytes(self, key: str) -> bytes:
        """Read ``key`` whole.

        Raises:
            NotFoundError: there is no such key.
        """

    @abstractmethod
    def exists(self, key: str) -> bool:
        """True when ``key`` was created."""

    @abstractmethod
    def list_keys(self, prefix: str) -> Iterator[str]:
        """All keys below ``prefix``, sorted."""

    def put(self, key: str, data: bytes) -> ArtifactRef:
        """Create ``key`` or accept that it already holds exactly these bytes (a retry of our own write).

        Raises:
            AlreadyExistsError: the key holds other bytes.
        """
        ref = ArtifactRef(key=key, sha256=sha256_bytes(data), n_bytes=len(data))
        try:
            self.put_bytes(key, data)
        except AlreadyExistsError:
            if sha256_bytes(self.get_bytes(key)) != ref.sha256:
                raise
        return ref

    def get(self, ref: ArtifactRef) -> bytes:
        """Read and verify.

        Raises:
            IntegrityError: the bytes are not those that were stored.
        """
        data = self.get_bytes(ref.key)
        digest = sha256_bytes(data)
        if digest != ref.sha256:
            raise IntegrityError(
                f"{ref.key} in {self.url}: expected sha256 {ref.sha256}, got {digest} ({len(data)} bytes). "
                "The object was changed or truncated; restore it from a copy."
            )
        return data

    def put_json(self, key: str, value: BaseModel | dict[str, Any]) -> ArtifactRef:
        """Store a record in canonical JSON, create-if-absent."""
        plain = value.model_dump(mode="json", by_alias=True) if isinstance(value, BaseModel) else value
        return self.put(key, canonical_json(plain))

    def get_json(self, key: str) -> Any:
        """Read JSON. For records whose digest is known use ``get``."""
        data = self.get_bytes(key)
        try:
            return json.loads(data)
        except ValueError:
            raise IntegrityError(f"{key} in {self.url} is not JSON ({len(data)} bytes): torn or tampered.") from None


def open_store(
    url: str, *, endpoint_url: str | None = None, region: str = "us-east-1", addressing_style: str = "path"
) -> ArtifactStore:
    """Open ``file:///path`` or ``s3://bucket/prefix``.

    Raises:
        ConfigError: another kind of URL.
    """
    if url.startswith("file:///"):
        from fedmentor_core.storage.local import LocalStore

        return LocalStore.from_url(url)
    if url.startswith("s3://"):
        from fedmentor_core.storage.s3 import S3Store

        return S3Store.from_url(url, endpoint_url=endpoint_url, region=region, addressing_style=addressing_style)
    from fedmentor_core.errors import ConfigError

    raise ConfigError(f"store URL {url!r} must begin with file:/// or s3://; example: file:///srv/fedmentor")
