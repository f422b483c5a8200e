"""The one door to boto3: requests that are tried again, and failures in our own words.

botocore's own retries are switched off, so that there is one policy and one deadline (``retrying.py``). A server's
error text is never repeated, for it can hold an access key; its error code is.
"""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlparse

from fedmentor_core.config import StorageConfig
from fedmentor_core.errors import StorageError
from fedmentor_core.storage.retrying import Attempt, GaveUpError, Patience, TransientError

T = TypeVar("T")

_MISSING = {"NoSuchKey", "NotFound", "404", "NoSuchUpload"}
_CONDITION = {"PreconditionFailed", "412"}
_TRANSIENT_CODES = {
    "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "InternalError", "OperationAborted", "RequestTimeout",
    "RequestTimeoutException", "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException",
    "TooManyRequests", "XAmzContentSHA256Mismatch",
}  # fmt: skip
_ADVICE = {
    "NoSuchBucket": "Create the bucket, or mend its name in the store's URL.",
    "RequestTimeTooSkewed": "This machine's clock differs from the server's by more than it allows (15 minutes): set "
    "it by NTP.",
    "InvalidAccessKeyId": "The server does not know the access key: check AWS_ACCESS_KEY_ID and the endpoint.",
    "SignatureDoesNotMatch": "The secret key is wrong: check AWS_SECRET_ACCESS_KEY, and the region.",
    "ExpiredToken": "The credentials have expired: renew them.",
    "AccessDenied": "The credentials lack a right: the store needs s3:GetObject, s3:PutObject, "
    "s3:AbortMultipartUpload and s3:ListBucket on its prefix.",
    "403": "The server refuses these credentials: check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, their rights, and "
    "this machine's clock.",
    "301": "The bucket is in another region: set storage.region.",
    "PermanentRedirect": "The bucket is in another region: set storage.region.",
    "AuthorizationHeaderMalformed": "The bucket is in another region: set storage.region.",
    "NoCredentialsError": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or any other source that boto3 knows.",
    "PartialCredentialsError": "Set both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
    "EntityTooLarge": "The server takes no objects of this size: lower storage.multipart_threshold_bytes.",
    "NotImplemented": "The server lacks something we rely on: run 'fedmentor doctor --store URL'.",
}
_USUAL_ADVICE = "Check the bucket, the endpoint and the AWS credentials; 'fedmentor doctor --store URL' looks closer."


class MissingError(Exception):
    """The server has no such key (or upload)."""


class RangeError(Exception):
    """The object ends before the range that was asked for."""


class ConditionError(Exception):
    """The server refused an If-Match or If-None-Match. ``unclear``: an earlier attempt may have been ours."""

    def __init__(self, unclear: bool) -> None:
        """Note whether an earlier attempt's outcome is unknown."""
        super().__init__("condition failed")
        self.unclear = unclear


