"""An S3-compatible bucket as an artifact store, by conditional create (``If-None-Match: *``).

Every object carries two things in its metadata: the sha256 it was written with, and a token drawn for that one write.
When a response was lost and the retry finds the key taken, the token tells our own write from another writer's equal
bytes. Before its first write a store makes sure, once, that the server honours the condition at all.
"""

import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import urlparse

from fedmentor_core.config import StorageConfig
from fedmentor_core.errors import ConfigError, ConflictError, IntegrityError, StorageError
from fedmentor_core.hashing import sha256_bytes
from fedmentor_core.storage.base import RESERVED, ArtifactStore, ObjectStat, check_key
from fedmentor_core.storage.body import PIECE_BYTES, Body
from fedmentor_core.storage.retrying import Attempt
from fedmentor_core.storage.s3_client import ConditionError, MissingError, RangeError, S3Client

_SHA256, _WRITER = "fedmentor-sha256", "fedmentor-writer"
_MOST_PARTS = 10_000
_THREADS = 4


class S3Store(ArtifactStore):
    """Objects below ``s3://bucket/prefix``. Credentials come from the usual AWS variables, never from a config."""

    reads_at_once = 8  # of the client's 16 connections

    def __init__(self, client: S3Client, prefix: str, settings: StorageConfig) -> None:
        """Use ``client`` for objects below ``prefix``. Nothing is sent yet."""
        self.client = client
        self.prefix = prefix.strip("/")
        self.url = f"s3://{client.bucket}" + (f"/{self.prefix}" if self.prefix else "")
        self._root = f"{self.prefix}/" if self.prefix else ""
        self._settings = settings
        self._lock = threading.Lock()
        self._conditions_hold = False
        self._bucket_seen = False

    @classmethod
    def from_url(cls, url: str, settings: StorageConfig) -> "S3Store":
        """Open ``s3://bucket/prefix``."""
        parts = urlparse(url)
        if not parts.netloc:
            raise ConfigError(f"store URL {url!r} names no bucket; example: s3://bucket/prefix")
        return cls(S3Client.connect(parts.netloc, settings), parts.path, settings)

    # --- objects -------------------------------------------------------------------------------------------------

    def _create(self, key: str, body: Body) -> None:
        self._check_conditions()
        token = secrets.token_hex(16)
        headers = {"Metadata": {_SHA256: body.sha256, _WRITER: token}, **self.encryption_headers()}
        try:
            if body.n_bytes > self._settings.multipart_threshold_bytes:
                self._create_in_parts(key, body, headers)
            else:
                self.client.call(
                    f"write {key}", "put_object", Key=self._root + key, Body=body.whole(), IfNoneMatch="*", **headers
                )
        except ConditionError as error:
            if not (error.unclear and self._writer(key) == token):
                raise self._taken(key) from None
        except MissingError:
            raise StorageError(f"cannot write {key} in {self.url}: another aborted its upload. Try again.") from None

    def _read(self, key: str) -> tuple[bytes, str | None]:
        for last_try in (False, True):
            try:
                data, response = self.client.fetch(f"read {key}", "get_object", _whole_body, Key=self._root + key)
            except MissingError:
                raise self._not_found(key) from None
            recorded = response.get("Metadata", {}).get(_SHA256)
            digest = None if recorded is None else sha256_bytes(data)
            if digest == recorded:
                return data, recorded
            if last_try:
                break
        raise IntegrityError(
            f"{key} in {self.url}: expected sha256 {recorded}, got {digest} ({len(data)} bytes), twice. The object was "
            "changed or truncated; restore it from a copy."
        )

    def _pieces(self, key: str, n_bytes: int) -> Iterator[bytes]:
        condition: dict[str, str] = {}
        for start in range(0, max(n_bytes, 1), PIECE_BYTES):
            end = min(start + PIECE_BYTES, n_bytes)
            asked: dict[str, str] = {"Range": f"bytes={start}-{end - 1}"} if n_bytes else {}
            try:
                data, response = self.client.fetch(
                    f"read {key}", "get_object", _whole_body, Key=self._root + key, **asked, **condition
                )
            except MissingError:
                raise self._not_found(key) from None
            except (ConditionError, RangeError):
                raise IntegrityError(
                    f"{key} in {self.url}: it changed while it was read, or has fewer than the expected {n_bytes} "
                    "bytes. Restore it from a copy."
                ) from None
            total = str(response.get("ContentRange", f"/{len(data)}")).rpartition("/")[2]
            if total != str(n_bytes) or len(data) != end - start:
                raise IntegrityError(
                    f"{key} in {self.url}: expected {n_bytes} bytes, got {total} (from byte {start}: {len(data)}). The "
                    "object was changed or truncated, or the server ignores ranges: 'fedmentor doctor' tells."
                )
            condition = {"IfMatch": response["ETag"]}
            if data:
                yield data

    def stat(self, key: str) -> ObjectStat | None:
        """See ``ArtifactStore``."""
        try:
            response = self.client.call(f"look up {key}", "head_object", Key=self._root + check_key(key))
        except MissingError:
            self._check_bucket()  # a HEAD cannot say which of the two is missing
            return None
        return ObjectStat(response["ContentLength"], response.get("Metadata", {}).get(_SHA256))

    def list_keys(self, prefix: str) -> Iterator[str]:
        """See ``ArtifactStore``."""
        yield from (key for key, _ in self.list_versions(prefix))

    def list_versions(self, prefix: str) -> Iterator[tuple[str, str]]:
        """See ``ArtifactStore``. A version is the server's own entity tag, and when it says it was written."""
        full = f"{self._root}{check_key(prefix)}/" if prefix else self._root
        asked: dict[str, str] = {}
        found: list[tuple[str, str]] = []
        while True:
            page = self.client.call(f"list {prefix or 'all'}", "list_objects_v2", Prefix=full, **asked)
            found += [
                (item["Key"].removeprefix(self._root), f"{item['ETag']} {item['LastModified'].isoformat()}")
                for item in page.get("Contents", [])
            ]
            if not page.get("IsTruncated"):
                break
            asked = {"ContinuationToken": page["NextContinuationToken"]}
        yield from sorted(one for one in found if not one[0].startswith(f"{RESERVED}/"))

    # --- pointers ------------------------------------------------------------------------------------------------

    def _read_pointer(self, key: str) -> tuple[bytes, str] | None:
        place = self._pointer(key)
        try:
            data, response = self.client.fetch(f"read pointer {key}", "get_object", _whole_body, Key=place)
        except MissingError:
            return None
        return data, response["ETag"]

    def _swap_pointer(self, key: str, data: bytes, expected: str | None) -> str:
        self._check_conditions()
        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
        what = f"move pointer {key}"
        try:
            response = self.client.call(
                what, "put_object", Key=self._pointer(key), Body=data, **condition, **self.encryption_headers()
            )
        except (ConditionError, MissingError) as error:
            if isinstance(error, ConditionError) and error.unclear:
                found = self._read_pointer(key)
                if found is not None and found[0] == data:  # pointers' bytes hold a token: these are ours
                    return found[1]
            raise ConflictError(f"pointer {key} in {self.url} was moved by another writer; read it again.") from None
        return str(response["ETag"])

    # --- parts -----------------------------------------------------------------------------------------------------

    def _create_in_parts(self, key: str, body: Body, headers: dict[str, Any]) -> None:
        if self.stat(key) is not None:
            raise ConditionError(unclear=False)  # before gigabytes are sent in vain
        what, place = f"write {key}", self._root + key
        upload = self.client.call(what, "create_multipart_upload", Key=place, **headers)["UploadId"]
        try:
            size = max(self._settings.multipart_part_bytes, -(-body.n_bytes // _MOST_PARTS))

            def send(index: int) -> dict[str, Any]:
                response = self.client.call(
                    what,
                    "upload_part",
                    Key=place,
                    UploadId=upload,
                    PartNumber=index + 1,
                    Body=body.part(index * size, size),
                )
                return {"PartNumber": index + 1, "ETag": response["ETag"]}

            pool = ThreadPoolExecutor(_THREADS)
            try:
                parts = list(pool.map(send, range(-(-body.n_bytes // size))))
            finally:
                pool.shutdown(cancel_futures=True)
            try:
                self.client.call(
                    what,
                    "complete_multipart_upload",
                    Key=place,
                    UploadId=upload,
                    MultipartUpload={"Parts": parts},
                    IfNoneMatch="*",
                )
            except MissingError:  # the upload is gone: an earlier attempt completed it, or somebody aborted it
                raise ConditionError(unclear=True) from None
        except BaseException:
            self._abort(place, upload)
            raise

    def _abort(self, place: str, upload: str) -> None:
        """Give the parts' space back (of a completed upload: nothing). The bucket's life cycle rule does the rest."""
        with suppress(StorageError, MissingError, ConditionError):
            self.client.call("abort upload", "abort_multipart_upload", Key=place, UploadId=upload)

    # --- helpers -------------------------------------------------------------------------------------------------

    def _writer(self, key: str) -> str | None:
        try:
            response = self.client.call(f"look up {key}", "head_object", Key=self._root + key)
        except MissingError:
            return None
        token = response.get("Metadata", {}).get(_WRITER)
        return None if token is None else str(token)

    def _check_conditions(self) -> None:
        """Make sure, once per store and process, that the server refuses to create what exists."""
        with self._lock:
            if self._conditions_hold:
                return
            probe = f"{self._root}{RESERVED}/probe"
            for _ in range(2):  # the first creates the probe, unless an earlier process did
                try:
                    self.client.call(
                        "write a probe", "put_object", Key=probe, Body=b"", IfNoneMatch="*", **self.encryption_headers()
                    )
                except ConditionError:
                    self._conditions_hold = True
                    return
            raise StorageError(
                f"the server at {self.client.endpoint} ignores If-None-Match: two writers would overwrite each other, "
                "and a privacy ledger could forget a charge. Nothing was written but a probe. Use a server that passes "
                "'fedmentor doctor --store URL'."
            )

    def _check_bucket(self) -> None:
        if self._bucket_seen:
            return
        try:
            self.client.call("find", "list_objects_v2", Prefix=f"{self._root}{RESERVED}/", MaxKeys=1)
        except MissingError:
            raise StorageError(f"bucket {self.client.bucket} does not exist at {self.client.endpoint}.") from None
        self._bucket_seen = True

    def encryption_headers(self) -> dict[str, str]:
        """What asks the server to encrypt; on every write, for a bucket's policy may demand it."""
        asked = {
            "ServerSideEncryption": self._settings.server_side_encryption,
            "SSEKMSKeyId": self._settings.kms_key_id,
        }
        return {name: value for name, value in asked.items() if value is not None}

    def _pointer(self, key: str) -> str:
        return f"{self._root}{RESERVED}/pointers/{key}"


def _whole_body(response: Any, attempt: Attempt) -> tuple[bytes, Any]:
    pieces = []
    while piece := response["Body"].read(2**20):
        pieces.append(piece)
        attempt.check()
    return b"".join(pieces), response
