"""What a network and a server can do to a request: it recovers, or fails clearly; nothing is lost or half-visible."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import SECRET, Fault, FaultProxy

from fedmentor_core.config import StorageConfig
from fedmentor_core.errors import AlreadyExistsError, ConflictError, IntegrityError, NotFoundError, StorageError
from fedmentor_core.storage.base import ArtifactStore, open_store

MIB = 2**20
Flaky = Callable[..., ArtifactStore]

PASSING = {
    "dropped": Fault("drop"),
    "dropped twice": Fault("drop", times=2),
    "response lost": Fault("lose"),
    "500": Fault("status", status=500, code="InternalError"),
    "503": Fault("status", status=503, code="SlowDown", times=2),
    "429": Fault("status", status=429, code="TooManyRequests"),
    "409": Fault("status", status=409, code="ConditionalRequestConflict"),
    "400 bad digest": Fault("status", status=400, code="BadDigest"),
    "slow": Fault("slow", seconds=0.8),
    "not XML": Fault("status", status=502, code="<<<"),
}


def again(fault: Fault, where: str = "") -> Fault:
    return Fault(fault.kind, where, fault.times, fault.status, fault.code, fault.seconds, fault.action)


@pytest.mark.parametrize("name", PASSING)
def test_passing_fault_on_any_request_is_got_over(flaky: Flaky, proxy: FaultProxy, name: str) -> None:
    store = flaky(read_timeout_seconds=0.5 if name == "slow" else 5)
    proxy.inject(again(PASSING[name], "PUT"))
    store.put_bytes("a/b", b"hello")  # strict: an own write whose response was lost is not another's
    proxy.inject(again(PASSING[name], "HEAD"))
    assert store.exists("a/b")
    proxy.inject(again(PASSING[name], "GET"))
    assert store.get_bytes("a/b") == b"hello"
    proxy.inject(again(PASSING[name], "list-type"))
    assert list(store.list_keys("")) == ["a/b", "warm/up"]
    proxy.inject(again(PASSING[name], "PUT"))
    pointer = store.swap_pointer("head", b"1", None)
    proxy.inject(again(PASSING[name], "PUT"))
    assert store.read_pointer("head") == pointer
    moved = store.swap_pointer("head", b"2", pointer)
    proxy.inject(again(PASSING[name], "GET"))
    assert store.read_pointer("head") == moved
    assert all(not fault.times for fault in proxy.faults), "every fault struck"


@pytest.mark.parametrize("kind", ["truncate", "corrupt"])
def test_body_spoilt_on_the_way_is_read_again(flaky: Flaky, proxy: FaultProxy, tmp_path: Path, kind: str) -> None:
    store = flaky()
    ref = store.put("a/b", b"hello" * 1000)
    for read in (lambda: store.get_bytes("a/b"), lambda: store.get(ref)):
        proxy.inject(Fault(kind, "GET"))
        assert read() == b"hello" * 1000
    proxy.inject(Fault(kind, "GET"))
    store.get_to_file(ref, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"hello" * 1000
    assert all(not fault.times for fault in proxy.faults)


def test_body_that_stays_spoilt_is_refused(flaky: Flaky, proxy: FaultProxy, tmp_path: Path) -> None:
    store = flaky()
    ref = store.put("a/b", b"hello")
    store.swap_pointer("head", b"1", None)
    proxy.inject(Fault("corrupt", "GET", times=99))
    for read in (
        lambda: store.get_bytes("a/b"),
        lambda: store.get(ref),
        lambda: list(store.stream(ref)),
        lambda: store.get_to_file(ref, tmp_path / "file"),
        lambda: store.read_pointer("head"),
    ):
        with pytest.raises(IntegrityError):
            read()
    assert not (tmp_path / "file").exists()


def test_upload_spoilt_on_the_way_never_reads_as_good(flaky: Flaky, proxy: FaultProxy) -> None:
    # A server that checks the signed payload refuses it; this one does not, and the reader finds out.
    store = flaky()
    proxy.inject(Fault("corrupt_upload", "PUT"))
    ref = store.put("a/b", b"hello")
    with pytest.raises(IntegrityError):
        store.get(ref)
    with pytest.raises(IntegrityError):
        store.get_bytes("a/b")


def test_payload_is_signed(flaky: Flaky) -> None:
    store = flaky()
    signed: list[str] = []
    store.client.boto.meta.events.register(  # type: ignore[attr-defined]
        "before-send.s3.PutObject", lambda request, **_: signed.append(request.headers["x-amz-content-sha256"].decode())
    )
    ref = store.put("a/b", b"hello")
    assert signed == [ref.sha256]


def test_own_lost_write_is_told_from_anothers_equal_bytes(flaky: Flaky, proxy: FaultProxy, s3_endpoint: str) -> None:
    store = flaky()
    proxy.inject(Fault("lose", "PUT"))
    store.put_bytes("ours", b"same")
    theirs = open_store(store.url, StorageConfig(endpoint_url=s3_endpoint))
    # Another creates the very same bytes after our request was dropped and before we try again.
    proxy.inject(Fault("drop", "theirs"), Fault("first", "theirs", action=lambda: theirs.put_bytes("theirs", b"same")))
    with pytest.raises(AlreadyExistsError):
        store.put_bytes("theirs", b"same")
    assert store.put("theirs", b"same").n_bytes == 4, "for an idempotent put, equal bytes are ours"


def test_own_lost_pointer_move_is_told_from_anothers(flaky: Flaky, proxy: FaultProxy, s3_endpoint: str) -> None:
    store = flaky()
    seen = store.swap_pointer("head", b"0", None)
    other = open_store(store.url, StorageConfig(endpoint_url=s3_endpoint))
    proxy.inject(Fault("drop", "PUT"), Fault("first", "PUT", action=lambda: other.swap_pointer("head", b"1", seen)))
    with pytest.raises(ConflictError):
        store.swap_pointer("head", b"1", seen)
    found = store.read_pointer("head")
    assert found is not None
    proxy.inject(Fault("lose", "PUT"))
    assert store.swap_pointer("head", b"1", found).version != found.version


def test_spurious_412_loses_nothing(flaky: Flaky, proxy: FaultProxy) -> None:
    store = flaky()
    proxy.inject(Fault("status", "PUT", status=412, code="PreconditionFailed"))
    with pytest.raises(AlreadyExistsError):
        store.put_bytes("a/b", b"hello")
    assert not store.exists("a/b")
    store.put_bytes("a/b", b"hello")


REFUSED = {
    "403 clock": (403, "RequestTimeTooSkewed", "clock"),
    "403 key": (403, "InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
    "403 secret": (403, "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
    "403 rights": (403, "AccessDenied", "s3:PutObject"),
    "400 expired": (400, "ExpiredToken", "renew"),
    "404 bucket": (404, "NoSuchBucket", "Create the bucket"),
    "501": (400, "NotImplemented", "doctor"),
    "unknown": (418, "Teapot", "doctor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_lasting_refusal_fails_at_once_and_clearly(flaky: Flaky, proxy: FaultProxy, name: str) -> None:
    status, code, advice = REFUSED[name]
    store = flaky()
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("write a/b", lambda: store.put_bytes("a/b", b"x")),
        ("read a/b", lambda: store.get_bytes("a/b")),
        ("list a", lambda: list(store.list_keys("a"))),
        ("move pointer head", lambda: store.swap_pointer("head", b"x", None)),
    ]
    for what, call in calls:
        proxy.clear()
        proxy.inject(Fault("status", status=status, code=code, times=99))
        with pytest.raises(StorageError, match=f"{what} .*{code}.*{advice}") as caught:
            call()
        assert not isinstance(caught.value, (NotFoundError, AlreadyExistsError, ConflictError))
        assert len(proxy.log) == 1, "not tried again"
        for secret in ("AKIA", SECRET):
            assert secret not in str(caught.value)
            assert secret not in repr(caught.value.__cause__)
    proxy.clear()
    assert list(store.list_keys("")) == ["warm/up"]


def test_head_with_wrong_credentials_is_said(flaky: Flaky, proxy: FaultProxy) -> None:
    store = flaky()
    proxy.inject(Fault("status", "HEAD", status=403, times=9))
    with pytest.raises(StorageError, match=r"look up a/b .*403.*AWS_ACCESS_KEY_ID.*clock"):
        store.exists("a/b")


@pytest.mark.parametrize("name", ["dropped", "503", "slow"])
def test_lasting_trouble_ends_at_the_deadline(flaky: Flaky, proxy: FaultProxy, name: str) -> None:
    store = flaky(deadline_seconds=0.4)
    fault = again(PASSING[name])
    fault.times = 999
    proxy.inject(fault)
    with pytest.raises(StorageError, match=r"read a/b .*gave up after \d+ attempts?.*deadline_seconds: 0.4"):
        store.get_bytes("a/b")


def test_server_that_is_not_there(unused_port: int) -> None:
    store = open_store("s3://b", StorageConfig(endpoint_url=f"http://127.0.0.1:{unused_port}", deadline_seconds=0.3))
    with pytest.raises(StorageError, match="EndpointConnection; gave up"):
        store.get_bytes("k")


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_no_credentials_is_said(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    store = open_store("s3://b", StorageConfig(endpoint_url=s3_endpoint))
    with pytest.raises(StorageError, match=r"NoCredentialsError.*Set AWS_ACCESS_KEY_ID"):
        store.get_bytes("k")


def test_missing_bucket_is_never_taken_for_a_missing_object(s3_endpoint: str) -> None:
    store = open_store("s3://no-such-bucket/x", StorageConfig(endpoint_url=s3_endpoint))
    for call in (
        lambda: store.put_bytes("k", b""),
        lambda: store.get_bytes("k"),
        lambda: store.exists("k"),
        lambda: list(store.list_keys("k")),
        lambda: store.read_pointer("k"),
        lambda: store.swap_pointer("k", b"", None),
    ):
        with pytest.raises(StorageError, match=r"NoSuchBucket.*Create the bucket") as caught:
            call()
        assert not isinstance(caught.value, NotFoundError)


def test_server_that_ignores_conditions_is_found_out_before_the_first_write(
    bucket: str, s3_endpoint: str, raw: Any
) -> None:
    store = open_store(f"s3://{bucket}/p", StorageConfig(endpoint_url=s3_endpoint))

    def forget(params: dict[str, Any], **_: Any) -> None:
        params["headers"].pop("If-None-Match", None)

    store.client.boto.meta.events.register("before-call.s3.PutObject", forget)  # type: ignore[attr-defined]
    for write in (
        lambda: store.put_bytes("k", b"1"),
        lambda: store.put("k", b"2"),
        lambda: store.swap_pointer("k", b"", None),
    ):
        with pytest.raises(StorageError, match="ignores If-None-Match"):
            write()
    assert [item["Key"] for item in raw.list_objects_v2(Bucket=bucket)["Contents"]] == ["p/.fedmentor/probe"]


# --- large objects -----------------------------------------------------------------------------------------------


@pytest.fixture
def large(flaky: Flaky) -> ArtifactStore:
    return flaky(multipart_threshold_bytes=5 * MIB, multipart_part_bytes=5 * MIB, read_timeout_seconds=5)


DATA = random.Random(0).randbytes(11 * MIB)


@pytest.mark.parametrize("where", [r"POST .*uploads", r"PUT .*partNumber=2", r"POST .*uploadId"])
@pytest.mark.parametrize("name", ["dropped", "response lost", "503"])
def test_passing_fault_in_a_multipart_upload(large: ArtifactStore, proxy: FaultProxy, name: str, where: str) -> None:
    proxy.inject(again(PASSING[name], where))
    large.put_bytes("big", DATA)
    assert large.get_bytes("big") == DATA
    assert proxy.count("partNumber=") == 3 + (proxy.faults[0].where == r"PUT .*partNumber=2") * PASSING[name].times
    assert not proxy.faults[0].times


def test_multipart_upload_that_fails_leaves_nothing(
    large: ArtifactStore, proxy: FaultProxy, raw: Any, bucket: str
) -> None:
    for code in ("AccessDenied", "EntityTooSmall"):
        proxy.inject(Fault("status", "partNumber=3", status=403, code=code))
        with pytest.raises(StorageError, match=code):
            large.put_bytes("big", DATA)
        assert not large.exists("big")
        assert "Uploads" not in raw.list_multipart_uploads(Bucket=bucket)


def test_multipart_create_never_overwrites(large: ArtifactStore, proxy: FaultProxy, raw: Any, bucket: str) -> None:
    def another() -> None:
        raw.put_object(Bucket=bucket, Key="site-a/big", Body=b"theirs")

    proxy.inject(Fault("first", r"POST .*uploadId", action=another))
    with pytest.raises(AlreadyExistsError):
        large.put("big", DATA)
    assert large.get_bytes("big") == b"theirs"
    assert "Uploads" not in raw.list_multipart_uploads(Bucket=bucket)
    sent = proxy.count("partNumber=")
    with pytest.raises(AlreadyExistsError):
        large.put("big", DATA)
    assert proxy.count("partNumber=") == sent, "gigabytes are not sent in vain"


def test_stream_goes_on_after_faults(large: ArtifactStore, proxy: FaultProxy) -> None:
    ref = large.put("big", DATA)
    for kind in ("drop", "truncate", "lose"):
        proxy.clear()
        proxy.inject(Fault(kind, "GET .*big"))
        assert b"".join(large.stream(ref)) == DATA
        assert proxy.count("GET .*big") == 3, "only the piece that failed is read again"


def test_object_replaced_while_streamed_is_noticed(large: ArtifactStore, raw: Any, bucket: str) -> None:
    ref = large.put("big", DATA)
    pieces = large._pieces("big", ref.n_bytes)
    assert next(pieces) == DATA[: 8 * MIB]
    raw.put_object(Bucket=bucket, Key="site-a/big", Body=DATA[::-1])
    with pytest.raises(IntegrityError, match="changed while it was read"):
        next(pieces)


# --- no needless requests, settings --------------------------------------------------------------------------------


def test_requests_are_few(flaky: Flaky, proxy: FaultProxy) -> None:
    store = flaky()
    ref = store.put("a", b"x")
    assert proxy.log == ["PUT /" + proxy.log[0].removeprefix("PUT /")]
    store.put("a", b"x")
    assert [line.split()[0] for line in proxy.log] == ["PUT", "PUT", "HEAD"], "equal bytes are known by their digest"
    proxy.clear()
    store.get(ref)
    list(store.stream(ref))
    store.exists("a")
    assert [line.split()[0] for line in proxy.log] == ["GET", "GET", "HEAD"]


@pytest.mark.parametrize("asked", [("AES256", None), ("aws:kms", "key-1")])
def test_server_side_encryption_is_passed_on(
    flaky: Flaky, raw: Any, bucket: str, asked: tuple[Any, str | None]
) -> None:
    store = flaky(
        server_side_encryption=asked[0], kms_key_id=asked[1],
        multipart_threshold_bytes=5 * MIB, multipart_part_bytes=5 * MIB,
    )  # fmt: skip
    store.put("small", b"x")
    store.put("large", DATA)
    store.swap_pointer("head", b"x", None)
    for key in ("small", "large", ".fedmentor/pointers/head"):
        head = raw.head_object(Bucket=bucket, Key=f"site-a/{key}")
        assert head["ServerSideEncryption"] == asked[0]
        assert head.get("SSEKMSKeyId") == asked[1]


def test_checksums_of_every_request_are_a_setting(flaky: Flaky) -> None:
    for mode, sent in (("when_required", False), ("when_supported", True)):
        store = flaky(checksum_mode=mode)
        headers: list[str] = []
        store.client.boto.meta.events.register(  # type: ignore[attr-defined]
            "before-send.s3.PutObject", lambda request, headers=headers, **_: headers.extend(request.headers)
        )
        store.put_bytes(mode, b"hello")
        assert any("checksum" in name.lower() for name in headers) == sent
        assert store.get_bytes(mode) == b"hello"
