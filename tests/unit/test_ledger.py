"""The ledger: what was charged stays charged, and whoever touches it is found out."""

import json
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fedmentor_core.errors import BudgetError, LedgerError
from fedmentor_core.hashing import canonical_json, sha256_bytes
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.ledger import Ledger, Terms, ledger_domains
from fedmentor_core.storage.local import LocalStore

ORDER, NOISE, RATE, STEPS = 8.0, 1.0, 0.1, 4
COST = PrivacyAccount(1, 1e-5, ORDER, 1.0).charge_of(NOISE, RATE, STEPS)


def account_for(charges: float) -> PrivacyAccount:
    """A promise that carries this many of the standard charges."""
    rdp_budget = charges * COST
    loose = PrivacyAccount(1.0, 1e-5, ORDER, rdp_budget)
    return PrivacyAccount(loose.epsilon_spent(rdp_budget), 1e-5, ORDER, rdp_budget)


ACCOUNT = account_for(10.5)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def open_ledger(root: Path, account: PrivacyAccount = ACCOUNT) -> Ledger:
    ledger = Ledger(LocalStore(root), "one")
    ledger.open_account(account, run_id="run", dataset_fingerprint="f" * 64)
    return ledger


def charge(
    ledger: Ledger,
    round_index: int = 0,
    *,
    account: PrivacyAccount = ACCOUNT,
    noise: float = NOISE,
    run_id: str = "run",
    **more: Any,
) -> None:
    ledger.charge(
        account,
        run_id=run_id,
        round_index=round_index,
        attempt=ledger.next_attempt(run_id, round_index),
        dataset_fingerprint="f" * 64,
        noise_multiplier=noise,
        sample_rate=RATE,
        steps=STEPS,
        **more,
    )


def entry_file(root: Path, sequence: int) -> Path:
    return root / "ledgers" / "one" / f"{sequence:08d}.json"


def filled(root: Path) -> Ledger:
    """plan, charge 0, release 0, charge 1."""
    ledger = open_ledger(root)
    charge(ledger, 0)
    ledger.release(ACCOUNT, run_id="run", round_index=0, attempt=0, digest="d" * 64, dataset_fingerprint="f" * 64)
    charge(ledger, 1)
    return ledger


def assert_fails_closed(root: Path) -> None:
    ledger = Ledger(LocalStore(root), "one")
    before = sorted((root / "ledgers").rglob("*.json"))
    with pytest.raises(LedgerError):
        ledger.entries()
    with pytest.raises(LedgerError):
        charge(ledger, 2)
    with pytest.raises(LedgerError):
        ledger.spent_rdp()
    assert sorted((root / "ledgers").rglob("*.json")) == before


def rewrite(path: Path, **changes: object) -> None:
    """Change fields, keeping the canonical form."""
    path.write_bytes(canonical_json(json.loads(path.read_bytes()) | changes))


def test_entries_are_chained_and_tell_what_they_are_for(root: Path) -> None:
    entries = filled(root).entries()
    assert [entry.kind for entry in entries] == ["plan", "charge", "release", "charge"]
    assert [entry.sequence for entry in entries] == [0, 1, 2, 3]
    for sequence in range(1, 4):
        assert entries[sequence].previous == sha256_bytes(entry_file(root, sequence - 1).read_bytes())
    assert entries[0].previous == ""
    assert (entries[1].noise_multiplier, entries[1].sample_rate, entries[1].steps) == (NOISE, RATE, STEPS)
    assert entries[2].digest == "d" * 64
    assert ledger_domains(LocalStore(root)) == ["one"]


def test_spent_budget_survives_reopening(root: Path) -> None:
    filled(root)
    reopened = Ledger(LocalStore(root), "one")
    assert reopened.spent_rdp() == pytest.approx(2 * COST)
    assert reopened.account() == ACCOUNT
    view = reopened.view()
    assert view.epsilon_spent == ACCOUNT.epsilon_spent(2 * COST)
    assert view.epsilon_budget == ACCOUNT.epsilon
    assert [e["sha256"] for e in view.entries[:-1]] == [e["previous"] for e in view.entries[1:]]
    assert Ledger(LocalStore(root), "two").view().entries == ()


