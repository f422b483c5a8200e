"""Random sequences of operations, with faults between client and server, against a dict."""

import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Fault, FaultProxy
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from fedmentor_core.config import StorageConfig
from fedmentor_core.errors import AlreadyExistsError, ConflictError, NotFoundError
from fedmentor_core.storage.base import Pointer, open_store

KEYS = st.sampled_from(["a", "b/c", "b/d", "e/f/g", "zé/ü +%"])
NAMES = st.sampled_from(["head", "b/c"])
DATA = st.sampled_from([b"", b"x", b"y" * 3000, bytes(range(256))])
FAULTS = st.sampled_from(
    [
        Fault("drop"),
        Fault("lose"),
        Fault("lose", times=2),
        Fault("status", status=503, code="SlowDown"),
        Fault("status", status=500, code="InternalError"),
        Fault("truncate", "GET"),
        Fault("corrupt", "GET .*/(a|b|e|z)"),
    ]
)
_numbers = itertools.count()


class StoreMachine(RuleBasedStateMachine):
    """Three stores and a dict must agree after every step, whatever happens on the way."""

    proxy: FaultProxy
    bucket: str
    key_file: Path

    @initialize()
    def open(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        prefix = f"run-{next(_numbers)}"
        s3 = StorageConfig(endpoint_url=self.proxy.url, deadline_seconds=30, read_timeout_seconds=5)
        sealed = s3.model_copy(update={"encryption_key_file": str(self.key_file)})
        self.stores = [
            open_store(Path(self.folder.name).as_uri()),
            open_store(f"s3://{self.bucket}/{prefix}/plain", s3),
            open_store(f"s3://{self.bucket}/{prefix}/sealed", sealed),
        ]
        self.model: dict[str, bytes] = {}
        self.pointers: dict[str, bytes] = {}
        self.seen: list[dict[str, Pointer]] = [{} for _ in self.stores]

    def teardown(self) -> None:
        self.proxy.clear()
        self.listings()
        self.folder.cleanup()

    @rule(fault=FAULTS)
    def fault(self, fault: Fault) -> None:
        self.proxy.inject(Fault(fault.kind, fault.where, fault.times, fault.status, fault.code))

    @rule(key=KEYS, data=DATA)
    def create(self, key: str, data: bytes) -> None:
        for store in self.stores:
            if key in self.model:
                with pytest.raises(AlreadyExistsError):
                    store.put_bytes(key, data)
            else:
                store.put_bytes(key, data)
        self.model.setdefault(key, data)

    @rule(key=KEYS, data=DATA)
    def put(self, key: str, data: bytes) -> None:
        for store in self.stores:
            if self.model.get(key, data) == data:
                ref = store.put(key, data)
                assert store.get(ref) == data
                assert b"".join(store.stream(ref)) == data
            else:
                with pytest.raises(AlreadyExistsError):
                    store.put(key, data)
        self.model.setdefault(key, data)

    @rule(key=KEYS)
    def read(self, key: str) -> None:
        for store in self.stores:
            assert store.exists(key) == (key in self.model)
            if key in self.model:
                assert store.get_bytes(key) == self.model[key]
                stat = store.stat(key)
                assert stat is not None
                assert stat.n_bytes == len(self.model[key])
            else:
                with pytest.raises(NotFoundError):
                    store.get_bytes(key)

    @rule(name=NAMES)
    def look(self, name: str) -> None:
        for store, seen in zip(self.stores, self.seen, strict=True):
            found = store.read_pointer(name)
            assert (found.value if found else None) == self.pointers.get(name)
            if found is not None:
                seen[name] = found

    @rule(name=NAMES, value=DATA, fresh=st.booleans())
    def move(self, name: str, value: bytes, fresh: bool) -> None:
        if fresh:
            self.look(name)
        moved = []
        for store, seen in zip(self.stores, self.seen, strict=True):
            try:
                store.swap_pointer(name, value, seen.get(name))
            except ConflictError:
                moved.append(False)
            else:
                moved.append(True)
        assert len(set(moved)) == 1, "the stores agree on who may move a pointer"
        assert moved[0] or not fresh
        if moved[0]:
            self.pointers[name] = value

    @rule()
    def listings(self) -> None:
        for store in self.stores:
            assert [*store.list_keys("")] == sorted(self.model)
            assert [*store.list_keys("b")] == sorted(key for key in self.model if key.startswith("b/"))


def test_stores_behave_like_a_dict(proxy: FaultProxy, bucket: str, key_file: Path) -> None:
    place: dict[str, Any] = {"proxy": proxy, "bucket": bucket, "key_file": key_file}
    machine = type("Machine", (StoreMachine,), place)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=8,
            stateful_step_count=14,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )
