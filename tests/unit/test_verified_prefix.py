"""A ledger that remembers what it verified: fewer readings, the same decisions, and what changed is noticed."""

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmentor_core.config_io import load_config
from fedmentor_core.errors import BudgetError, LedgerError, StorageError
from fedmentor_core.hashing import canonical_json, sha256_bytes
from fedmentor_core.lineage import head_of, stale_heads
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.ledger import Ledger, Terms
from fedmentor_core.privacy.ledger_report import read_ledgers
from fedmentor_core.privacy.verified_prefix import VerifiedPrefix
from fedmentor_core.storage.local import LocalStore
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import Workspace
from flows.outputs import ledger_views

ORDER, NOISE, RATE, STEPS = 8.0, 1.0, 0.1, 4
COST = PrivacyAccount(1, 1e-5, ORDER, 1.0).charge_of(NOISE, RATE, STEPS)
LOOSE = PrivacyAccount(1.0, 1e-5, ORDER, 10.5 * COST)
ACCOUNT = PrivacyAccount(LOOSE.epsilon_spent(LOOSE.rdp_budget), 1e-5, ORDER, LOOSE.rdp_budget)  # ten charges and a bit

QUICKSTART = Path(__file__).resolve().parents[2] / "infra" / "configs" / "quickstart.yaml"
_folders = itertools.count()


