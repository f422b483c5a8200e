"""Does a store keep the promises that FedMentor rests on? Asked of the store itself, as ``fedmentor doctor`` shows.

Everything is tried below ``.fedmentor/doctor-...`` in the store's own place, and removed afterwards where the
credentials may delete; they need not.
"""

import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal
from urllib.parse import urlparse

from fedmentor_core.check import Check, Diagnosis
from fedmentor_core.config import StorageConfig
from fedmentor_core.errors import AlreadyExistsError, ConflictError, StorageError
from fedmentor_core.storage.base import RESERVED, open_store
from fedmentor_core.storage.local import LocalStore
from fedmentor_core.storage.retrying import Attempt
from fedmentor_core.storage.s3 import S3Store
from fedmentor_core.storage.s3_client import ConditionError, MissingError, RangeError, clock_skew_seconds

_CREATE = "Ledger entries and manifests are created once; else two writers overwrite each other and a charge is lost."
_SWAP = "The one mutable pointer must not lose an update."
_READ = "The next task reads at once what the last one wrote."
_LIST = "A run resumes from the first manifest that is missing in the list; a ledger is read by its list."
_RANGE = "Large objects are read in pieces, and only a failed piece again."
_PARTS = "Large objects are uploaded in parts, and must be created once too."
_CHECKSUM = "A server that compares digests refuses an upload spoilt on its way; else the next reader finds out."
_METADATA = "It carries each object's sha256, and tells our own write whose response was lost from another's."
_CLOCK = "A server refuses requests that are signed more than 15 minutes off."
_OTHER_SERVER = "Use a server that does, such as Amazon S3 or any other that passes here."
_RACERS = 8
_PART_BYTES = 5 * 2**20


class _Finding(Exception):  # noqa: N818 - a verdict, not an error
    """Ends a check with something else than a pass."""

    def __init__(self, status: Literal["warn", "fail"], found: str, remedy: str) -> None:
        super().__init__(found)
        self.status, self.found, self.remedy = status, found, remedy


def probe_store(url: str, settings: StorageConfig) -> Diagnosis:
    """Try out the store at ``url``.

    Args:
        url: ``file:///path`` or ``s3://bucket/prefix``.
        settings: how to reach it; encryption is left out.

    Raises:
        ConfigError: not the URL of a store.
    """
    store = open_store(url, settings.model_copy(update={"encryption_key_file": None}))
    if isinstance(store, LocalStore):
        return _LocalProbe(store).run()
    assert isinstance(store, S3Store)
    return _S3Probe(store).run()


class _LocalProbe:
    """A directory: what depends on its file system."""

    def __init__(self, store: LocalStore) -> None:
        self.url = store.url
        self.folder = store.root / RESERVED / f"doctor-{secrets.token_hex(4)}"
        self.store = LocalStore(self.folder)

    def run(self) -> Diagnosis:
        try:
            checks = (
                _check("conditional create", _CREATE, self._create),
                _check("one winner of a race", _CREATE, self._race),
                _check("read after write", _READ, self._read),
                _check("list after write", _LIST, self._list),
                _check("compare-and-swap", _SWAP, self._swap),
                _check("digest kept with the file", "It verifies JSON that is read by its key alone.", self._digest),
                _check("space", "Nothing is ever deleted by FedMentor.", self._space),
            )
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
        return Diagnosis(subject=self.url, checks=checks, left=(str(self.folder),) if self.folder.exists() else ())

    def _create(self) -> str:
        self.store.put_bytes("create", b"first")
        try:
            self.store.put_bytes("create", b"second")
        except AlreadyExistsError:
            return "the second writer was refused"
        raise _Finding("fail", "the second writer overwrote the first", "Use another file system, such as ext4.")

    def _race(self) -> str:
        def write(number: int) -> bool:
            try:
                self.store.put_bytes("race", str(number).encode())
            except AlreadyExistsError:
                return False
            return True

        return _one_winner(write)

    def _read(self) -> str:
        self.store.get(self.store.put("read", b"x" * 1000))
        return "what was written was read"

    def _list(self) -> str:
        for name in ("b", "a", "c"):
            self.store.put_bytes(f"list/{name}", b"")
        if list(self.store.list_keys("list")) != ["list/a", "list/b", "list/c"]:
            raise _Finding("fail", "a new object is not listed", "Use a local file system.")
        return "new objects are listed, in order"

    def _swap(self) -> str:
        first = self.store.swap_pointer("swap", b"1", None)
        self.store.swap_pointer("swap", b"2", first)
        try:
            self.store.swap_pointer("swap", b"3", first)
        except ConflictError:
            return "a stale writer was refused"
        raise _Finding("fail", "a stale writer overwrote the pointer", "Use a file system with working locks.")

    def _digest(self) -> str:
        self.store.put("digest", b"{}")
        if self.store._read("digest")[1] is None:
            raise _Finding("warn", "the file system keeps no extended attributes", "Only references are verified here.")
        return "kept"

    def _space(self) -> str:
        free = shutil.disk_usage(self.folder).free
        if free < 5e9:
            raise _Finding("warn", f"{free / 1e9:.1f} GB free", "Use a larger disk.")
        return f"{free / 1e9:.1f} GB free"


