"""The filter against adversaries: whatever noise, rate and steps they ask for, the budget holds."""

import math
import random
from pathlib import Path

import dp_accounting
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmentor_core.errors import BudgetError
from fedmentor_core.privacy.accountant import epsilon_at_order, rdp_cap
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.ledger import Ledger
from fedmentor_core.storage.local import LocalStore

DELTA = 1e-5


def account_at(epsilon: float, order: float) -> PrivacyAccount:
    """A promise whose order was fixed, however well."""
    return PrivacyAccount(epsilon, DELTA, order, rdp_cap(epsilon, DELTA, order))


accounts = st.sampled_from([account_at(0.5, 24.0), account_at(2.0, 8.0), account_at(8.0, 4.0)])
wishes = st.tuples(
    st.one_of(st.just(0.0), st.floats(0.3, 6.0), st.just(math.inf)),
    st.one_of(st.just(0.0), st.just(1.0), st.floats(0.05, 0.8)),
    st.integers(-50, 300),
)


def independent_epsilon(account: PrivacyAccount, admitted: list[tuple[float, float, int]]) -> float:
    """What the admitted steps cost at the fixed order, by another library."""
    accountant = dp_accounting.rdp.RdpAccountant([account.rdp_order])
    for sigma, rate, steps in admitted:
        if rate > 0 and sigma < math.inf:
            event = dp_accounting.GaussianDpEvent(sigma)
            if rate < 1:
                event = dp_accounting.PoissonSampledDpEvent(rate, event)
            accountant.compose(event, steps)
    return float(accountant.get_epsilon(account.delta))


@settings(max_examples=30, deadline=None)
@given(account=accounts, asked=st.lists(wishes, max_size=10))
def test_no_sequence_of_wishes_passes_the_budget(account: PrivacyAccount, asked: list) -> None:
    spent, admitted = 0.0, []
    for sigma, rate, steps in asked:
        charge = account.charge_of(sigma, rate, steps)
        if account.admits(spent, charge):
            spent += charge
            admitted.append((sigma, rate, steps))
        assert 0 <= spent <= account.rdp_budget
        assert account.epsilon_spent(spent) <= account.epsilon * (1 + 1e-9)
    assert all(steps >= 0 or account.charge_of(s, q, 1) == 0 for s, q, steps in admitted)
    real = [(s, q, steps) for s, q, steps in admitted if steps > 0]
    assert independent_epsilon(account, real) <= account.epsilon + 1e-3


@settings(max_examples=8, deadline=None)
@given(account=accounts, seed=st.integers(0, 2**31), greed=st.floats(0.5, 1.5))
def test_an_adversary_that_looks_at_the_past_never_passes_the_budget(
    account: PrivacyAccount, seed: int, greed: float
) -> None:
    """It works out the least noise that still fits, and asks for a little more or less than that."""
    dice, spent, refused = random.Random(seed), 0.0, 0
    for _ in range(6):
        rate, steps = dice.choice([0.1, 0.3, 1.0]), dice.randint(1, 40)
        try:
            noise = account.least_noise(spent, rate, steps) * greed
        except BudgetError:
            noise = dice.uniform(0.3, 9.0)
        charge = account.charge_of(noise, rate, steps)
        if account.admits(spent, charge):
            spent += charge
        else:
            refused += 1
        assert spent <= account.rdp_budget
    assert account.epsilon_spent(spent) <= account.epsilon * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(account=accounts)
def test_the_whole_budget_converts_to_the_promised_epsilon(account: PrivacyAccount) -> None:
    assert epsilon_at_order(account.rdp_budget, account.rdp_order, account.delta) == pytest.approx(account.epsilon)
    assert account.admits(0.0, account.rdp_budget)
    assert not account.admits(0.0, math.nextafter(account.rdp_budget, math.inf))


@pytest.mark.parametrize("charge", [math.nan, math.inf, -math.inf, -1e-9, -5.0])
def test_what_is_no_price_is_refused(charge: float) -> None:
    account = account_at(2.0, 8.0)
    assert not account.admits(0.0, charge)
    assert not account.admits(math.nan, 0.1)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=st.lists(st.tuples(st.floats(0.3, 3.0), st.floats(0.1, 0.8), st.integers(-3, 30)), max_size=8))
def test_through_the_ledger_a_refusal_leaves_nothing_but_its_entry(tmp_path: Path, asked: list) -> None:
    ledger = Ledger(LocalStore(tmp_path / str(random.random())), "one")
    account = ledger.open_account(account_at(2.0, 8.0), run_id="r", dataset_fingerprint="f")
    for attempt, (noise, rate, steps) in enumerate(asked):
        before = ledger.entries()
        spent = ledger.spent_rdp()
        try:
            ledger.charge(
                account,
                run_id="r",
                round_index=0,
                attempt=attempt,
                dataset_fingerprint="f",
                noise_multiplier=noise,
                sample_rate=rate,
                steps=steps,
            )
        except BudgetError:
            after = ledger.entries()
            assert after[:-1] == before
            assert (after[-1].kind, after[-1].rdp_charge) == ("refusal", 0.0)
            assert ledger.spent_rdp() == spent
        assert spent <= ledger.spent_rdp() <= account.rdp_budget
    charged = [e for e in ledger.entries() if e.kind == "charge"]
    real = [(e.noise_multiplier, e.sample_rate, e.steps) for e in charged if e.steps > 0]
    assert independent_epsilon(account, real) <= 2.0 + 1e-3