class WatchedStore(LocalStore):
    """A folder that notes which objects are read, and fails when it is told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: list[str] = []
        self.failure: str = ""

    def _read(self, key: str) -> tuple[bytes, str | None]:
        self.reads.append(key)
        return super()._read(key)

    def put_bytes(self, key: str, data: bytes) -> None:
        failure, self.failure = self.failure, ""
        if failure == "before":
            raise StorageError("the server is away.")
        super().put_bytes(key, data)
        if failure == "after":
            raise StorageError("no answer came.")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is cut here."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def opened(root: Path, verified: VerifiedPrefix | None = None) -> Ledger:
    ledger = Ledger(WatchedStore(root), "one", verified)
    ledger.open_account(ACCOUNT, run_id="run", dataset_fingerprint="f" * 64)
    return ledger


def charge(ledger: Ledger, *, noise: float = NOISE, run_id: str = "run", **more: Any) -> None:
    ledger.charge(
        ACCOUNT, run_id=run_id, round_index=0, attempt=ledger.next_attempt(run_id, 0), dataset_fingerprint="f" * 64,
        noise_multiplier=noise, sample_rate=RATE, steps=STEPS, **more,
    )  # fmt: skip


def remembering(root: Path, charges: int = 4) -> Ledger:
    """An account of one plan and some charges, all of it verified."""
    ledger = opened(root, VerifiedPrefix())
    for _ in range(charges):
        charge(ledger)
    ledger.entries()
    return ledger


def entry_file(root: Path, sequence: int) -> Path:
    return root / "ledgers" / "one" / f"{sequence:08d}.json"


def witness_file(root: Path, sequence: int) -> Path:
    return root / "ledger-witnesses" / "one" / f"{sequence:08d}"


def rewrite(root: Path, sequence: int) -> None:
    """Halve a charge, in canonical form."""
    path = entry_file(root, sequence)
    found = json.loads(path.read_bytes())
    path.write_bytes(canonical_json(found | {"rdp_charge": found["rdp_charge"] / 2, "reason": "rewritten"}))


def forge(root: Path, first: int) -> None:
    """Rewrite an entry, and make chain and witnesses anew from there on."""
    rewrite(root, first)
    previous = sha256_bytes(entry_file(root, first - 1).read_bytes()) if first else ""
    for path in sorted((root / "ledgers" / "one").iterdir())[first:]:
        path.write_bytes(canonical_json(json.loads(path.read_bytes()) | {"previous": previous}))
        previous = sha256_bytes(path.read_bytes())
        witness_file(root, int(path.stem)).write_text(previous)


def cut_off(root: Path, first: int) -> None:
    """Entries and witnesses from ``first`` on, as where an older copy was restored."""
    for path in sorted((root / "ledgers" / "one").iterdir())[first:]:
        path.unlink()
        witness_file(root, int(path.stem)).unlink(missing_ok=True)


# --- how much is read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("charges", [1, 9])
def test_an_operation_reads_what_is_new_whatever_the_accounts_age(root: Path, charges: int) -> None:
    ledger = remembering(root, charges)
    store = ledger._chain._store
    assert isinstance(store, WatchedStore)
    last = f"ledgers/one/{charges:08d}.json"
    for operation in (ledger.spent_rdp, ledger.view, lambda: ledger.next_attempt("run", 0)):
        store.reads.clear()
        operation()
        assert store.reads == [last, f"ledger-witnesses/one/{charges:08d}"]
    charge(Ledger(LocalStore(root), "one"), run_id="elsewhere", noise=5.0)
    store.reads.clear()
    ledger.entries()
    assert [key for key in store.reads if key.startswith("ledgers/")] == [last, f"ledgers/one/{charges + 1:08d}.json"]


def test_a_new_process_and_whoever_reports_reads_everything(root: Path) -> None:
    remembering(root)
    for verified in (VerifiedPrefix(), None):
        store = WatchedStore(root)
        Ledger(store, "one", verified).entries()
        assert [key for key in store.reads if key.startswith("ledgers/")] == [
            f"ledgers/one/{i:08d}.json" for i in range(5)
        ]


# --- what is noticed -------------------------------------------------------------------------------------------------


def assert_fails_closed(ledger: Ledger, root: Path) -> None:
    before = sorted(root.rglob("*"))
    for operation in (ledger.entries, ledger.spent_rdp, ledger.view, lambda: charge(ledger)):
        with pytest.raises(LedgerError, match="broken at entry"):
            operation()
    assert sorted(root.rglob("*")) == before


NOTICED: dict[str, Callable[[Path], object]] = {
    "older entry rewritten": lambda root: rewrite(root, 1),
    "first entry torn": lambda root: entry_file(root, 0).write_bytes(b"{}"),
    "older entry replaced by another": lambda root: shutil.copy2(entry_file(root, 1), entry_file(root, 2)),
    "last entry rewritten": lambda root: rewrite(root, 4),
    "last entry torn": lambda root: entry_file(root, 4).write_bytes(entry_file(root, 4).read_bytes()[:-9]),
    "last entry gone": lambda root: entry_file(root, 4).unlink(),
    "entry gone": lambda root: entry_file(root, 2).unlink(),
    "first entry gone": lambda root: entry_file(root, 0).unlink(),
    "entry renamed": lambda root: entry_file(root, 2).rename(entry_file(root, 7)),
    "foreign file": lambda root: (root / "ledgers" / "one" / "0000.tmp").write_text("x"),
    "account gone": lambda root: shutil.rmtree(root / "ledgers"),
    "witness changed": lambda root: witness_file(root, 4).write_text("0" * 64),
    "entries of another account": lambda root: shutil.copy(entry_file(root, 1), entry_file(root, 5)),
}
NOTICED_ONLY_BY_MEMORY: dict[str, Callable[[Path], object]] = {
    "older copy restored": lambda root: cut_off(root, 3),
    "account and witnesses gone": lambda root: cut_off(root, 0),
    "forged from the last entry": lambda root: forge(root, 4),
    "forged from the start": lambda root: forge(root, 0),
    "forged from the middle": lambda root: forge(root, 2),
}


@pytest.mark.parametrize("name", [*NOTICED, *NOTICED_ONLY_BY_MEMORY])
def test_tampering_is_noticed_and_the_true_store_is_accepted_again(root: Path, tmp_path: Path, name: str) -> None:
    ledger = remembering(root)
    true = ledger.chain()
    shutil.copytree(root, tmp_path / "copy")
    (NOTICED | NOTICED_ONLY_BY_MEMORY)[name](root)
    assert_fails_closed(ledger, root)
    if name in NOTICED_ONLY_BY_MEMORY:
        Ledger(LocalStore(root), "one").entries()
    shutil.rmtree(root)
    shutil.copytree(tmp_path / "copy", root)
    assert ledger.chain() == true
    charge(ledger)
    assert ledger.spent_rdp() == pytest.approx(5 * COST)


@pytest.mark.parametrize(("sequence", "entry"), itertools.product([5, 6], ["rewritten", "torn", "gone"]))
def test_what_others_added_is_verified_as_ever(root: Path, sequence: int, entry: str) -> None:
    ledger = remembering(root)
    other = Ledger(LocalStore(root), "one")
    charge(other)
    charge(other)
    path = entry_file(root, sequence)
    match entry:
        case "rewritten":
            rewrite(root, sequence)
        case "torn":
            path.write_bytes(b"")
        case _:
            path.unlink()
    assert_fails_closed(ledger, root)


def trust_no_metadata(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """A store that gives every object the same version, whatever happens to it."""
    monkeypatch.setattr(
        LocalStore, "list_versions", lambda store, prefix: ((key, version) for key in store.list_keys(prefix))
    )


@pytest.mark.parametrize("sequence", [0, 1, 3])
def test_what_the_store_itself_hides_changes_no_decision_here_and_stops_the_next_process(
    root: Path, monkeypatch: pytest.MonkeyPatch, sequence: int
) -> None:
    """The one thing that is noticed later than without memory; docs/ledger.md says so."""
    trust_no_metadata(monkeypatch, "always the same")
    ledger = remembering(root)
    rewrite(root, sequence)
    assert ledger.spent_rdp() == pytest.approx(4 * COST), "what was verified counts, not what is there now"
    charge(ledger)
    charge(ledger)
    assert ledger.spent_rdp() == pytest.approx(6 * COST)
    for verified in (VerifiedPrefix(), None):
        with pytest.raises(LedgerError, match="broken at entry"):
            Ledger(LocalStore(root), "one", verified).entries()
    assert not read_ledgers(LocalStore(root)).verified


def test_the_newest_entry_is_read_whatever_the_store_says(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trust_no_metadata(monkeypatch, "always the same")
    ledger = remembering(root)
    forge(root, 4)
    assert_fails_closed(ledger, root)


def test_a_store_without_versions_is_read_whole_each_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trust_no_metadata(monkeypatch, "")
    ledger = remembering(root)
    rewrite(root, 1)
    assert_fails_closed(ledger, root)


def test_copied_back_bytes_are_read_again_once(root: Path) -> None:
    ledger = remembering(root)
    store = ledger._chain._store
    assert isinstance(store, WatchedStore)
    path = entry_file(root, 1)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    for expected in (["ledgers/one/00000001.json", "ledgers/one/00000004.json"], ["ledgers/one/00000004.json"]):
        store.reads.clear()
        ledger.entries()
        assert [key for key in store.reads if key.startswith("ledgers/")] == expected


def test_memory_of_one_account_is_no_memory_of_another(root: Path) -> None:
    verified = VerifiedPrefix()
    opened(root, verified).entries()
    with pytest.raises(LedgerError, match="'two' is broken"):
        Ledger(LocalStore(root), "two", verified).entries()
    with pytest.raises(LedgerError, match="broken"):
        Ledger(LocalStore(root.parent / "elsewhere"), "one", verified).entries()


def test_readers_side_by_side_that_find_two_chains_are_told(root: Path) -> None:
    """One of them read before the store was exchanged, and remembers later."""
    first, second, verified = VerifiedPrefix(), VerifiedPrefix(), VerifiedPrefix()
    remembering(root)
    Ledger(LocalStore(root), "one", first).entries()
    forge(root, 2)
    Ledger(LocalStore(root), "one", second).entries()
    mine, theirs = first.entries, second.entries
    assert verified.advance(mine) is None
    assert verified.advance(mine[:3]) is None, "an older end of the same chain"
    assert verified.advance(theirs) == 4
    assert verified.advance(theirs[:3]) == 2
    assert verified.entries == mine


def test_those_who_answer_for_the_account_verify_it_from_its_first_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust_no_metadata(monkeypatch, "always the same")
    ref = open_study(load_config(QUICKSTART), tmp_path / "out")
    workspace = Workspace(ref)
    ledger = workspace.ledger("one")
    ledger.open_account(ACCOUNT, run_id="run", dataset_fingerprint="f" * 64)
    charge(ledger)
    charge(workspace.ledger("one"))
    head = head_of(workspace.ledger("one"))
    rewrite(tmp_path / "out" / "store", 1)
    assert workspace.ledger("one").spent_rdp() == pytest.approx(2 * COST), "the run goes on"
    for answer in (lambda: ledger_views(workspace), lambda: Workspace(ref).ledger("one").entries()):
        with pytest.raises(LedgerError, match="broken at entry 2"):
            answer()
    assert stale_heads(workspace.ledger_store, [head])


# --- other writers and failures -----------------------------------------------------------------------------------


def test_another_writers_charge_counts_even_between_look_and_write(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, other = remembering(root), Ledger(LocalStore(root), "one")
    put, raced = LocalStore.put_bytes, []

    def late(store: LocalStore, key: str, data: bytes) -> None:
        if key.startswith("ledgers/") and not raced:
            raced.append(key)
            charge(other)
        put(store, key, data)

    monkeypatch.setattr(LocalStore, "put_bytes", late)
    with pytest.raises(BudgetError, match="tonight's share"):
        charge(ledger, run_rdp_share=5.5 * COST)
    assert [entry.kind for entry in ledger.entries()[5:]] == ["charge", "refusal"]
    assert ledger.chain() == Ledger(LocalStore(root), "one").chain()


@pytest.mark.parametrize(("failure", "spent"), [("before", 4), ("after", 5)])
def test_after_a_failed_write_the_store_says_what_was_charged(root: Path, failure: str, spent: int) -> None:
    ledger = remembering(root)
    store = ledger._chain._store
    assert isinstance(store, WatchedStore)
    store.failure = failure
    with pytest.raises(LedgerError, match="cannot be written"):
        charge(ledger)
    assert ledger.spent_rdp() == pytest.approx(spent * COST)
    while ledger.spent_rdp() < 9.5 * COST:
        charge(ledger)
    with pytest.raises(BudgetError, match="lifetime epsilon"):
        charge(ledger)
    assert ledger.view() == Ledger(LocalStore(root), "one").view()


def test_threads_with_and_without_memory_never_lose_double_or_overrun(root: Path) -> None:
    opened(root)
    shared = VerifiedPrefix()

    def spend(writer: int) -> int:
        ledger = Ledger(LocalStore(root), "one", (shared, shared, shared, VerifiedPrefix(), None)[writer])
        admitted = 0
        for _ in range(3):
            try:
                charge(ledger, run_id=f"writer-{writer}")
                admitted += 1
            except BudgetError:
                pass
        return admitted

    with ThreadPoolExecutor(5) as pool:
        admitted = sum(pool.map(spend, range(5)))
    fresh = Ledger(LocalStore(root), "one").chain()
    kinds = [stored.entry.kind for stored in fresh]
    assert (kinds.count("charge"), kinds.count("refusal")) == (admitted, 15 - admitted) == (10, 5)
    assert Ledger(LocalStore(root), "one", shared).chain() == fresh


# --- any order of anything --------------------------------------------------------------------------------------

OPERATIONS = ("charge", "dear charge", "share", "release", "refusal", "terms", "read", "fails before", "fails after")
steps = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(OPERATIONS)), max_size=14)
any_example = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def four_ledgers(folder: Path) -> list[Ledger]:
    """Two that share a memory, one with its own, one without."""
    shared = VerifiedPrefix()
    return [opened(folder, verified) for verified in (shared, shared, VerifiedPrefix(), None)]


def act(ledger: Ledger, operation: str) -> None:
    """Carry it out; what is refused or fails is the operation's own business."""
    store = ledger._chain._store
    assert isinstance(store, WatchedStore)
    run_id = "a" if operation == "share" else "b"
    try:
        match operation:
            case "charge":
                charge(ledger, run_id=run_id)
            case "dear charge":
                charge(ledger, run_id=run_id, noise=0.6)
            case "share":
                charge(ledger, run_id=run_id, run_rdp_share=2.5 * COST)
            case "release":
                ledger.release(
                    ACCOUNT, run_id=run_id, round_index=0, attempt=0, digest="d" * 64, dataset_fingerprint="f" * 64
                )
            case "refusal":
                ledger.refuse(ACCOUNT, run_id=run_id, round_index=0, reason="policy")
            case "terms":
                terms = Terms(planned_runs=2 + len(ledger.entries()) % 3)
                ledger.open_account(ACCOUNT, run_id=run_id, dataset_fingerprint="f" * 64, terms=terms)
            case "read":
                ledger.entries()
            case _:
                store.failure = operation.removeprefix("fails ")
                charge(ledger, run_id=run_id)
    except (BudgetError, LedgerError) as error:
        if isinstance(error, LedgerError) and not operation.startswith("fails"):
            raise
    store.failure = ""