@pytest.mark.parametrize("sequence", [0, 1, 2, 3])
def test_tampered_entry_is_detected_wherever_it_is(root: Path, sequence: int) -> None:
    filled(root)
    rewrite(entry_file(root, sequence), created_at="2020-01-01T00:00:00.000+00:00")
    assert_fails_closed(root)


def test_lowered_last_charge_is_detected(root: Path) -> None:
    filled(root)
    rewrite(entry_file(root, 3), rdp_charge=0.0)
    assert_fails_closed(root)


@pytest.mark.parametrize("sequence", [0, 1, 2, 3])
def test_torn_entry_is_detected(root: Path, sequence: int) -> None:
    filled(root)
    path = entry_file(root, sequence)
    for torn in (path.read_bytes()[:-20], b""):
        path.write_bytes(torn)
        assert_fails_closed(root)


@pytest.mark.parametrize("sequence", [0, 1, 2, 3])
def test_deleted_entry_is_detected_even_the_last(root: Path, sequence: int) -> None:
    filled(root)
    entry_file(root, sequence).unlink()
    assert_fails_closed(root)


def test_deleted_account_is_detected(root: Path) -> None:
    filled(root)
    for path in (root / "ledgers" / "one").iterdir():
        path.unlink()
    assert_fails_closed(root)


def test_reordered_entries_are_detected(root: Path) -> None:
    filled(root)
    first, second = entry_file(root, 1), entry_file(root, 3)
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    assert_fails_closed(root)


def test_renamed_entry_is_detected(root: Path) -> None:
    filled(root)
    entry_file(root, 3).rename(entry_file(root, 4))
    assert_fails_closed(root)


def test_foreign_file_is_detected(root: Path) -> None:
    filled(root)
    (root / "ledgers" / "one" / "notes.txt").write_text("hello")
    assert_fails_closed(root)


def test_another_domains_account_is_not_ours(root: Path) -> None:
    filled(root)
    (root / "ledgers" / "one").rename(root / "ledgers" / "two")
    with pytest.raises(LedgerError):
        Ledger(LocalStore(root), "two").entries()


@pytest.mark.parametrize("sequence", [1, 3])
def test_entry_whose_bytes_are_not_canonical_is_detected_even_when_it_was_witnessed(root: Path, sequence: int) -> None:
    filled(root)
    path = entry_file(root, sequence)
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=1))
    (root / "ledger-witnesses" / "one" / path.stem).write_text(sha256_bytes(path.read_bytes()))
    assert_fails_closed(root)


def test_account_that_undercharges_is_not_charged_further(root: Path) -> None:
    """Even where somebody made the chain anew around a charge that was too low."""
    filled(root)
    rewrite(entry_file(root, 3), rdp_charge=COST / 2)
    witness = root / "ledger-witnesses" / "one" / "00000003"
    witness.write_text(sha256_bytes(entry_file(root, 3).read_bytes()))
    ledger = Ledger(LocalStore(root), "one")
    with pytest.raises(LedgerError, match="less than its steps cost"):
        charge(ledger, 2)


def test_account_survives_a_death_between_entry_and_witness(root: Path) -> None:
    ledger = filled(root)
    (root / "ledger-witnesses" / "one" / "00000003").unlink()
    charge(ledger, 2)
    assert ledger.spent_rdp() == pytest.approx(3 * COST)


def test_charge_beyond_the_budget_is_refused_and_recorded(root: Path) -> None:
    ledger = open_ledger(root)
    with pytest.raises(BudgetError, match="Nothing was trained or released"):
        charge(ledger, noise=0.3)
    with pytest.raises(BudgetError):
        charge(ledger, noise=0.0)
    entries = ledger.entries()
    assert [entry.kind for entry in entries] == ["plan", "refusal", "refusal"]
    assert ledger.spent_rdp() == 0
    charge(ledger)
    assert ledger.spent_rdp() == pytest.approx(COST)


