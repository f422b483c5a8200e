"""What the ledger tells: promise, spent, left for tonight; a broken chain by name, with the others still shown."""

import json
import math
from pathlib import Path
from typing import Any

import dp_accounting
import pytest

from fedmentor_core.errors import BudgetError
from fedmentor_core.hashing import canonical_json
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.ledger import Ledger, Terms
from fedmentor_core.privacy.ledger_report import read_ledgers
from fedmentor_core.privacy.ledger_view import Tonight
from fedmentor_core.privacy.shared_posts import register_posts
from fedmentor_core.storage.local import LocalStore
from flows import cli

RATE, STEPS, NIGHTS = 0.02, 6, 30
ACCOUNT = PrivacyAccount.open(6.0, 1e-5, RATE, 3 * STEPS * NIGHTS)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def opened(store: LocalStore, name: str = "one", **terms: Any) -> Ledger:
    ledger = Ledger(store, name)
    told = Terms(privacy_unit="post", sensitivity="medium", planned_runs=NIGHTS)
    ledger.open_account(
        ACCOUNT, run_id="night-0", dataset_fingerprint="f" * 64, terms=Terms(**{**_plain(told), **terms})
    )
    return ledger


def _plain(terms: Terms) -> dict[str, Any]:
    return {name: getattr(terms, name) for name in Terms.__slots__}


def night(ledger: Ledger, number: int, *, noise: float, rounds: int = 3, retries: int = 0, **more: Any) -> None:
    """One run's charges."""
    for round_index in range(rounds):
        for attempt in range(1 + (retries if round_index == 0 else 0)):
            ledger.charge(
                ACCOUNT, run_id=f"night-{number}", round_index=round_index, attempt=attempt,
                dataset_fingerprint="f" * 64, noise_multiplier=noise, sample_rate=RATE, steps=STEPS, **more,
            )  # fmt: skip


def tonight(ledger: Ledger) -> Tonight:
    found = ledger.view().tonight
    assert found is not None
    return found


def rdp_elsewhere(noise: float, steps: int) -> float:
    accountant = dp_accounting.rdp.RdpAccountant([ACCOUNT.rdp_order])
    accountant.compose(dp_accounting.PoissonSampledDpEvent(RATE, dp_accounting.GaussianDpEvent(noise)), steps)
    return float(accountant._rdp[0])


def epsilon_elsewhere(rho: float) -> float:
    order, delta = ACCOUNT.rdp_order, ACCOUNT.delta
    return rho - (math.log(delta) + math.log(order)) / (order - 1) + math.log((order - 1) / order)


def test_view_holds_the_promise_and_what_is_spent_and_left(store: LocalStore) -> None:
    ledger = opened(store)
    night(ledger, 0, noise=2.0)
    view = ledger.view()
    assert (view.epsilon_budget, view.delta, view.privacy_unit, view.sensitivity) == (6.0, 1e-5, "post", "medium")
    assert view.epsilon_spent == pytest.approx(epsilon_elsewhere(rdp_elsewhere(2.0, 18)), rel=1e-3)
    assert view.epsilon_left == pytest.approx(6.0 - view.epsilon_spent)
    assert view.private
    untouched = Ledger(store, "nobody").view()
    assert (untouched.tonight, untouched.epsilon_budget, untouched.epsilon_spent) == (None, None, 0.0)


def test_tonight_before_the_first_night_is_an_equal_share(store: LocalStore) -> None:
    found = tonight(opened(store))
    assert (found.planned_runs, found.runs_charged, found.last) == (NIGHTS, 0, None)
    assert (found.least_noise_multiplier, found.such_runs_left) == (None, None)
    assert found.rdp_share == pytest.approx(ACCOUNT.rdp_budget / NIGHTS)
    assert found.epsilon_after == pytest.approx(epsilon_elsewhere(ACCOUNT.rdp_budget / NIGHTS))


def test_tonight_after_some_nights_is_right_by_other_code_and_tight(store: LocalStore) -> None:
    ledger = opened(store)
    night(ledger, 0, noise=1.6)
    night(ledger, 1, noise=1.5, retries=2)
    found = tonight(ledger)
    spent = rdp_elsewhere(1.6, 18) + rdp_elsewhere(1.5, 30)
    left = ACCOUNT.rdp_budget - spent
    assert found.runs_charged == 2
    assert found.rdp_share == pytest.approx(left / 28, rel=1e-3)
    assert found.epsilon_after == pytest.approx(epsilon_elsewhere(spent + left / 28), rel=1e-3)
    assert found.epsilon_share == pytest.approx(left / 28, rel=1e-3)
    assert found.last is not None
    assert (found.last.run_id, found.last.noise_multiplier, found.last.sample_rate) == ("night-1", 1.5, RATE)
    assert (found.last.steps_per_round, found.last.rounds) == (STEPS, 3)  # retries are not part of the schedule
    least = found.least_noise_multiplier
    assert least is not None
    assert rdp_elsewhere(least, 18) <= found.rdp_share * (1 + 1e-3)
    assert rdp_elsewhere(least - 2e-3, 18) > found.rdp_share
    assert found.such_runs_left == int(left / rdp_elsewhere(1.5, 18))


