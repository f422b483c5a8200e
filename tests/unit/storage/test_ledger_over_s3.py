"""A privacy ledger on S3 while responses are lost: every charge is in the chain exactly once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Fault, FaultProxy

from fedmentor_core.config import StorageConfig
from fedmentor_core.errors import LedgerError
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.ledger import Ledger
from fedmentor_core.privacy.verified_prefix import VerifiedPrefix
from fedmentor_core.storage.base import ArtifactStore, open_store
from fedmentor_core.storage.encrypted import EncryptedStore, KeyRing
from fedmentor_core.storage.envelope import Key
from fedmentor_core.storage.local import LocalStore

ACCOUNT = PrivacyAccount(epsilon=8.0, delta=1e-5, rdp_order=8.0, rdp_budget=6.0)


def charge(store: ArtifactStore, run_id: str, rounds: range, verified: VerifiedPrefix | None = None) -> None:
    for round_index in rounds:
        Ledger(store, "one", verified).charge(
            ACCOUNT,
            run_id=run_id,
            round_index=round_index,
            attempt=0,
            dataset_fingerprint="f" * 64,
            noise_multiplier=2.0,
            sample_rate=0.01,
            steps=2,
        )


def opened(store: ArtifactStore) -> ArtifactStore:
    Ledger(store, "one").open_account(ACCOUNT, run_id="run", dataset_fingerprint="f" * 64)
    return store


def charged(store: ArtifactStore) -> list[tuple[str, int]]:
    return [(one.run_id, one.round_index) for one in Ledger(store, "one").entries() if one.kind == "charge"]


@pytest.mark.parametrize("sealed", [False, True])
def test_lost_response_charges_once(
    flaky: Callable[..., ArtifactStore], proxy: FaultProxy, key_file: Path, sealed: bool
) -> None:
    plain = flaky()
    settings = StorageConfig(endpoint_url=proxy.url, encryption_key_file=str(key_file) if sealed else None)
    store = opened(open_store(f"{plain.url}/ledger", settings))
    proxy.clear()
    verified = VerifiedPrefix()
    faults = (Fault("lose", "PUT .*ledgers"), Fault("lose", "PUT .*ledgers", times=2), Fault("drop", "PUT .*ledgers"))
    for number, fault in enumerate(faults):
        proxy.inject(fault)
        charge(store, "run", range(number, number + 1), verified)
        assert Ledger(store, "one", verified).chain() == Ledger(store, "one").chain()
    assert not any(fault.times for fault in faults)
    assert charged(store) == [("run", 0), ("run", 1), ("run", 2)]


def test_racing_writers_with_lost_responses_charge_once_each(
    flaky: Callable[..., ArtifactStore], proxy: FaultProxy, bucket: str
) -> None:
    opened(flaky())
    settings = StorageConfig(endpoint_url=proxy.url)
    proxy.inject(*(Fault("lose", "PUT .*ledgers", times=1) for _ in range(4)))

    def write(run_id: str) -> Any:
        charge(open_store(f"s3://{bucket}/site-a", settings), run_id, range(3), VerifiedPrefix())

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ("a", "b")))
    found = charged(flaky())
    assert sorted(found) == [(run, i) for run in "ab" for i in range(3)]


@pytest.mark.parametrize("sealed", [False, True])
def test_remembered_part_is_not_read_again_until_somebody_replaces_it(
    bucket: str, s3_endpoint: str, raw: Any, key_file: Path, sealed: bool
) -> None:
    settings = StorageConfig(endpoint_url=s3_endpoint, encryption_key_file=str(key_file) if sealed else None)
    store, verified, prefix = open_store(f"s3://{bucket}/kept", settings), VerifiedPrefix(), "kept/ledgers/one"
    Ledger(store, "one", verified).open_account(ACCOUNT, run_id="run", dataset_fingerprint="f" * 64)
    charge(store, "run", range(3), verified)
    kept = raw.get_object(Bucket=bucket, Key=f"{prefix}/00000001.json")["Body"].read()
    reads: list[str] = []
    inner = store.inner if isinstance(store, EncryptedStore) else store
    read = inner._read
    inner._read = lambda key: (reads.append(key), read(key))[1]  # type: ignore[method-assign]
    Ledger(store, "one", verified).entries()
    reads.clear()
    Ledger(store, "one", verified).entries()
    assert reads == ["ledgers/one/00000003.json", "ledger-witnesses/one/00000003"]
    raw.put_object(Bucket=bucket, Key=f"{prefix}/00000001.json", Body=kept[:-2] + b" }")
    with pytest.raises(LedgerError, match="broken at entry 1"):
        Ledger(store, "one", verified).entries()


@pytest.mark.parametrize("kind", ["ledgers", "ledger-witnesses"])
def test_entry_changed_under_encryption_breaks_the_ledger(tmp_path: Path, kind: str) -> None:
    """The store itself notices; the account must fail closed all the same, as a ledger and not as a storage error."""
    store = EncryptedStore(LocalStore(tmp_path), KeyRing((Key(b"k" * 32),)))
    opened(store)
    path = sorted((tmp_path / kind / "one").iterdir())[-1]
    sealed = bytearray(path.read_bytes())
    sealed[-1] ^= 1
    path.write_bytes(sealed)
    with pytest.raises(LedgerError, match="broken at entry"):
        Ledger(store, "one").entries()