def test_many_charges_stay_under_the_budget(root: Path) -> None:
    ledger = open_ledger(root)
    admitted = 0
    for round_index in range(14):
        try:
            charge(ledger, round_index)
            admitted += 1
        except BudgetError:
            pass
    assert admitted == 10  # the budget carries 10.5
    assert ledger.spent_rdp() <= ACCOUNT.rdp_budget
    assert ledger.view().epsilon_spent <= ACCOUNT.epsilon


def test_promise_holds_for_life(root: Path) -> None:
    ledger = open_ledger(root)
    assert ledger.open_account(ACCOUNT, run_id="second", dataset_fingerprint="e" * 64) == ACCOUNT
    same_epsilon_other_order = PrivacyAccount(ACCOUNT.epsilon, ACCOUNT.delta, 3.0, 99.0)
    assert ledger.open_account(same_epsilon_other_order, run_id="s", dataset_fingerprint="") == ACCOUNT
    for other in (account_for(20), PrivacyAccount(ACCOUNT.epsilon, 1e-6, ORDER, ACCOUNT.rdp_budget)):
        with pytest.raises(BudgetError, match="for its lifetime"):
            ledger.open_account(other, run_id="second", dataset_fingerprint="")
    assert len(ledger.entries()) == 1


def test_charge_under_another_promise_is_refused(root: Path) -> None:
    ledger = open_ledger(root)
    with pytest.raises(LedgerError, match="another promise"):
        charge(ledger, account=account_for(1000))
    with pytest.raises(LedgerError, match="another promise"):
        charge(Ledger(LocalStore(root), "two"))
    assert ledger.spent_rdp() == 0


def test_attempts_are_counted_per_run_and_round(root: Path) -> None:
    ledger = filled(root)
    assert ledger.next_attempt("run", 0) == 1
    assert ledger.next_attempt("run", 5) == 0
    assert ledger.next_attempt("other", 0) == 0


def rechain(root: Path) -> None:
    """Make the chain and its witnesses anew around whatever the entries say."""
    previous = ""
    for path in sorted((root / "ledgers" / "one").glob("*.json")):
        rewrite(path, previous=previous)
        previous = sha256_bytes(path.read_bytes())
        (root / "ledger-witnesses" / "one" / path.stem).write_text(previous)


NEW_FIELDS = (
    "privacy_level", "privacy_unit", "sensitivity", "planned_runs", "policy_sha256", "seeded", "adapter_sha256",
)  # fmt: skip


def test_entries_of_an_older_version_stay_valid_and_in_force(root: Path) -> None:
    filled(root)
    for path in sorted((root / "ledgers" / "one").glob("*.json")):
        plain = json.loads(path.read_bytes())
        path.write_bytes(canonical_json({name: value for name, value in plain.items() if name not in NEW_FIELDS}))
    rechain(root)
    old = entry_file(root, 1).read_bytes()
    assert b"seeded" not in old
    ledger = Ledger(LocalStore(root), "one")
    assert ledger.account() == ACCOUNT
    assert ledger.spent_rdp() == pytest.approx(2 * COST)
    charge(ledger, 2)  # a new entry, with all fields, on top of the old ones
    assert ledger.spent_rdp() == pytest.approx(3 * COST)
    assert [e["sha256"] for e in ledger.view().entries[:-1]] == [e["previous"] for e in ledger.view().entries[1:]]
    assert entry_file(root, 1).read_bytes() == old
    rewrite(entry_file(root, 1), steps=STEPS - 1)
    assert_fails_closed(root)


@pytest.mark.parametrize(
    "changes",
    [{"unheard_of": 1}, {"steps": "4"}, {"kind": "gift"}, {"rdp_charge": None}],
    ids=str,
)
def test_entry_that_this_version_does_not_understand_is_refused_even_in_a_sound_chain(
    root: Path, changes: dict[str, object]
) -> None:
    filled(root)
    rewrite(entry_file(root, 3), **changes)
    rechain(root)
    assert_fails_closed(root)


