"""An S3-compatible bucket as an artifact store, by conditional create (``If-None-Match: *``)."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlparse

from fedmentor_core.errors import AlreadyExistsError, ConfigError, NotFoundError, StorageError
from fedmentor_core.storage.base import ArtifactStore, check_key


class S3Store(ArtifactStore):
    """Objects below ``s3://bucket/prefix``. Credentials come from the usual AWS variables, never from a config."""

    def __init__(self, client: Any, bucket: str, prefix: str) -> None:
        """Wrap a boto3 client."""
        self._client = client
        self.bucket = bucket
        self.prefix = prefix.strip("/")
        self.url = f"s3://{bucket}" + (f"/{self.prefix}" if self.prefix else "")

    @classmethod
    def from_url(cls, url: str, *, endpoint_url: str | None, region: str, addressing_style: str) -> "S3Store":
        """Open ``s3://bucket/prefix`` with bounded retries and time-outs."""
        import boto3
        from botocore.config import Config

        parts = urlparse(url)
        if not parts.netloc:
            raise ConfigError(f"store URL {url!r} names no bucket; example: s3://bucket/prefix")
        client = boto3.client(
            "s3",
            endpoint_url=endpoint_url,
            region_name=region,
            config=Config(
                retries={"mode": "standard", "total_max_attempts": 5},
                connect_timeout=5,
                read_timeout=60,
                s3={"addressing_style": addressing_style},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        return cls(client, parts.netloc, parts.path)

    def put_bytes(self, key: str, data: bytes) -> None:
        """See ``ArtifactStore``."""
        from botocore.exceptions import BotoCoreError, ClientError

        for last_try in (False, False, True):
            try:
                self._client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data, IfNoneMatch="*")
                return
            except ClientError as error:
                code = error.response.get("Error", {}).get("Code")
                if code in ("PreconditionFailed", "412"):
                    raise AlreadyExistsError(f"{key} already exists in {self.url}; objects are immutable.") from None
                if code != "ConditionalRequestConflict" or last_try:  # 409: a concurrent writer; S3 says to try again
                    raise self._failed("write", key, error) from error
            except BotoCoreError as error:
                raise self._failed("write", key, error) from error

    def get_bytes(self, key: str) -> bytes:
        """See ``ArtifactStore``."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            body: bytes = self._client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in ("NoSuchKey", "404"):
                raise NotFoundError(f"no object {key} in {self.url}.") from None
            raise self._failed("read", key, error) from error
        except BotoCoreError as error:
            raise self._failed("read", key, error) from error
        return body

    def exists(self, key: str) -> bool:
        """See ``ArtifactStore``."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self._client.head_object(Bucket=self.bucket, Key=self._key(key))
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in ("NoSuchKey", "404", "NotFound"):
                return False
            raise self._failed("look up", key, error) from error
        except BotoCoreError as error:
            raise self._failed("look up", key, error) from error
        return True

    def list_keys(self, prefix: str) -> Iterator[str]:
        """See ``ArtifactStore``."""
        from botocore.exceptions import BotoCoreError, ClientError

        root = f"{self.prefix}/" if self.prefix else ""
        full = f"{root}{check_key(prefix)}/" if prefix else root
        try:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=full)
            found = sorted(item["Key"].removeprefix(root) for page in pages for item in page.get("Contents", []))
        except (ClientError, BotoCoreError) as error:
            raise self._failed("list", prefix, error) from error
        yield from found

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{check_key(key)}" if self.prefix else check_key(key)

    def _failed(self, what: str, key: str, error: Exception) -> StorageError:
        code = getattr(error, "response", {}).get("Error", {}).get("Code", type(error).__name__)
        return StorageError(
            f"cannot {what} {key} in {self.url}: {code}. Check the bucket, the endpoint and the AWS credentials."
        )
