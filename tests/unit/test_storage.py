"""One contract for both stores: a directory, and S3 over real TCP against moto's server."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from fedmentor_core.errors import AlreadyExistsError, ConfigError, IntegrityError, NotFoundError, StorageError
from fedmentor_core.records import ArtifactRef
from fedmentor_core.storage.base import ArtifactStore, open_store

BUCKET = "artifacts"


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
        server.stop()


def raw_client(endpoint: str) -> Any:
    return boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")


class Place:
    """A store and a way to spoil what lies in it."""

    def __init__(self, store: ArtifactStore, overwrite: Any) -> None:
        self.store = store
        self.overwrite = overwrite


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "file":
        root = tmp_path / "a place"
        return Place(open_store(root.as_uri()), lambda key, data: (root / key).write_bytes(data))
    endpoint = request.getfixturevalue("s3_endpoint")
    client = raw_client(endpoint)
    client.create_bucket(Bucket=BUCKET)
    prefix = f"some/{tmp_path.name}"
    store = open_store(f"s3://{BUCKET}/{prefix}", endpoint_url=endpoint)
    return Place(store, lambda key, data: client.put_object(Bucket=BUCKET, Key=f"{prefix}/{key}", Body=data))


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


@pytest.mark.parametrize("spoilt", [b"", b"hell", b"hellO", b"hello!"])
def test_spoilt_bytes_are_detected_on_read(place: Place, spoilt: bytes) -> None:
    ref = place.store.put("x/y", b"hello")
    place.overwrite("x/y", spoilt)
    with pytest.raises(IntegrityError, match="expected sha256"):
        place.store.get(ref)


def test_spoilt_json_is_detected(place: Place) -> None:
    place.store.put_json("x/y.json", {"b": 1, "a": [None, "é"]})
    assert place.store.get_bytes("x/y.json") == '{"a":[null,"é"],"b":1}'.encode()
    assert place.store.get_json("x/y.json") == {"a": [None, "é"], "b": 1}
    place.overwrite("x/y.json", b'{"a":')
    with pytest.raises(IntegrityError, match="torn or tampered"):
        place.store.get_json("x/y.json")


def test_missing_object_is_not_found(store: ArtifactStore) -> None:
    assert not store.exists("no/such")
    with pytest.raises(NotFoundError, match="no/such"):
        store.get_bytes("no/such")
    with pytest.raises(NotFoundError):
        store.get(ArtifactRef(key="no/such", sha256="0" * 64, n_bytes=0))


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/x", "a//b", "a/./b", "", "a/", "..", "a\0b"])
def test_key_that_leaves_the_store_is_refused(store: ArtifactStore, key: str) -> None:
    for call in (lambda: store.put_bytes(key, b""), lambda: store.get_bytes(key), lambda: store.exists(key)):
        with pytest.raises(StorageError, match="invalid key"):
            call()
    if key:
        with pytest.raises(StorageError, match="invalid key"):
            list(store.list_keys(key))


def test_listing_is_sorted_and_goes_by_folders(store: ArtifactStore) -> None:
    keys = ["b/2", "b/10", "a-b/x", "a/y", "a/x/z", "ab", "b2/1"]
    for key in keys:
        store.put_bytes(key, b".")
    assert list(store.list_keys("")) == sorted(keys)
    assert list(store.list_keys("b")) == ["b/10", "b/2"]
    assert list(store.list_keys("a")) == ["a/x/z", "a/y"]
    assert list(store.list_keys("nothing")) == []


def test_listing_goes_past_a_page(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw_client(s3_endpoint).create_bucket(Bucket="pages")
    store = open_store("s3://pages", endpoint_url=s3_endpoint)
    expected = [f"many/{i:04d}" for i in range(12)]
    for key in expected:
        store.put_bytes(key, b"")
    listed = store._client.list_objects_v2  # type: ignore[attr-defined]
    calls = []

    def by_fives(**asked: Any) -> Any:
        calls.append(asked)
        return listed(**asked, MaxKeys=5)

    monkeypatch.setattr(store._client, "list_objects_v2", by_fives)  # type: ignore[attr-defined]
    assert list(store.list_keys("many")) == expected
    assert len(calls) == 3


def test_missing_bucket_is_said_clearly(s3_endpoint: str) -> None:
    store = open_store("s3://no-such-bucket/x", endpoint_url=s3_endpoint)
    calls = (
        lambda: store.put_bytes("k", b""),
        lambda: store.get_bytes("k"),
        lambda: list(store.list_keys("k")),
    )
    for call in calls:
        with pytest.raises(StorageError, match=r"NoSuchBucket.*Check the bucket") as caught:
            call()
        assert not isinstance(caught.value, NotFoundError)


def test_unwritable_directory_is_said_clearly(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file/k"):
        store.put_bytes("file/k", b"")


@pytest.mark.parametrize("url", ["/plain/path", "http://host/x", "file://relative", "s3:///no-bucket"])
def test_other_urls_are_refused_with_an_example(url: str) -> None:
    with pytest.raises(ConfigError, match="example"):
        open_store(url)