class _S3Probe:
    """A bucket: each request as the store makes it, with the answer looked at more closely."""

    def __init__(self, store: S3Store) -> None:
        self.url = store.url
        self.client = store.client
        self.headers = store.encryption_headers()
        self.below = f"{store.prefix}/" if store.prefix else ""
        self.place = f"{self.below}{RESERVED}/doctor-{secrets.token_hex(4)}/"

    def run(self) -> Diagnosis:
        checks = [_check("bucket", "Every read and write goes there.", self._reach)]
        if checks[0].status == "fail":
            return Diagnosis(subject=self.url, checks=tuple(checks))
        try:
            checks += [
                _check("transport", "Credentials and model updates travel on it.", self._transport),
                _check("clock", _CLOCK, self._clock),
                _check("conditional create", _CREATE, self._create),
                _check("one winner of a race", _CREATE, self._race),
                _check("read after write", _READ, self._read),
                _check("list after write", _LIST, self._list),
                _check("metadata", _METADATA, self._metadata),
                _check("compare-and-swap", _SWAP, self._swap),
                _check("ranged read", _RANGE, self._range),
                _check("multipart upload", _PARTS, self._parts),
                _check("upload checksum", _CHECKSUM, self._checksum),
                _check("unfinished uploads", "Their parts take space and are never listed.", self._unfinished),
            ]
        finally:
            left = tuple(self._clean_up())
        return Diagnosis(subject=self.url, checks=tuple(checks), left=left)

    def _reach(self) -> str:
        self.client.call("list", "list_objects_v2", Prefix=self.below, MaxKeys=1)
        return f"reached at {self.client.endpoint}"

    def _transport(self) -> str:
        parts = urlparse(str(self.client.boto.meta.endpoint_url))
        if parts.scheme == "https":
            return "TLS"
        if parts.hostname in ("localhost", "::1") or str(parts.hostname).startswith("127."):
            return "plain HTTP on this machine"
        raise _Finding("warn", "plain HTTP over a network", "Give the server a certificate and use https://.")

    def _clock(self) -> str:
        skew = clock_skew_seconds(self.client.call("list", "list_objects_v2", Prefix=self.place, MaxKeys=1))
        if skew is None:
            raise _Finding("warn", "the server sends no date", "Compare the clocks by hand.")
        if abs(skew) > 60:
            status: Literal["warn", "fail"] = "fail" if abs(skew) > 600 else "warn"
            raise _Finding(status, f"{skew:+.0f} s against the server's", "Set both clocks by NTP.")
        return "within a minute of the server's"

    def _put(self, name: str, data: bytes, **conditions: Any) -> Any:
        return self.client.call("write", "put_object", Key=self.place + name, Body=data, **self.headers, **conditions)

    def _get(self, name: str, **asked: Any) -> tuple[bytes, Any]:
        def whole(response: Any, attempt: Attempt) -> tuple[bytes, Any]:
            return response["Body"].read(), response

        return self.client.fetch("read", "get_object", whole, Key=self.place + name, **asked)

    def _create(self) -> str:
        self._put("create", b"first", IfNoneMatch="*")
        try:
            self._put("create", b"second", IfNoneMatch="*")
        except ConditionError:
            if self._get("create")[0] == b"first":
                return "the second writer was refused"
        raise _Finding("fail", "the server ignores If-None-Match", _OTHER_SERVER)

    def _race(self) -> str:
        def write(number: int) -> bool:
            try:
                self._put("race", str(number).encode(), IfNoneMatch="*")
            except ConditionError:
                return False
            return True

        return _one_winner(write)

    def _read(self) -> str:
        for number in range(5):
            data = secrets.token_bytes(1000)
            self._put(f"read-{number}", data)
            if self._get(f"read-{number}")[0] != data:
                raise _Finding("fail", "what was written was not read back", _OTHER_SERVER)
        return "what was written was read, five times"

    def _list(self) -> str:
        names = ["b", "a/x", "c", "a-b"]
        for name in names:
            self._put(f"list/{name}", b"")
        page = self.client.call("list", "list_objects_v2", Prefix=f"{self.place}list/")
        found = [item["Key"].removeprefix(f"{self.place}list/") for item in page.get("Contents", [])]
        if sorted(found) != sorted(names):
            raise _Finding("fail", "a new object is not listed", _OTHER_SERVER)
        return "new objects are listed"

    def _metadata(self) -> str:
        self._put("metadata", b"", Metadata={"fedmentor-sha256": "ab"})
        if self._get("metadata")[1].get("Metadata") != {"fedmentor-sha256": "ab"}:
            raise _Finding(
                "warn",
                "the server drops user metadata",
                "Works, but a lost response may charge a ledger twice, and JSON read by key alone is not verified.",
            )
        return "kept"

    def _swap(self) -> str:
        first = self._put("swap", b"1", IfNoneMatch="*")["ETag"]
        self._put("swap", b"2", IfMatch=first)
        for name in ("swap", "never-set"):
            try:
                self._put(name, b"3", IfMatch=first)
            except (ConditionError, MissingError):
                continue
            raise _Finding("fail", "the server ignores If-Match", _OTHER_SERVER)
        return "a stale writer was refused"

    def _range(self) -> str:
        data = secrets.token_bytes(1000)
        self._put("range", data)
        got, response = self._get("range", Range="bytes=100-199")
        if got != data[100:200] or not str(response.get("ContentRange", "")).endswith("/1000"):
            raise _Finding("fail", f"asked for 100 bytes of 1000, got {len(got)}", _OTHER_SERVER)
        try:
            self._get("range", Range="bytes=2000-2999")
        except RangeError:
            return "exact bytes"
        raise _Finding("fail", "a range past the end was answered", _OTHER_SERVER)

    def _parts(self) -> str:
        key = self.place + "parts"
        contents = (secrets.token_bytes(_PART_BYTES), b"end")
        for attempt in ("first", "second"):
            upload = self.client.call("upload", "create_multipart_upload", Key=key, **self.headers)["UploadId"]
            asked = {"Key": key, "UploadId": upload}
            try:
                parts = []
                for number, body in enumerate(contents, start=1):
                    sent = self.client.call("upload", "upload_part", PartNumber=number, Body=body, **asked)
                    parts.append({"PartNumber": number, "ETag": sent["ETag"]})
                self.client.call(
                    "upload", "complete_multipart_upload", MultipartUpload={"Parts": parts}, IfNoneMatch="*", **asked
                )
            except ConditionError:
                self.client.call("abort upload", "abort_multipart_upload", **asked)
                if attempt == "second" and self._get("parts")[0] == b"".join(contents):
                    return "assembled, and the second writer was refused"
        raise _Finding("fail", "the server ignores If-None-Match when it assembles parts", _OTHER_SERVER)

    def _checksum(self) -> str:
        try:
            self._put("checksum", b"sent", ChecksumSHA256="A" * 43 + "=")
        except StorageError:
            return "a wrong digest was refused"
        raise _Finding("warn", "the server accepts a wrong digest", "None needed: every read is verified here.")

    def _unfinished(self) -> str:
        try:
            page = self.client.call("list uploads", "list_multipart_uploads", Prefix=self.below)
        except StorageError:
            raise _Finding("warn", "these credentials may not list them", "Have a life cycle rule.") from None
        count = len(page.get("Uploads", []))
        if count:
            raise _Finding("warn", f"{count} found", "A life cycle rule that aborts uploads after 7 days removes them.")
        return "none"

    def _clean_up(self) -> Iterator[str]:
        """Delete what was written; yields what is still there."""
        try:
            page = self.client.call("list", "list_objects_v2", Prefix=self.place)
        except StorageError:
            yield self.place
            return
        for item in page.get("Contents", []):
            try:
                self.client.call("delete", "delete_object", Key=item["Key"])
            except (StorageError, MissingError):
                yield str(item["Key"])


def _one_winner(write: Callable[[int], bool]) -> str:
    with ThreadPoolExecutor(_RACERS) as pool:
        won = sum(pool.map(write, range(_RACERS)))
    if won != 1:
        raise _Finding("fail", f"{won} of {_RACERS} writers of one key were told that they made it", _OTHER_SERVER)
    return f"one of {_RACERS}"


def _check(name: str, why: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name=name, status="pass", found=look(), why=why)
    except _Finding as finding:
        return Check(name=name, status=finding.status, found=finding.found, why=why, remedy=finding.remedy)
    except (ConditionError, MissingError, RangeError) as error:
        found = f"unexpected: {type(error).__name__}"
        return Check(name=name, status="fail", found=found, why=why, remedy=_OTHER_SERVER)
    except StorageError as error:
        return Check(name=name, status="fail", found=str(error), why=why, remedy="As the message says.")
