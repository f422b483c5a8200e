"""Any utilities, any retries and rests, any rule: the share and the lifetime hold, and so does the site's floor."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmentor_core.config import StudyConfig
from fedmentor_core.config_io import validate_config
from fedmentor_core.privacy import adaptation
from fedmentor_core.privacy.adaptation import count_below, decide
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.mechanism import charged_events
from fedmentor_core.privacy.plan import plan_domain
from fedmentor_core.privacy.rules import rule_names
from fedmentor_core.privacy.rules.base import Proposal
from fedmentor_core.records import DomainPlan

ROUND = st.tuples(st.floats(-0.2, 1.2), st.sampled_from([1, 1, 1, 0, 2, 3]))  # utility; charged attempts, 0: it rested
NIGHTS = st.lists(st.lists(ROUND, min_size=1, max_size=5), min_size=1, max_size=3)
SETTINGS = st.fixed_dictionaries(
    {
        "gamma": st.sampled_from([0.5, 0.9, 0.97]),
        "patience_rounds": st.integers(1, 2),
        "final_noise_fraction": st.sampled_from([0.3, 0.8, 0.95, 1.0]),
        "threshold": st.just(0.5),
    }
)


def study(rule: str, rounds: int, nights: int, floor: float, level: str, adapt: dict) -> StudyConfig:
    return validate_config(
        {
            "name": "any", "rounds": rounds,
            "domains": [
                {"name": "d", "source": {"kind": "invented", "corpus": "sleep", "n_units": 20}, "epsilon": 6.0,
                 "min_noise_multiplier": floor},
            ],
            "training": {"steps_per_round": 10, "batch_size": 32},
            "adaptation": {"rule": rule, **adapt},
            "privacy": {"planned_runs": nights, "level": level},
            "evaluation": {"gate_data": "public"},
        }
    )  # fmt: skip


def play_night(config: StudyConfig, plan: DomainPlan, account: PrivacyAccount, spent: float, night) -> float:
    """One run, charged as the ledger charges: each attempt is admitted by the lifetime and by the run's share."""
    events = charged_events(plan.privacy_level, plan.sample_rate, plan.steps_per_round)
    noise, below, retried, refused = plan.noise_multiplier, 0, False, False
    assert noise is not None
    assert plan.run_rdp_budget is not None
    for index, (utility, attempts) in enumerate(night):
        assert noise >= plan.min_noise_multiplier
        cost = account.charge_of(noise, events.sample_rate, events.steps)
        for _ in range(attempts):
            if not (account.admits(spent, cost) and spent + cost <= plan.run_rdp_budget):
                refused = True
                break
            spent += cost
        retried |= attempts > 1
        assert spent <= plan.run_rdp_budget <= account.rdp_budget * (1 + 1e-12)
        assert retried or not refused, "without a retry every planned round fits"
        below = count_below(below, utility, 0.5)
        found = decide(
            config, plan, noise_multiplier=noise, spent_rdp=spent, rounds_left=len(night) - 1 - index, utility=utility,
            threshold=0.5, rounds_below=below,
        )  # fmt: skip
        assert found is not None
        decision, below = found
        assert retried or decision.noise_after <= noise, "noise rises only after a charged retry"
        if decision.noise_after > noise:
            assert decision.noise_after == decision.least_noise
        if decision.least_noise is not None:  # then all remaining rounds fit at what was decided
            rest = account.charge_of(
                decision.noise_after, events.sample_rate, decision.remaining_steps // 10 * events.steps
            )
            assert spent + rest <= plan.run_rdp_budget * (1 + 1e-12)
        noise = decision.noise_after
    return spent


def play(config: StudyConfig, nights) -> None:
    account, spent = None, 0.0
    for before, night in enumerate(nights):
        config = config.model_copy(update={"rounds": len(night)})
        plan = plan_domain(
            config, config.domains[0], n_units=640, dataset_fingerprint="f", bytes_up=1, bytes_down=1,
            account_in_force=account, spent_rdp=spent, runs_before=before, with_prv=False,
        )  # fmt: skip
        account = account or PrivacyAccount.of(plan)
        if plan.noise_multiplier is None:
            assert plan.refusals
            continue
        assert account is not None
        spent = play_night(config, plan, account, spent, night)
        assert spent <= account.rdp_budget * (1 + 1e-12)
        assert account.epsilon_spent(spent) <= 6.0 * (1 + 1e-9)


@pytest.mark.parametrize("rule", rule_names())
@settings(max_examples=25, deadline=None)
@given(
    nights=NIGHTS,
    floor=st.sampled_from([0.0, 0.5, 0.9, 1.5]),
    level=st.sampled_from(["unit", "client"]),
    adapt=SETTINGS,
)
def test_no_rule_passes_the_budget_the_share_or_the_floor(rule, nights, floor, level, adapt):
    play(study(rule, len(nights[0]), len(nights), floor, level, adapt), nights)


class Wild:
    """Proposes whatever it is told to."""

    name = "wild"
    watches_utility = True
    keeps_reserve = True

    def __init__(self, proposals):
        self.proposals = list(proposals)

    def plan(self, settings, share, rdp, rounds):
        return (share.least_noise(rdp, rounds),) * rounds

    def propose(self, settings, share, standing):
        self.proposals.append(self.proposals.pop(0))
        return Proposal(self.proposals[-1], "wild", answers_utility=True)


@settings(max_examples=40, deadline=None)
@given(
    nights=NIGHTS, proposals=st.lists(st.floats(width=32), min_size=1, max_size=8), floor=st.sampled_from([0.0, 0.7])
)
def test_nor_does_a_rule_that_proposes_anything_at_all(nights, proposals, floor):
    wild = Wild(proposals)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptation, "find_rule", lambda name: wild)
        play(study("paper", len(nights[0]), len(nights), floor, "unit", {}), nights)