@pytest.mark.parametrize("kind", ["charge", "evaluation"])
def test_undercharged_entries_of_both_kinds_stop_the_account(root: Path, kind: str) -> None:
    filled(root)
    rewrite(entry_file(root, 1), kind=kind)
    rechain(root)
    ledger = Ledger(LocalStore(root), "one")
    charge(ledger, 2)  # the full price, whichever of the two kinds paid it
    assert ledger.spent_rdp() == pytest.approx(3 * COST)
    rewrite(entry_file(root, 1), rdp_charge=COST * 0.99)
    rechain(root)
    with pytest.raises(LedgerError, match="less than its steps cost"):
        charge(ledger, 3)


def test_plan_entry_holds_everything_that_was_promised(root: Path) -> None:
    terms = Terms("unit", "patient_id", "high", 30, "p" * 64)
    ledger = Ledger(LocalStore(root), "one")
    ledger.open_account(ACCOUNT, run_id="run", dataset_fingerprint="f" * 64, terms=terms)
    stored = json.loads(entry_file(root, 0).read_bytes())
    assert {name: stored[name] for name in ("epsilon_budget", "delta", "rdp_order", "rdp_budget")} == {
        "epsilon_budget": ACCOUNT.epsilon,
        "delta": ACCOUNT.delta,
        "rdp_order": ORDER,
        "rdp_budget": ACCOUNT.rdp_budget,
    }
    assert (stored["privacy_level"], stored["privacy_unit"], stored["sensitivity"]) == ("unit", "patient_id", "high")
    assert (stored["planned_runs"], stored["policy_sha256"]) == (30, "p" * 64)


def test_changed_terms_are_recorded_and_never_change_the_promise(root: Path) -> None:
    ledger = Ledger(LocalStore(root), "one")

    def opened(terms: Terms | None) -> PrivacyAccount:
        return ledger.open_account(ACCOUNT, run_id="run", dataset_fingerprint="f" * 64, terms=terms)

    for terms in (Terms(privacy_unit="post"), Terms(privacy_unit="post"), None):
        assert opened(terms) == ACCOUNT
    assert len(ledger.entries()) == 1
    for planned_runs in (30, 30, 10):
        assert opened(Terms(privacy_unit="post", planned_runs=planned_runs)) == ACCOUNT
    assert [(entry.kind, entry.planned_runs) for entry in ledger.entries()] == [("plan", 1), ("plan", 30), ("plan", 10)]
    assert ledger.account() == ACCOUNT
    for other in (Terms(privacy_level="client", privacy_unit="post"), Terms(privacy_unit="patient")):
        with pytest.raises(BudgetError, match="one budget cannot speak of both"):
            opened(other)
        assert ledger.terms_refusal(other) is not None
    assert ledger.terms_refusal(Terms(privacy_unit="post", planned_runs=5)) is None
    assert len(ledger.entries()) == 3


@pytest.mark.parametrize(("opened", "asked"), [("unit", "client"), ("client", "unit")])
def test_account_of_one_level_is_never_charged_at_the_other(root: Path, opened: str, asked: str) -> None:
    ledger = Ledger(LocalStore(root), "one")
    terms = Terms(privacy_level=opened)  # type: ignore[arg-type]
    ledger.open_account(ACCOUNT, run_id="run", dataset_fingerprint="f" * 64, terms=terms)
    with pytest.raises(BudgetError, match=f"opened for level '{opened}'"):
        charge(ledger, privacy_level=asked)
    assert [entry.kind for entry in ledger.entries()] == ["plan", "refusal"]
    charge(ledger, privacy_level=opened)
    assert ledger.spent_rdp() == pytest.approx(COST)
    assert ledger.entries()[-1].privacy_level == opened


def test_charge_beyond_the_runs_share_is_refused_and_says_that_it_is_the_share(root: Path) -> None:
    ledger = open_ledger(root)
    share = 2.5 * COST
    charge(ledger, 0, run_rdp_share=share)
    charge(ledger, 1, run_rdp_share=share)
    with pytest.raises(BudgetError, match="tonight's share") as refused:
        charge(ledger, 2, run_rdp_share=share)
    assert "the rest is kept for later runs" in str(refused.value)
    assert ledger.entries()[-1].kind == "refusal"
    assert ledger.entries()[-1].reason == str(refused.value)
    assert ledger.spent_rdp() == pytest.approx(2 * COST)
    charge(ledger, 2, run_id="later", run_rdp_share=share)  # a later run has its own
    with pytest.raises(BudgetError, match="tonight's share"):
        charge(ledger, 3, run_rdp_share=float("nan"))
    with pytest.raises(BudgetError, match="lifetime epsilon"):
        charge(ledger, 3, noise=0.2, run_rdp_share=share)


