"""One contract for all stores: a directory, S3 over real TCP on two servers, and both encrypted."""

import hashlib
import itertools
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest

from fedmentor_core.config import StorageConfig
from fedmentor_core.errors import (
    AlreadyExistsError,
    ConfigError,
    ConflictError,
    IntegrityError,
    NotFoundError,
    StorageError,
)
from fedmentor_core.records import ArtifactRef
from fedmentor_core.storage.base import ArtifactStore, Pointer, open_store

MIB = 2**20
_numbers = itertools.count()


class Place:
    """A store, a second one opened on the same place, and ways to see and spoil what lies there."""

    def __init__(
        self, open_it: Callable[[], ArtifactStore], spoil: Callable[[str, bytes], Any], encrypted: bool
    ) -> None:
        self.open = open_it
        self.store = open_it()
        self.spoil = spoil
        self.encrypted = encrypted


@pytest.fixture(params=["file", "s3", "seaweedfs", "file encrypted", "s3 encrypted"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    encrypted = "encrypted" in request.param
    key_file = str(request.getfixturevalue("key_file")) if encrypted else None
    if request.param.startswith("file"):
        root = tmp_path / "a place"
        settings = StorageConfig(encryption_key_file=key_file)
        return Place(
            lambda: open_store(root.as_uri(), settings), lambda key, data: (root / key).write_bytes(data), encrypted
        )
    raw, bucket, endpoint = _server(request)
    prefix = f"some/prefix-{next(_numbers)}"
    settings = StorageConfig(
        endpoint_url=endpoint,
        encryption_key_file=key_file,
        multipart_threshold_bytes=5 * MIB,
        multipart_part_bytes=5 * MIB,
    )

    def spoil(key: str, data: bytes) -> None:
        kept = raw.head_object(Bucket=bucket, Key=f"{prefix}/{key}")["Metadata"]
        raw.put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=data, Metadata=kept)

    return Place(lambda: open_store(f"s3://{bucket}/{prefix}", settings), spoil, encrypted)


def _server(request: pytest.FixtureRequest) -> tuple[Any, str, str]:
    """A boto3 client, a new bucket and the endpoint: on moto's server, or on SeaweedFS with its own credentials."""
    if request.param != "seaweedfs":
        return tuple(request.getfixturevalue(name) for name in ("raw", "bucket", "s3_endpoint"))
    server = request.getfixturevalue("seaweedfs")
    monkeypatch = request.getfixturevalue("monkeypatch")
    request.getfixturevalue("_credentials")
    for name, value in server.credentials.items():
        monkeypatch.setenv(name, value)
    raw = boto3.session.Session().client("s3", endpoint_url=server.endpoint)
    if "contract" not in {one["Name"] for one in raw.list_buckets()["Buckets"]}:
        raw.create_bucket(Bucket="contract")  # one for all: SeaweedFS sets seven volumes aside for each
    return raw, "contract", server.endpoint


@pytest.fixture
def store(place: Place) -> ArtifactStore:
    return place.store


def test_what_is_put_is_got(store: ArtifactStore) -> None:
    for data in (b"", b"hello", bytes(range(256)) * 1000):
        ref = store.put(f"runs/r/{len(data)}.bin", data)
        assert ref.n_bytes == len(data)
        assert store.get(ref) == store.get_bytes(ref.key) == data
        assert store.exists(ref.key)


def test_object_is_created_once(store: ArtifactStore) -> None:
    store.put_bytes("a/b", b"first")
    with pytest.raises(AlreadyExistsError, match="immutable"):
        store.put_bytes("a/b", b"second")
    with pytest.raises(AlreadyExistsError):
        store.put_bytes("a/b", b"first")
    assert store.get_bytes("a/b") == b"first"


def test_put_accepts_its_own_bytes_again_and_no_others(store: ArtifactStore) -> None:
    assert store.put("a/b", b"same") == store.put("a/b", b"same")
    with pytest.raises(AlreadyExistsError):
        store.put("a/b", b"other")
    assert store.get_bytes("a/b") == b"same"


def test_race_for_one_key_has_one_winner(store: ArtifactStore) -> None:
    def write(i: int) -> int | None:
        try:
            store.put_bytes("race/key", f"writer {i}".encode() * 500)
        except AlreadyExistsError:
            return None
        return i

    with ThreadPoolExecutor(24) as pool:
        winners = [i for i in pool.map(write, range(24)) if i is not None]
    assert len(winners) == 1
    assert store.get_bytes("race/key") == f"writer {winners[0]}".encode() * 500
    assert list(store.list_keys("race")) == ["race/key"]


def test_spoilt_bytes_are_detected_on_read(place: Place) -> None:
    ref = place.store.put("x/y", b"hello")
    for spoilt in (b"", b"hell", b"hellO", b"hello!"):
        place.spoil("x/y", spoilt)
        with pytest.raises(IntegrityError, match=r"expected sha256|not encrypted"):
            place.store.get(ref)


def test_json_is_canonical_and_its_spoilt_bytes_are_detected(place: Place) -> None:
    place.store.put_json("x/y.json", {"b": 1, "a": [None, "é"]})
    assert place.store.get_bytes("x/y.json") == '{"a":[null,"é"],"b":1}'.encode()
    assert place.store.get_json("x/y.json") == {"a": [None, "é"], "b": 1}
    for spoilt in (b'{"a":', '{"a":[null,"é"],"b":2}'.encode(), b""):
        place.spoil("x/y.json", spoilt)
        with pytest.raises(IntegrityError, match=r"x/y.json"):
            place.store.get_json("x/y.json")


def test_missing_object_is_not_found(store: ArtifactStore) -> None:
    assert not store.exists("no/such")
    with pytest.raises(NotFoundError, match="no/such"):
        store.get_bytes("no/such")
    with pytest.raises(NotFoundError):
        store.get(ArtifactRef(key="no/such", sha256="0" * 64, n_bytes=0))


def test_key_that_leaves_the_store_is_refused(store: ArtifactStore) -> None:
    for key in ("../x", "a/../../x", "/etc/x", "a//b", "a/./b", "", "a/", "..", "a\0b", ".fedmentor", ".fedmentor/x"):
        for call in (
            lambda key=key: store.put_bytes(key, b""),
            lambda key=key: store.get_bytes(key),
            lambda key=key: store.stat(key),
            lambda key=key: store.swap_pointer(key, b"", None),
            lambda key=key: store.read_pointer(key),
            lambda key=key: list(store.list_keys(key)) if key else store.put(key, b""),
        ):
            with pytest.raises(StorageError, match="invalid key"):
                call()
    assert list(store.list_keys("")) == []


def test_several_objects_come_in_order_and_fail_at_their_turn(store: ArtifactStore) -> None:
    keys = [f"many/{index:02d}" for index in range(20)]
    for key in keys:
        store.put_bytes(key, key.encode())
    assert list(store.get_each(keys)) == [key.encode() for key in keys]
    assert list(store.get_each([])) == []
    coming = store.get_each([*keys[:3], "many/missing", *keys[3:]])
    assert [next(coming) for _ in range(3)] == [key.encode() for key in keys[:3]]
    with pytest.raises(NotFoundError):
        next(coming)


def test_several_objects_are_read_side_by_side_where_reading_waits(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(store.reads_at_once, timeout=30)
    monkeypatch.setattr(store, "get_bytes", lambda key: (together.wait(), key.encode())[1])
    keys = [f"k{index}" for index in range(2 * store.reads_at_once)]
    assert list(store.get_each(keys)) == [key.encode() for key in keys]
    assert (store.reads_at_once == 1) == store.url.startswith("file:")


def test_who_stops_reading_stops_the_reads(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(store, "get_bytes", lambda key: (time.sleep(0.05), read.append(key), b"x")[2])
    coming = store.get_each([f"k{index}" for index in range(1000)])
    assert next(coming) == b"x"
    coming.close()
    assert len(read) < 500


def test_listing_is_sorted_and_goes_by_folders(store: ArtifactStore) -> None:
    keys = ["b/2", "b/10", "a-b/x", "a/y", "a/x/z", "ab", "b2/1"]
    for key in keys:
        store.put_bytes(key, b".")
    assert list(store.list_keys("")) == sorted(keys)
    assert list(store.list_keys("b")) == ["b/10", "b/2"]
    assert list(store.list_keys("a")) == ["a/x/z", "a/y"]
    assert list(store.list_keys("nothing")) == []


def test_version_of_an_object_stays_until_somebody_replaces_it(place: Place) -> None:
    keys = ["v/a", "v/b", "v/c"]
    for key in keys:
        place.store.put_bytes(key, key.encode())
    before = list(place.store.list_versions("v"))
    assert [key for key, _ in before] == keys
    assert all(version for _, version in before)
    place.store.get_bytes("v/b")
    assert list(place.open().list_versions("v")) == before
    place.spoil("v/b", b"another content")
    after = dict(place.store.list_versions("v"))
    assert [key for key, version in before if after[key] != version] == ["v/b"]
    assert list(place.store.list_versions("nothing")) == []


def test_listing_goes_past_a_page(bucket: str, s3_endpoint: str, raw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(f"s3://{bucket}", StorageConfig(endpoint_url=s3_endpoint))
    expected = [f"many/{i:04d}" for i in range(12)]
    for key in expected:
        raw.put_object(Bucket=bucket, Key=key, Body=b"")
    boto = store.client.boto  # type: ignore[attr-defined]
    listed, calls = boto.list_objects_v2, []

    def by_fives(**asked: Any) -> Any:
        calls.append(asked)
        return listed(**asked, MaxKeys=5)

    monkeypatch.setattr(boto, "list_objects_v2", by_fives)
    assert list(store.list_keys("many")) == expected
    assert len(calls) == 3


def test_large_object_is_streamed_in_and_out(place: Place, tmp_path: Path) -> None:
    data = random.Random(0).randbytes(11 * MIB + 3)
    source, target = tmp_path / "source", tmp_path / "new folder" / "target"
    source.write_bytes(data)
    ref = place.store.put_file("big/one", source)
    assert ref == ArtifactRef(key="big/one", sha256=hashlib.sha256(data).hexdigest(), n_bytes=len(data))
    assert ref == place.store.put_file("big/one", source) == place.store.put("big/one", data)
    pieces = list(place.store.stream(ref))
    assert len(pieces) > 1
    assert b"".join(pieces) == data == place.store.get(ref)
    place.store.get_to_file(ref, target)
    assert target.read_bytes() == data
    stat = place.store.stat("big/one")
    assert stat is not None
    assert stat.n_bytes == len(data)
    with pytest.raises(AlreadyExistsError):
        place.store.put_bytes("big/one", data)
    with pytest.raises(AlreadyExistsError):
        place.store.put("big/one", data[:-1])
    assert list(place.store.list_keys("")) == ["big/one"]


def test_empty_object_is_streamed(store: ArtifactStore, tmp_path: Path) -> None:
    ref = store.put("nothing", b"")
    assert list(store.stream(ref)) == []
    store.get_to_file(ref, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b""


@pytest.mark.parametrize("how", ["flipped at the end", "cut", "emptied", "longer"])
def test_spoilt_stream_never_ends_well_and_leaves_no_file(place: Place, tmp_path: Path, how: str) -> None:
    data = random.Random(1).randbytes(9 * MIB)
    ref = place.store.put("big/one", data)
    spoilt = {
        "flipped at the end": data[:-1] + bytes([data[-1] ^ 1]),
        "cut": data[:-1],
        "emptied": b"",
        "longer": data + b"!",
    }
    place.spoil("big/one", spoilt[how])
    got: list[bytes] = []
    with pytest.raises(IntegrityError, match="big/one"):
        got.extend(place.store.stream(ref))
    assert sum(map(len, got)) < len(data)
    with pytest.raises(IntegrityError):
        place.store.get_to_file(ref, tmp_path / "out" / "target")
    assert list((tmp_path / "out").iterdir()) == []


def test_failed_download_keeps_the_file_that_was_there(store: ArtifactStore, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    with pytest.raises(NotFoundError):
        store.get_to_file(ArtifactRef(key="no/such", sha256="0" * 64, n_bytes=5), target)
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp-")] == []


def test_missing_source_file_is_said_clearly(store: ArtifactStore, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*absent"):
        store.put_file("k", tmp_path / "absent")


def test_pointer_moves_by_compare_and_swap(place: Place) -> None:
    store, other = place.store, place.open()
    assert store.read_pointer("runs/head") is None
    first = store.swap_pointer("runs/head", b"one", None)
    assert other.read_pointer("runs/head") == first == Pointer(b"one", first.version)
    with pytest.raises(ConflictError):
        other.swap_pointer("runs/head", b"two", None)
    second = other.swap_pointer("runs/head", b"two", first)
    with pytest.raises(ConflictError):
        store.swap_pointer("runs/head", b"three", first)
    with pytest.raises(ConflictError):
        store.swap_pointer("runs/never set", b"x", first)
    back = store.swap_pointer("runs/head", b"one", second)
    assert back.version != first.version, "the same value again is another version"
    with pytest.raises(ConflictError):
        other.swap_pointer("runs/head", b"late", first)
    assert store.read_pointer("runs/head") == back
    assert list(store.list_keys("")) == [], "pointers are not objects"


def test_race_for_a_pointer_loses_no_update(place: Place) -> None:
    stores = [place.open() for _ in range(4)]
    start = place.store.swap_pointer("count", b"0", None)
    assert start.value == b"0"

    def add(store: ArtifactStore) -> None:
        for _ in range(5):
            while True:
                seen = store.read_pointer("count")
                assert seen is not None
                try:
                    store.swap_pointer("count", str(int(seen.value) + 1).encode(), seen)
                    break
                except ConflictError:
                    continue

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, stores))
    ended = place.store.read_pointer("count")
    assert ended is not None
    assert ended.value == b"20"


def test_unwritable_directory_is_said_clearly(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file/k"):
        store.put_bytes("file/k", b"")


@pytest.mark.parametrize("url", ["/plain/path", "http://host/x", "file://relative", "s3:///no-bucket"])
def test_other_urls_are_refused_with_an_example(url: str) -> None:
    with pytest.raises(ConfigError, match="example"):
        open_store(url)