def said(ledger: Ledger) -> tuple[object, ...]:
    """Everything that a decision can rest on."""
    return (
        ledger.chain(), ledger.account(), ledger.spent_rdp(), ledger.spent_rdp_by("a"),
        ledger.next_attempt("b", 0), ledger.runs_charged(besides="a"), ledger.terms_refusal(Terms("client")),
    )  # fmt: skip


@any_example
@given(steps=steps)
def test_in_any_order_each_ledger_says_what_a_full_reading_says(
    tmp_path: Path, steps: Sequence[tuple[int, str]]
) -> None:
    folder = tmp_path / str(next(_folders))
    ledgers = four_ledgers(folder)
    for who, operation in steps:
        act(ledgers[who], operation)
        assert ledgers[who].chain() == Ledger(LocalStore(folder), "one").chain()
    told = said(Ledger(LocalStore(folder), "one"))
    assert all(said(ledger) == told for ledger in ledgers)
    assert ledgers[0].view() == Ledger(LocalStore(folder), "one").view()
    assert ledgers[0].spent_rdp() <= ACCOUNT.rdp_budget


@any_example
@given(steps=steps, data=st.data())
def test_after_any_tampering_a_ledger_fails_or_goes_by_the_true_chain(
    tmp_path: Path, steps: Sequence[tuple[int, str]], data: st.DataObject
) -> None:
    folder = tmp_path / str(next(_folders))
    ledgers = four_ledgers(folder)
    for who, operation in steps:
        act(ledgers[who], operation)
    true = Ledger(LocalStore(folder), "one").chain()
    remembered = [(one, len(one._chain._verified.entries)) for one in ledgers if one._chain._verified is not None]
    sequence = data.draw(st.integers(0, len(true) - 1))
    tampering = data.draw(st.sampled_from(["rewrite", "tear", "delete", "forge", "cut off"]))
    path, unwitnessed = entry_file(folder, sequence), not witness_file(folder, sequence).exists()
    match tampering:
        case "rewrite":
            rewrite(folder, sequence)
        case "tear":
            path.write_bytes(path.read_bytes()[: data.draw(st.integers(0, len(path.read_bytes()) - 1))])
        case "delete":
            path.unlink()
        case "forge":
            forge(folder, sequence)
        case _:
            cut_off(folder, sequence)
    for ledger, n_verified in remembered:
        try:
            found = ledger.chain()
        except LedgerError:
            continue
        beyond = sequence >= n_verified and (unwitnessed or tampering in ("forge", "cut off"))  # nobody can notice
        assert beyond or found == true, f"{tampering} of entry {sequence}, {n_verified} of {len(true)} verified"