def test_the_number_of_such_nights_is_the_number_that_the_ledger_admits(store: LocalStore) -> None:
    ledger = opened(store)
    night(ledger, 0, noise=0.7)
    promised = tonight(ledger).such_runs_left
    assert promised is not None
    assert 1 <= promised < NIGHTS
    for number in range(1, promised + 1):
        night(ledger, number, noise=0.7)
    assert tonight(ledger).such_runs_left == 0
    with pytest.raises(BudgetError):
        night(ledger, promised + 1, noise=0.7)


def test_every_night_at_its_least_noise_keeps_the_promise_to_the_last(store: LocalStore) -> None:
    ledger = opened(store, planned_runs=5)
    night(ledger, 0, noise=5.0)
    for number in range(1, 5):
        found = tonight(ledger)
        assert found.least_noise_multiplier is not None
        night(ledger, number, noise=found.least_noise_multiplier, run_rdp_share=found.rdp_share)
    view = ledger.view()
    assert view.epsilon_spent is not None
    assert 5.9 < view.epsilon_spent <= 6.0
    assert tonight(ledger).such_runs_left == 0


def test_run_after_the_last_planned_one_may_use_what_is_left(store: LocalStore) -> None:
    ledger = opened(store, planned_runs=1)
    night(ledger, 0, noise=3.0)
    found = tonight(ledger)
    assert found.epsilon_after == pytest.approx(6.0)


def test_seeded_noise_is_marked_for_good(store: LocalStore) -> None:
    ledger = opened(store)
    night(ledger, 0, noise=3.0, seeded=True)
    night(ledger, 1, noise=3.0)
    assert not ledger.view().private


# --- the command ----------------------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["fedmentor", "ledger", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), capsys.readouterr().out


def two_accounts(store: LocalStore) -> None:
    for name in ("one", "two"):
        ledger = opened(store, name)
        register_posts(store, name, "f" * 64, b"key", [f"{number:032d}"[::-1] for number in range(40)])
        night(ledger, 0, noise=3.0)


CONTRACT = {"domain", "dataset_fingerprint", "delta", "epsilon_budget", "epsilon_spent", "entries"}
ENTRY = {"kind", "run_id", "round_index", "attempt", "noise_multiplier", "sample_rate", "steps", "sha256", "previous"}


def test_command_shows_accounts_shared_posts_and_tonight(
    store: LocalStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two_accounts(store)
    code, shown = command(capsys, monkeypatch, "--store", store.url, "--json")
    told = json.loads(shown)
    assert code == 0
    assert told["verified"] is True
    assert told["problems"] == []
    assert [domain["domain"] for domain in told["domains"]] == ["one", "two"]
    for domain in told["domains"]:
        assert set(domain) >= CONTRACT
        assert domain["tonight"]["planned_runs"] == NIGHTS
        assert all(set(entry) >= ENTRY for entry in domain["entries"])
    (shared,) = told["shared_posts"]
    assert (shared["accounts"], shared["n_posts"], shared["epsilon_budget"]) == (["one", "two"], 40, 12.0)
    assert shared["epsilon_spent"] == pytest.approx(2 * told["domains"][0]["epsilon_spent"])

    code, text = command(capsys, monkeypatch, "--store", store.url)
    assert code == 0
    for words in ("epsilon 6 at delta 1.0e-05 for a post", "tonight: run 2 of 30 planned", "one, two", "needs noise"):
        assert words in text
    assert "NOT" not in text
    code, shown = command(capsys, monkeypatch, "--store", store.url, "--domain", "two", "--json")
    assert [domain["domain"] for domain in json.loads(shown)["domains"]] == ["two"]


def test_command_names_the_broken_entry_and_still_shows_the_other_account(
    store: LocalStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two_accounts(store)
    path = store.root / "ledgers" / "one" / "00000002.json"
    path.write_bytes(canonical_json(json.loads(path.read_bytes()) | {"steps": 1}))
    code, shown = command(capsys, monkeypatch, "--store", store.url, "--json")
    told = json.loads(shown)
    assert code == 3
    assert told["verified"] is False
    broken, sound = told["domains"]
    assert broken["verified"] is False
    assert "broken at entry 3" in broken["problem"]  # entry 2 was changed: the next does not follow from it
    assert (broken["epsilon_spent"], broken["entries"], broken["tonight"]) == (None, [], None)
    assert sound["verified"] is True
    assert sound["epsilon_spent"] > 0
    code, text = command(capsys, monkeypatch, "--store", store.url)
    assert code == 3
    assert "NOT VERIFIED" in text
    assert "broken at entry 3" in text
    assert "run 2 of 30 planned" in text


def test_command_says_not_private_for_seeded_noise(
    store: LocalStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    night(opened(store), 0, noise=3.0, seeded=True)
    code, text = command(capsys, monkeypatch, "--store", store.url)
    assert code == 0
    assert "NOT PRIVATE" in text


def test_posts_that_cannot_be_compared_are_a_problem_of_the_whole_store(store: LocalStore) -> None:
    two_accounts(store)
    register_posts(store, "three", "f" * 64, b"another key", ["0" * 32])
    found = read_ledgers(store)
    assert not found.verified
    assert all(view.verified for view in found.domains)
    assert "another key" in found.problems[0]
