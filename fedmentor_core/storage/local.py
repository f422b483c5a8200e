"""A directory as an artifact store: hard-link into place, so an object appears whole or not at all.

A writer fills a temporary file in ``.fedmentor/tmp``, has it written to the disk, and links it to its name, which
fails when the name is taken: of concurrent creators exactly one wins, and a crash leaves at most a file that is never
listed. The folder is then written to the disk too, so that a name that was seen survives a power cut.
"""

import errno
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from urllib.parse import unquote, urlparse

from fedmentor_core.errors import ConflictError, IntegrityError, StorageError
from fedmentor_core.hashing import sha256_bytes
from fedmentor_core.storage.base import RESERVED, ArtifactStore, ObjectStat, check_key
from fedmentor_core.storage.body import Body, pieces_of

_DIGEST = "user.fedmentor.sha256"  # extended attribute; absent where the file system keeps none
_ABANDONED_SECONDS = 24 * 3600


class LocalStore(ArtifactStore):
    """Objects are files below ``root``, under their own names: readable with any tool."""

    def __init__(self, root: Path) -> None:
        """Open ``root``; it is created by the first write."""
        self.root = root.resolve()
        self.url = self.root.as_uri()
        self._own = self.root / RESERVED
        self._swept = False

    @classmethod
    def from_url(cls, url: str) -> "LocalStore":
        """Open a ``file:///`` URL."""
        return cls(Path(unquote(urlparse(url).path)))

    def _create(self, key: str, body: Body) -> None:
        path = self._path(key)
        if path.is_file():  # cheap, and only to spare the work: the link decides
            raise self._taken(key)
        with self._told("write", key), self._temporary(body) as temporary:
            _make_folder(path.parent)
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise self._taken(key) from None
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                    raise StorageError(
                        f"cannot write {key} in {self.url}: this file system has no hard links, which create-if-absent "
                        "rests on. Put the store on another one, such as ext4, xfs or apfs."
                    ) from error
                raise
            _sync_folder(path.parent)

    def _read(self, key: str) -> tuple[bytes, str | None]:
        with self._told("read", key):
            try:
                with self._path(key).open("rb") as handle:
                    return handle.read(), _recorded_digest(handle.fileno())
            except FileNotFoundError:
                raise self._not_found(key) from None

    def _pieces(self, key: str, n_bytes: int) -> Iterator[bytes]:
        with self._told("read", key):
            try:
                handle = self._path(key).open("rb")
            except FileNotFoundError:
                raise self._not_found(key) from None
            with handle:
                found = os.fstat(handle.fileno()).st_size
                if found != n_bytes:
                    raise IntegrityError(
                        f"{key} in {self.url}: expected {n_bytes} bytes, got {found}. The object was changed or "
                        "truncated; restore it from a copy."
                    )
                yield from pieces_of(handle)

    def stat(self, key: str) -> ObjectStat | None:
        """See ``ArtifactStore``. No digest is given: reading a file is cheap, and surer than what was noted."""
        with self._told("look up", check_key(key)):
            try:
                found = self._path(key).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return ObjectStat(found.st_size, None) if S_ISREG(found.st_mode) else None

    def list_keys(self, prefix: str) -> Iterator[str]:
        """See ``ArtifactStore``. A folder that cannot be read is an error: nothing is left out silently."""

        def refuse(error: OSError) -> None:
            raise error

        base = self._path(check_key(prefix)) if prefix else self.root
        found: list[str] = []
        with self._told("list", prefix or "all"):
            if not base.is_dir():
                return
            for folder, folders, names in os.walk(base, onerror=refuse):
                if folder == str(self.root) and RESERVED in folders:
                    folders.remove(RESERVED)
                below = Path(folder).relative_to(self.root).as_posix()
                found += [name if below == "." else f"{below}/{name}" for name in names]
        yield from sorted(found)

    def list_versions(self, prefix: str) -> Iterator[tuple[str, str]]:
        """See ``ArtifactStore``. A version is inode, size and times; the last of them no program can set."""
        for key in self.list_keys(prefix):
            with self._told("look up", key):
                try:
                    found = os.stat(f"{self.root}/{key}")
                except FileNotFoundError:
                    version = ""  # whoever reads it will be told
                else:
                    version = f"{found.st_ino}-{found.st_size}-{found.st_mtime_ns}-{found.st_ctime_ns}"
            yield key, version

    def _read_pointer(self, key: str) -> tuple[bytes, str] | None:
        with self._told("read pointer", key):
            try:
                data = self._pointer(key).read_bytes()
            except FileNotFoundError:
                return None
            return data, sha256_bytes(data)

    def _swap_pointer(self, key: str, data: bytes, expected: str | None) -> str:
        path = self._pointer(key)
        with self._told("move pointer", key), self._temporary(Body.of(data)) as temporary, self._locked(key):
            found = self._read_pointer(key)
            if (found and found[1]) != expected:
                raise ConflictError(f"pointer {key} in {self.url} was moved by another writer; read it again.")
            _make_folder(path.parent)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        return sha256_bytes(data)

    @contextmanager
    def _temporary(self, body: Body) -> Iterator[str]:
        """A file with the body's bytes, verified and on the disk; gone afterwards unless it was moved."""
        folder = self._own / "tmp"
        _make_folder(folder)
        self._sweep(folder)
        descriptor, temporary = tempfile.mkstemp(dir=folder)
        try:
            with os.fdopen(descriptor, "wb") as handle:
                digest = hashlib.sha256()
                with body.open() as source:
                    for piece in pieces_of(source):
                        digest.update(piece)
                        handle.write(piece)
                if digest.hexdigest() != body.sha256:
                    raise StorageError(f"{body.source!s} changed while it was stored; nothing was stored. Try again.")
                handle.flush()
                _record_digest(handle.fileno(), body.sha256)
                os.fsync(handle.fileno())
            yield temporary
        finally:
            Path(temporary).unlink(missing_ok=True)

    def _sweep(self, folder: Path) -> None:
        """Remove what writers that died a day ago and more left behind."""
        if self._swept:
            return
        self._swept = True
        for path in folder.iterdir():
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """One writer of a pointer at a time; the system gives the lock back when its holder dies."""
        import fcntl

        path = self._own / "locks" / key
        _make_folder(path.parent)
        with path.open("wb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _told(self, what: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"cannot {what} {key} in {self.url}: {error.strerror}. Check the folder, its permissions and the space "
                "left."
            ) from error

    def _pointer(self, key: str) -> Path:
        return self._own.joinpath("pointers", *key.split("/"))

    def _path(self, key: str) -> Path:
        return self.root.joinpath(*key.split("/"))


def _make_folder(folder: Path) -> None:
    """Create ``folder`` and what is missing above it, and have each new name written to the disk."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _record_digest(descriptor: int, digest: str) -> None:
    if hasattr(os, "setxattr"):
        with suppress(OSError):
            os.setxattr(descriptor, _DIGEST, digest.encode())


def _recorded_digest(descriptor: int) -> str | None:
    if not hasattr(os, "getxattr"):
        return None
    try:
        return os.getxattr(descriptor, _DIGEST).decode()
    except OSError:
        return None