def charge_within_share(root: str, writer: int, tries: int) -> int:
    """Charge as often as the share admits; how often that was."""
    ledger, admitted = Ledger(LocalStore(Path(root)), "one"), 0
    for attempt in range(tries):
        try:
            charge(ledger, 10 * writer + attempt, run_rdp_share=4.5 * COST)
            admitted += 1
        except BudgetError:
            pass
    return admitted


def test_concurrent_writers_never_pass_the_share_together(root: Path) -> None:
    open_ledger(root)
    with ThreadPoolExecutor(4) as pool:
        admitted = list(pool.map(lambda writer: charge_within_share(str(root), writer, 3), range(4)))
    entries = Ledger(LocalStore(root), "one").entries()
    assert [entry.kind for entry in entries].count("charge") == sum(admitted) == 4
    assert [entry.kind for entry in entries].count("refusal") == 12 - 4
    assert Ledger(LocalStore(root), "one").spent_rdp() <= 4.5 * COST


def test_charge_is_decided_again_after_a_lost_race(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other writer's charge lands between this one's look and its write: it must count."""
    ledger, other = open_ledger(root), Ledger(LocalStore(root), "one")
    raced = []

    def late(store: LocalStore, key: str, data: bytes) -> None:
        if key.startswith("ledgers/") and not raced:
            raced.append(key)
            charge(other, 1, run_rdp_share=1.5 * COST)
        put(store, key, data)

    put = LocalStore.put_bytes
    monkeypatch.setattr(LocalStore, "put_bytes", late)
    with pytest.raises(BudgetError, match="tonight's share"):
        charge(ledger, 0, run_rdp_share=1.5 * COST)
    assert raced == ["ledgers/one/00000001.json"]
    assert [(entry.kind, entry.round_index) for entry in ledger.entries()[1:]] == [("charge", 1), ("refusal", 0)]


def spend_all(root: str, writer: int, tries: int) -> int:
    """Charge as often as it is admitted; how often that was."""
    ledger = Ledger(LocalStore(Path(root)), "one")
    ledger.open_account(ACCOUNT, run_id=f"writer-{writer}", dataset_fingerprint="f" * 64)
    admitted = 0
    for attempt in range(tries):
        try:
            ledger.charge(
                ACCOUNT,
                run_id=f"writer-{writer}",
                round_index=0,
                attempt=attempt,
                dataset_fingerprint="f" * 64,
                noise_multiplier=NOISE,
                sample_rate=RATE,
                steps=STEPS,
            )
            admitted += 1
        except BudgetError:
            pass
    return admitted


def assert_nothing_lost_or_doubled(root: Path, admitted: list[int], tries: int) -> None:
    entries = Ledger(LocalStore(root), "one").entries()
    charges = [(entry.run_id, entry.attempt) for entry in entries if entry.kind == "charge"]
    refusals = [entry for entry in entries if entry.kind == "refusal"]
    assert len(charges) == len(set(charges)) == sum(admitted) == 10
    assert len(refusals) == tries * len(admitted) - 10
    assert [entry.kind for entry in entries].count("plan") >= 1
    assert Ledger(LocalStore(root), "one").spent_rdp() <= ACCOUNT.rdp_budget


def test_threads_never_lose_double_or_overrun(root: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        admitted = list(pool.map(lambda writer: spend_all(str(root), writer, 3), range(6)))
    assert_nothing_lost_or_doubled(root, admitted, 3)


@pytest.mark.slow
def test_processes_never_lose_double_or_overrun(root: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        admitted = pool.starmap(spend_all, [(str(root), writer, 7) for writer in range(2)])
    assert_nothing_lost_or_doubled(root, admitted, 7)
