"""A directory as an artifact store: hard-link into place, so an object appears whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse

from fedmentor_core.errors import AlreadyExistsError, NotFoundError, StorageError
from fedmentor_core.storage.base import ArtifactStore, check_key


class LocalStore(ArtifactStore):
    """Objects are files below ``root``; temporary files are hidden and never listed."""

    def __init__(self, root: Path) -> None:
        """Open ``root``; it is created by the first write."""
        self.root = root.resolve()
        self.url = self.root.as_uri()

    @classmethod
    def from_url(cls, url: str) -> "LocalStore":
        """Open a ``file:///`` URL."""
        return cls(Path(unquote(urlparse(url).path)))

    def put_bytes(self, key: str, data: bytes) -> None:
        """See ``ArtifactStore``."""
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        except OSError as error:
            raise StorageError(f"cannot write {key} in {self.url}: {error.strerror}.") from error
        try:
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            os.link(temporary, path)  # fails if the key is taken: create-if-absent, atomically
        except FileExistsError:
            raise AlreadyExistsError(f"{key} already exists in {self.url}; objects are immutable.") from None
        except OSError as error:
            raise StorageError(f"cannot write {key} in {self.url}: {error.strerror}.") from error
        finally:
            Path(temporary).unlink(missing_ok=True)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def get_bytes(self, key: str) -> bytes:
        """See ``ArtifactStore``."""
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError:
            raise NotFoundError(f"no object {key} in {self.url}.") from None
        except OSError as error:
            raise StorageError(f"cannot read {key} in {self.url}: {error.strerror}.") from error

    def exists(self, key: str) -> bool:
        """See ``ArtifactStore``."""
        return self._path(key).is_file()

    def list_keys(self, prefix: str) -> Iterator[str]:
        """See ``ArtifactStore``."""
        base = self._path(prefix) if prefix else self.root
        if not base.is_dir():
            return
        files = (path for path in base.rglob("*") if not path.name.startswith(".tmp-") and path.is_file())
        yield from sorted(path.relative_to(self.root).as_posix() for path in files)

    def _path(self, key: str) -> Path:
        return self.root.joinpath(*check_key(key).split("/"))
