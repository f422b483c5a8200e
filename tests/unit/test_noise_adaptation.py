"""The adaptation rule: only ever lower, never below the floor or what the remaining rounds can carry."""

from hypothesis import given, settings
from hypothesis import strategies as st

from fedmentor_core.config import AdaptationConfig
from fedmentor_core.privacy.adaptation import DomainState, count_below, propose
from fedmentor_core.privacy.filter import PrivacyAccount

ACCOUNT = PrivacyAccount.open(epsilon=6.0, delta=1e-5, sample_rate=0.05, planned_steps=60)


def state(**changes) -> DomainState:
    base = {
        "domain": "d", "noise_multiplier": 1.5, "floor": 0.3, "metric_value": 0.4, "threshold": 0.5, "rounds_below": 1,
        "spent_rdp": 0.0, "sample_rate": 0.05, "remaining_steps": 40,
    }  # fmt: skip
    return DomainState(**{**base, **changes})


def test_noise_falls_by_gamma_when_the_budget_carries_it():
    change = propose(AdaptationConfig(gamma=0.9), ACCOUNT, state())
    assert change is not None
    assert change.to == 0.9 * 1.5
    assert "0.4000 below 0.5000" in change.reason


def test_nothing_changes_when_the_rule_is_fixed_patience_is_not_reached_or_no_round_is_left():
    assert propose(AdaptationConfig(rule="fixed"), ACCOUNT, state()) is None
    assert propose(AdaptationConfig(patience_rounds=2), ACCOUNT, state(rounds_below=1)) is None
    assert propose(AdaptationConfig(), ACCOUNT, state(remaining_steps=0)) is None


def test_the_sites_floor_holds():
    change = propose(AdaptationConfig(gamma=0.5), ACCOUNT, state(floor=1.2))
    assert change is not None
    assert change.to == 1.2
    assert "floor" in change.reason


def test_a_spent_budget_changes_nothing():
    assert propose(AdaptationConfig(), ACCOUNT, state(spent_rdp=ACCOUNT.rdp_budget)) is None


@settings(max_examples=60, deadline=None)
@given(
    noise=st.floats(0.5, 4.0),
    gamma=st.floats(0.3, 0.99),
    spent_share=st.floats(0.0, 1.0),
    steps=st.integers(1, 200),
)
def test_whatever_is_proposed_is_lower_and_still_fits(noise, gamma, spent_share, steps):
    spent = spent_share * ACCOUNT.rdp_budget
    change = propose(
        AdaptationConfig(gamma=gamma), ACCOUNT, state(noise_multiplier=noise, spent_rdp=spent, remaining_steps=steps)
    )
    if change is not None:
        assert change.to < change.from_
        assert change.to >= gamma * noise
        assert ACCOUNT.admits(spent, ACCOUNT.charge_of(change.to, 0.05, steps))


def test_rounds_below_are_counted_in_a_row():
    assert count_below(0, 0.4, 0.5) == 1
    assert count_below(3, 0.4, 0.5) == 4
    assert count_below(3, 0.5, 0.5) == 0