class S3Client:
    """One bucket's requests, with one retry policy. Safe to use from several threads, not across a fork."""

    def __init__(self, boto: Any, bucket: str, patience: Patience) -> None:
        """Wrap a boto3 client whose own retries are off."""
        self.boto = boto
        self.bucket = bucket
        self.patience = patience

    @classmethod
    def connect(cls, bucket: str, settings: StorageConfig, credentials: tuple[str, str] | None = None) -> "S3Client":
        """Make the boto3 client. Sends nothing yet.

        Args:
            bucket: its name.
            settings: endpoint, time-outs, retries.
            credentials: access key and secret key; default: what boto3 finds in the environment.

        Raises:
            StorageError: the endpoint, or a profile that the environment names, cannot be used.
        """
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        config = Config(
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=min(settings.connect_timeout_seconds, settings.deadline_seconds),
            read_timeout=min(settings.read_timeout_seconds, settings.deadline_seconds),
            max_pool_connections=16,
            # The payload's sha256 is signed, over TLS too: a server then refuses a body that was spoilt on its way.
            s3={"addressing_style": settings.addressing_style, "payload_signing_enabled": True},
            request_checksum_calculation=settings.checksum_mode,
            response_checksum_validation=settings.checksum_mode,
        )
        try:
            access_key, secret_key = credentials or (None, None)
            session = boto3.session.Session(aws_access_key_id=access_key, aws_secret_access_key=secret_key)
            boto = session.client("s3", endpoint_url=settings.endpoint_url, region_name=settings.region, config=config)
        except (BotoCoreError, ValueError) as error:
            raise StorageError(
                f"cannot open bucket {bucket}: {type(error).__name__}. Check storage.endpoint_url, storage.region and "
                "the AWS variables."
            ) from None
        return cls(boto, bucket, Patience(settings.deadline_seconds))

    @property
    def endpoint(self) -> str:
        """Host and port that requests go to."""
        return str(urlparse(self.boto.meta.endpoint_url).netloc).rpartition("@")[2]

    def call(self, what: str, operation: str, **parameters: Any) -> Any:
        """One request, such as ``call("write a/b", "put_object", Key=...)``, and its response without a body.

        Args:
            what: for the error message.
            operation: boto3's method.
            parameters: its arguments besides the bucket.

        Raises:
            MissingError: no such key.
            ConditionError: a condition of the request did not hold.
            RangeError: the object is shorter than the range.
            StorageError: anything else, at once or after the deadline.
        """
        return self.fetch(what, operation, lambda response, attempt: response, **parameters)

    def fetch(self, what: str, operation: str, consume: Callable[[Any, Attempt], T], **parameters: Any) -> T:
        """``call``, where ``consume`` reads the response's body within the same attempt."""

        def once(attempt: Attempt) -> T:
            try:
                response = getattr(self.boto, operation)(Bucket=self.bucket, **parameters)
                return consume(response, attempt)
            except Exception as error:
                raise self._translated(error, what, attempt) from None

        try:
            return self.patience.run(once)
        except GaveUpError as error:
            raise StorageError(
                f"cannot {what} in bucket {self.bucket} at {self.endpoint}: {error.reason}; gave up after "
                f"{error.attempts} attempt{'s' * (error.attempts > 1)} in {error.seconds:.1f} s "
                f"(storage.deadline_seconds: {self.patience.deadline_seconds:g}). Check that the server is up and "
                "reachable, then run again: nothing is half-written."
            ) from None

    def _translated(self, error: Exception, what: str, attempt: Attempt) -> Exception:
        """The error as one of ours. Unknown kinds are bugs and stay as they are."""
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            FlexibleChecksumError,
            HTTPClientError,
            IncompleteReadError,
            SSLError,
        )
        from botocore.exceptions import ConnectionError as UnreachableError
        from botocore.parsers import ResponseParserError

        if isinstance(error, ClientError):
            code = _code(error)
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if code in _CONDITION or status == 412:
                return ConditionError(unclear=attempt.number > 0)
            if code in _MISSING:
                return MissingError(code)
            if status == 416:
                return RangeError(code)
            if code in _TRANSIENT_CODES or status in (409, 429) or status >= 500:
                return TransientError(f"the server says {code}" if code else f"the server says {status}")
            return self._refused(what, code or str(status))
        if isinstance(error, SSLError):
            return self._refused(what, "the server's certificate is not trusted")
        passing = (HTTPClientError, UnreachableError, IncompleteReadError, FlexibleChecksumError, ResponseParserError)
        if isinstance(error, passing):
            return TransientError(type(error).__name__.removesuffix("Error"))
        if isinstance(error, BotoCoreError):
            return self._refused(what, type(error).__name__)
        return error

    def _refused(self, what: str, code: str) -> StorageError:
        advice = _ADVICE.get(code, _USUAL_ADVICE)
        return StorageError(f"cannot {what} in bucket {self.bucket} at {self.endpoint}: {code}. {advice}")


def create_bucket(bucket: str, settings: StorageConfig, *, access_key: str, secret_key: str) -> None:
    """Create a bucket where it is missing.

    Raises:
        StorageError: the server refused, or did not answer before the deadline.
    """
    client = S3Client.connect(bucket, settings, (access_key, secret_key))
    try:
        client.call("find the bucket", "head_bucket")
    except MissingError:
        client.call("create the bucket", "create_bucket")


def clock_skew_seconds(response: Any) -> float | None:
    """This machine's clock minus the server's, by a response's Date header (whole seconds); None without one."""
    said = response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    try:
        return (datetime.now(UTC) - parsedate_to_datetime(said)).total_seconds()
    except (TypeError, ValueError):
        return None


def _code(error: Any) -> str:
    """A server's error code, which is a word; anything else it may send instead is not repeated."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    return code if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", code) else ""
