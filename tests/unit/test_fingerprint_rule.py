"""No new budget for old posts: rows changed, files renamed, names changed; and what shared posts lose in all."""

import csv
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmentor_core import client_round
from fedmentor_core.client_round import run_client
from fedmentor_core.config_io import validate_config
from fedmentor_core.data import invented
from fedmentor_core.errors import BudgetError, LedgerError
from fedmentor_core.privacy.ledger import ledger_domains
from fedmentor_core.privacy.shared_posts import (
    Claim,
    Standing,
    claim_refusal,
    common_posts,
    join_account,
    key_identity,
    read_posts,
    register_posts,
    shortened,
    stored_shared_posts,
)
from fedmentor_core.records import ClientUpdate
from fedmentor_core.rounds import RoundState, assignments_for
from fedmentor_core.storage.local import LocalStore
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import Workspace

KEY = b"key"
Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("fedmentor_core.privacy.plan.epsilon_prv", lambda *_: 0.0)
    monkeypatch.delenv("FEDMENTOR_UNIT_KEY", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Site:
    """A site with CSV files and one lifetime ledger store, on which studies are begun one after another."""

    def __init__(self, study: dict, root: Path) -> None:
        self.study, self.root, self.begun = study, root, 0
        self.ledgers = LocalStore(root / "ledgers")

    def source(self, rows: Rows, file: str) -> dict[str, Any]:
        with (self.root / file).open("w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, ["post", "question", "response"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        columns = {"post": "post", "question": "question", "response": "response"}
        return {"kind": "csv", "path": str(self.root / file), "columns": columns}

    def begin(
        self, rows_of: dict[str, Rows], *, file: str = "posts", acknowledge: tuple[str, ...] = (), **sections: Any
    ) -> Workspace:
        """A new study on these domains."""
        self.begun += 1
        domains = [
            {"name": name, "source": self.source(rows, f"{file}-{name}.csv"), "epsilon": 8.0, "delta": 1e-5,
             "shares_posts_with": list(acknowledge)}
            for name, rows in rows_of.items()
        ]  # fmt: skip
        privacy = {"ledger_url": self.ledgers.url, "planned_runs": 10} | sections.pop("privacy", {})
        study = self.study | {"domains": domains, "privacy": privacy} | sections
        return Workspace(open_study(validate_config(study), self.root / f"out-{self.begun}"))

    def objects(self) -> dict[str, bytes]:
        """Everything in the ledgers' store."""
        return {key: self.ledgers.get_bytes(key) for key in self.ledgers.list_keys("")}


@pytest.fixture
def site(tiny_study: dict, tmp_path: Path) -> Site:
    return Site(tiny_study, tmp_path)


def posts(corpus: int, n: int, seed: int = 5) -> Rows:
    return list(invented.generate(list(invented.CORPORA)[corpus], n, seed))


def run_round(workspace: Workspace, position: int = 0) -> ClientUpdate:
    return run_client(workspace, assignments_for(workspace, RoundState.first(workspace))[position])


# --- the same name: the same budget ---------------------------------------------------------------------------------


def test_no_change_of_a_domains_data_buys_a_new_budget(site: Site) -> None:
    rows, more = posts(0, 80), posts(1, 12)
    told = run_round(site.begin({"one": rows}))
    assert told.status == "trained"
    shuffled = rows[:]
    random.Random(1).shuffle(shuffled)
    variants: dict[str, dict[str, Any]] = {
        "reordered": {"rows_of": {"one": shuffled}},
        "renamed": {"rows_of": {"one": rows}, "file": "other-file"},
        "added": {"rows_of": {"one": rows + more}},
        "dropped": {"rows_of": {"one": rows[:-8]}},
        "split": {"rows_of": {"one": rows}, "data": {"split_seed": 77}},
    }
    same = {}
    for name, changes in variants.items():
        workspace = site.begin(**changes)
        plan = workspace.make_plan().domains[0]
        assert plan.refusals == (), name
        assert plan.epsilon_spent_before == pytest.approx(told.epsilon_spent), name
        same[name] = plan.dataset_fingerprint == told_fingerprint(site)
    assert same == {"reordered": True, "renamed": True, "added": False, "dropped": False, "split": True}
    grown = site.begin(**variants["added"])
    again = run_round(grown)
    assert again.status == "trained"
    assert told.epsilon_spent is not None
    assert again.epsilon_spent is not None
    assert again.epsilon_spent > told.epsilon_spent
    assert ledger_domains(site.ledgers) == ["one"]
    entries = grown.ledger("one").entries()
    assert len({entry.dataset_fingerprint for entry in entries if entry.kind == "charge"}) == 2
    assert len(read_posts(site.ledgers)["one"]) == 2


def told_fingerprint(site: Site) -> str:
    return read_posts(site.ledgers)["one"][0].fingerprint


def test_posts_are_registered_before_the_first_charge_and_only_as_keyed_digests(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = posts(0, 60)
    workspace = site.begin({"one": rows})
    seen: list[int] = []

    def look(*_: Any, **__: Any) -> None:
        seen.append(len(read_posts(site.ledgers)["one"][0].posts))
        raise BudgetError("no")

    with monkeypatch.context() as patch:
        patch.setattr("fedmentor_core.privacy.ledger.Ledger.charge", look)
        assert run_round(workspace).status == "rested"
    data = workspace.data["one"]
    assert seen == [len(set(data.train["unit_id"]))]
    (stored,) = read_posts(site.ledgers)["one"]
    assert set(stored.posts) == shortened(data.unit_digests(("train",)))  # the unit is the post
    assert all(len(post) == 16 for post in stored.posts)
    blob = b"".join(site.objects().values()).decode()
    assert not any(word in blob for row in rows for word in (row["post"][:20], row["response"][:20]))


# --- another name ---------------------------------------------------------------------------------------------------


def test_same_posts_under_another_name_are_refused_and_nothing_is_written(site: Site) -> None:
    rows = posts(0, 80)
    assert run_round(site.begin({"one": rows})).status == "trained"
    before = site.objects()
    shuffled = rows[:]
    random.Random(1).shuffle(shuffled)
    edited = [{**row, "post": row["post"].upper()} for row in rows]
    diluted = shuffled[:6] + posts(1, 74)
    for disguise in (rows, shuffled, edited, diluted):
        workspace = site.begin({"two": disguise}, file="disguise")
        made = workspace.make_plan()
        (refusal,) = made.refusals
        assert "account 'one'" in refusal
        assert "% of its posts" in refusal
        assert "shares_posts_with" in refusal
        assert "a new name buys no new budget" in refusal
        assert made.domains[0].rdp_order is None
        with pytest.raises(BudgetError) as refused:
            workspace.preflight()
        assert refused.value.exit_code == 3
        assert site.objects() == before
    mixed = site.begin({"two": rows, "three": posts(2, 60)})  # the others go on, the site of 'two' rests
    assert run_round(mixed).status == "rested"
    assert site.objects() == before
    assert run_round(mixed, 1).status == "trained"
    assert ledger_domains(site.ledgers) == ["one", "three"]


def test_rows_added_to_an_open_account_are_held_to_the_same_rule(site: Site) -> None:
    """An account opened with harmless rows is no back door."""
    rows = posts(0, 80)
    assert run_round(site.begin({"one": rows})).status == "trained"
    assert run_round(site.begin({"two": posts(1, 60)})).status == "trained"
    (refusal,) = site.begin({"two": posts(1, 60) + rows}).make_plan().refusals
    assert "account 'one'" in refusal


def test_acknowledged_account_may_share_and_its_loss_adds_up(site: Site) -> None:
    rows = posts(0, 80)
    first = run_round(site.begin({"one": rows}))
    workspace = site.begin({"two": rows}, acknowledge=("one",))
    plan = workspace.plan
    assert plan.refusals == ()
    (shared,) = plan.shared_posts
    assert shared.accounts == ("one", "two")
    assert shared.n_posts == plan.domains[0].n_units
    assert shared.epsilon_spent == pytest.approx(first.epsilon_spent)
    assert (shared.epsilon_budget, shared.delta) == (16.0, pytest.approx(2e-5))
    second = run_round(workspace)
    assert second.status == "trained"
    (stored,) = stored_shared_posts(site.ledgers)
    assert first.epsilon_spent is not None
    assert second.epsilon_spent is not None
    assert stored.epsilon_spent == pytest.approx(first.epsilon_spent + second.epsilon_spent)
    assert stored.n_posts == shared.n_posts
    # Who was there first goes on without naming the other, and is told of it.
    first_again = site.begin({"one": rows}).make_plan()
    assert first_again.refusals == ()
    assert first_again.shared_posts[0].accounts == ("one", "two")


def test_domains_of_one_study_share_and_the_study_may_bound_what_that_costs(site: Site) -> None:
    rows, others = posts(0, 80), posts(1, 60)
    rows_of = {"one": rows, "two": rows[:50] + others, "three": posts(2, 60)}
    workspace = site.begin(rows_of)
    made = workspace.plan
    assert made.refusals == ()
    (shared,) = made.shared_posts  # found from the data at hand: nothing is stored yet
    assert shared.accounts == ("one", "two")
    train = {name: set(workspace.data[name].unit_digests(("train",))) for name in rows_of}
    assert shared.n_posts == len(train["one"] & train["two"])
    assert (shared.epsilon_spent, shared.epsilon_budget) == (0.0, 16.0)
    assert run_round(workspace, 0).status == run_round(workspace, 1).status == "trained"
    assert stored_shared_posts(site.ledgers)[0].n_posts == shared.n_posts

    bounded = site.begin(rows_of, privacy={"max_composed_epsilon": 15.9})
    assert all(domain.refusals for domain in bounded.make_plan().domains)
    assert len(bounded.make_plan().refusals) == 1
    with pytest.raises(BudgetError, match="max_composed_epsilon allows"):
        bounded.preflight()
    assert site.begin(rows_of, privacy={"max_composed_epsilon": 16.0}).make_plan().refusals == ()


# --- what cannot be compared ----------------------------------------------------------------------------------------


def test_digests_under_another_key_stop_training(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_round(site.begin({"one": posts(0, 60)})).status == "trained"
    before = site.objects()
    monkeypatch.setenv("FEDMENTOR_UNIT_KEY", "another")
    workspace = site.begin({"two": posts(0, 60)})
    with pytest.raises(LedgerError, match="another key") as refused:
        workspace.make_plan()
    assert refused.value.exit_code == 3
    assert "another" not in str(refused.value).replace("another key", "")
    assert site.objects() == before
    monkeypatch.delenv("FEDMENTOR_UNIT_KEY")
    assert "account 'one'" in workspace.make_plan().refusals[0]  # with the right key back, the rule bites again


def test_changed_or_torn_post_digests_stop_training(site: Site) -> None:
    assert run_round(site.begin({"one": posts(0, 60)})).status == "trained"
    (path,) = (site.root / "ledgers" / "ledger-posts" / "one").rglob("*.json")
    whole = path.read_bytes()
    for bad in (whole[:-9], whole.replace(b'"posts":["', b'"posts":["0'), b"", b"{}"):
        path.write_bytes(bad)
        with pytest.raises(LedgerError, match="changed or torn"):
            site.begin({"one": posts(0, 60)}).make_plan()
    path.write_bytes(whole)
    path.rename(path.with_name("0" * 64 + ".json"))
    with pytest.raises(LedgerError, match="changed or torn"):
        site.begin({"one": posts(0, 60)}).make_plan()


def test_account_whose_digests_are_missing_is_held_to_share_everything(site: Site) -> None:
    assert run_round(site.begin({"one": posts(0, 60)})).status == "trained"
    (path,) = (site.root / "ledgers" / "ledger-posts" / "one").rglob("*.json")
    path.unlink()
    assert "digests are not stored" in site.begin({"two": posts(1, 60)}).make_plan().refusals[0]
    assert site.begin({"two": posts(1, 60)}, acknowledge=("one",)).make_plan().refusals == ()
    assert run_round(site.begin({"one": posts(0, 60)})).status == "trained"  # its own posts, stored again
    assert site.begin({"two": posts(1, 60)}).make_plan().refusals == ()


# --- the parts ------------------------------------------------------------------------------------------------------


def claim(account: str, names: range, fingerprint: str = "f" * 64) -> Claim:
    return Claim(account, fingerprint, shortened(f"{name:032x}"[::-1] for name in names))


def test_largest_unacknowledged_overlap_is_one_percent_of_the_smaller_side(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    register_posts(store, "old", "e" * 64, KEY, claim("old", range(1000)).posts)

    def refusal(names: range, siblings: tuple[str, ...] = (), acknowledged: tuple[str, ...] = ()) -> str | None:
        return claim_refusal(store, KEY, claim("new", names), siblings=siblings, acknowledged=acknowledged)

    assert refusal(range(990, 2000)) is None
    assert "1% of its posts" in str(refusal(range(989, 2000)))
    assert refusal(range(995, 1500)) is None
    assert refusal(range(994, 1500)) is not None  # 6 of 506
    assert refusal(range(990, 100_000)) is None
    assert refusal(range(989, 100_000)) is not None  # drowned among others, yet more than 1 % of the old account
    assert refusal(range(1000), siblings=("old",)) is None
    assert refusal(range(1000), acknowledged=("old",)) is None


def test_private_sets_go_by_the_name_of_their_domain(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    register_posts(store, "old.gate", "e" * 64, KEY, claim("old.gate", range(100)).posts)
    asked = claim("new.gate", range(100))
    assert "'old.gate'" in str(claim_refusal(store, KEY, asked, siblings=(), acknowledged=()))
    assert claim_refusal(store, KEY, asked, siblings=(), acknowledged=("old",)) is None


def test_two_studies_that_bring_the_same_posts_at_once_are_both_refused(tmp_path: Path) -> None:
    """Each planned while the store was empty; whoever comes to the charge finds the other's posts, also on a retry."""
    store = LocalStore(tmp_path)
    register_posts(store, "a", "f" * 64, KEY, claim("a", range(50)).posts)
    register_posts(store, "b", "f" * 64, KEY, claim("b", range(50)).posts)
    for _ in range(2):
        for name, other in (("a", "b"), ("b", "a")):
            with pytest.raises(BudgetError, match=f"account '{other}'"):
                join_account(store, KEY, claim(name, range(50)), siblings=(), acknowledged=())
    join_account(store, KEY, claim("b", range(50)), siblings=(), acknowledged=("a",))


def test_late_overlap_is_refused_at_the_site_before_any_charge(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = posts(0, 60)
    early, late = site.begin({"one": rows}), site.begin({"two": rows})
    assert early.plan.refusals == late.plan.refusals == ()  # both planned on an empty store
    assert run_round(early).status == "trained"
    monkeypatch.setattr(client_round, "train_locally", None)
    update = run_round(late)
    assert update.status == "rested"
    assert "account 'one'" in update.reason
    assert [entry.kind for entry in late.ledger("two").entries()] == ["plan", "refusal"]


def test_registering_twice_is_one_set_and_another_key_never_mixes_in(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for _ in range(2):
        register_posts(store, "a", "f" * 64, KEY, ["1" * 32, "2" * 32, "1" * 32])
    (stored,) = read_posts(store, KEY)["a"]
    assert stored.posts == ("1" * 16, "2" * 16)
    assert stored.key_identity == key_identity(KEY) != key_identity(b"other")
    with pytest.raises(LedgerError, match="another key"):
        join_account(store, b"other", claim("b", range(3)), siblings=(), acknowledged=())
    assert set(read_posts(store)) == {"a"}


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from("abcd"), st.frozensets(st.integers(0, 12).map(str)), min_size=1))
def test_common_posts_count_every_shared_post_once_under_exactly_its_holders(held: dict[str, frozenset[str]]) -> None:
    standings = {name: Standing(ord(name) - 96.0, 10.0 * (ord(name) - 96), 1e-6) for name in held}
    found = common_posts(held, standings)
    expected: dict[tuple[str, ...], int] = {}
    for post in set().union(*held.values()):
        holders = tuple(sorted(name for name in held if post in held[name]))
        if len(holders) > 1:
            expected[holders] = expected.get(holders, 0) + 1
    assert {one.accounts: one.n_posts for one in found} == expected
    for one in found:
        assert one.epsilon_spent == sum(ord(name) - 96 for name in one.accounts)
        assert one.epsilon_budget == 10 * one.epsilon_spent
        assert one.delta == pytest.approx(1e-6 * len(one.accounts))
