"""A real S3 endpoint over TCP, a proxy that spoils requests to it, and stores on both."""

import itertools
import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from fault_proxy import SECRET, FaultProxy
from moto.server import ThreadedMotoServer

from fedmentor_core.config import StorageConfig
from fedmentor_core.storage.base import ArtifactStore, open_store
from flows.stack.object_store import INNER_PORTS
from flows.stack.services import object_store
from flows.stack.settings import StackSettings
from flows.stack.state import StackFolder

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@dataclass(frozen=True)
class SeaweedFS:
    """The S3-compatible server that 'fedmentor up' starts."""

    endpoint: str
    credentials: dict[str, str]


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    folder = StackFolder(tmp_path_factory.mktemp("seaweedfs"))
    store = object_store(StackSettings(s3_port=_ports_in_a_row(1 + INNER_PORTS)), folder)
    store.prepare()
    endpoint = f"http://127.0.0.1:{store.settings.s3_port}"
    log = (folder.path / "log").open("wb")
    server = subprocess.Popen(store.command(), stdout=log, stderr=subprocess.STDOUT, cwd=store.home)
    try:
        for _ in range(240):
            with suppress(httpx.HTTPError):
                if httpx.get(f"{endpoint}/healthz", trust_env=False).is_success:
                    break
            assert server.poll() is None, (folder.path / "log").read_text()[-2000:]
            time.sleep(0.5)
        yield SeaweedFS(endpoint, store.read_credentials("server"))
    finally:
        server.kill()
        server.wait()
        log.close()


def _ports_in_a_row(count: int) -> int:
    for first in random.SystemRandom().sample(range(10_000, 15_000, count), 200):
        held = [socket.socket() for _ in range(count)]
        try:
            for offset, one in enumerate(held):
                one.bind(("127.0.0.1", first + offset))
            return first
        except OSError:
            continue
        finally:
            for one in held:
                one.close()
    raise RuntimeError("no free ports in a row")


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="session")
def raw(s3_endpoint: str) -> Any:
    """A plain boto3 client on the server itself."""
    session = boto3.session.Session(aws_access_key_id="raw", aws_secret_access_key="raw", region_name="us-east-1")
    return session.client("s3", endpoint_url=s3_endpoint)


@pytest.fixture
def bucket(raw: Any) -> str:
    """A new, empty bucket."""
    name = f"bucket-{next(_numbers)}"
    raw.create_bucket(Bucket=name)
    return name


@pytest.fixture(scope="session")
def _proxy(s3_endpoint: str) -> Iterator[FaultProxy]:
    proxy = FaultProxy(s3_endpoint)
    yield proxy
    proxy.close()


@pytest.fixture
def proxy(_proxy: FaultProxy) -> Iterator[FaultProxy]:
    _proxy.clear()
    yield _proxy
    _proxy.clear()


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    path.write_text("0f" * 32 + "\n")
    return path


@pytest.fixture
def flaky(proxy: FaultProxy, bucket: str) -> Callable[..., ArtifactStore]:
    """Makes a store behind the proxy, ready to write; keywords are settings."""

    def make(**settings: Any) -> ArtifactStore:
        given = {"deadline_seconds": 20, "read_timeout_seconds": 3, "endpoint_url": proxy.url, **settings}
        patient = StorageConfig(**{**given, "deadline_seconds": 60, "read_timeout_seconds": 30})
        open_store(f"s3://{bucket}/site-a", patient).put("warm/up", b"")
        store = open_store(f"s3://{bucket}/site-a", StorageConfig(**given))
        store._conditions_hold = True  # type: ignore[attr-defined]  # the first store has seen to it
        proxy.clear()
        return store

    return make
