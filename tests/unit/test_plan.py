"""The plan: shares of a lifetime budget, price of a schedule and of every reduction, and what an officer is shown."""

import math
from pathlib import Path

import dp_accounting
import pytest

from fedmentor_core.config import StudyConfig
from fedmentor_core.config_io import validate_config
from fedmentor_core.data.sources import ColumnMapping, CorpusSource, InventedSource, TableSource
from fedmentor_core.privacy.adaptation import decide
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.ledger import Ledger
from fedmentor_core.privacy.plan import plan_domain, privacy_unit
from fedmentor_core.records import DomainPlan, SharedPosts, StudyPlan, ValidationPlan
from fedmentor_core.storage.base import open_store
from flows.result_view import print_plan

N_UNITS = 800


def study(rounds: int = 5, **changes) -> StudyConfig:
    return validate_config(
        {
            "name": "plan", "rounds": rounds,
            "domains": [
                {"name": "d", "source": {"kind": "invented", "corpus": "sleep", "n_units": 20},
                 "epsilon": changes.pop("epsilon", 5.0), "min_noise_multiplier": changes.pop("floor", 0.2)},
            ],
            "training": {"steps_per_round": 8, "batch_size": 40},
            "evaluation": {"gate_data": "public"},
            **changes,
        }
    )  # fmt: skip


def planned(config: StudyConfig, **known) -> DomainPlan:
    given = {"n_units": N_UNITS, "dataset_fingerprint": "f" * 64, "bytes_up": 120_000, "bytes_down": 90_000}
    return plan_domain(config, config.domains[0], **{"with_prv": False, **given, **known})


def epsilon_elsewhere(plan: DomainPlan, schedule) -> float:
    """dp_accounting's RDP of the schedule at the plan's order, and the conversion written out."""
    accountant = dp_accounting.rdp.RdpAccountant([plan.rdp_order])
    for noise in schedule:
        gaussian = dp_accounting.GaussianDpEvent(noise)
        if plan.privacy_level == "client":
            accountant.compose(gaussian)
        else:
            accountant.compose(dp_accounting.PoissonSampledDpEvent(plan.sample_rate, gaussian), plan.steps_per_round)
    order, rho = plan.rdp_order, float(accountant._rdp[0])
    return rho - (math.log(plan.delta) + math.log(order)) / (order - 1) + math.log((order - 1) / order)


# --- what a schedule costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["fixed", "paper", "decreasing", "spend-down"])
@pytest.mark.parametrize("level", ["unit", "client"])
def test_the_planned_epsilon_is_the_whole_schedules(rule, level):
    plan = planned(study(adaptation={"rule": rule}, privacy={"level": level}))
    assert (plan.rule, plan.privacy_level, len(plan.noise_schedule)) == (rule, level, 5)
    assert plan.noise_schedule[0] == plan.noise_multiplier
    assert plan.epsilon_planned_rdp == pytest.approx(epsilon_elsewhere(plan, plan.noise_schedule), rel=1e-3)
    assert plan.epsilon_planned_rdp <= plan.epsilon_budget
    assert plan.epsilon_planned_rdp + plan.reserve_epsilon == pytest.approx(plan.epsilon_budget, abs=1e-9)
    assert (plan.reserve_epsilon > 0.05) == (rule == "paper")


def test_prv_of_a_changing_schedule_lies_between_its_pld_and_its_rdp():
    plan = planned(study(rounds=2, adaptation={"rule": "decreasing"}), with_prv=True)
    pld = dp_accounting.pld.PLDAccountant()
    for noise in plan.noise_schedule:
        event = dp_accounting.PoissonSampledDpEvent(plan.sample_rate, dp_accounting.GaussianDpEvent(noise))
        pld.compose(event, plan.steps_per_round)
    assert pld.get_epsilon(plan.delta) - 0.02 <= plan.epsilon_planned_prv < plan.epsilon_planned_rdp


def test_prv_of_one_gaussian_release_a_round_is_that_of_the_gaussian_and_says_nothing_on_the_way(recwarn):
    plan = planned(study(privacy={"level": "client"}, adaptation={"rule": "fixed"}), with_prv=True)
    pld = dp_accounting.pld.PLDAccountant()
    pld.compose(dp_accounting.GaussianDpEvent(plan.noise_multiplier), 5)
    assert plan.epsilon_planned_prv == pytest.approx(pld.get_epsilon(plan.delta), abs=0.03)
    assert not [str(one.message) for one in recwarn if "log" in str(one.message)]


def test_a_long_schedules_prv_is_overstated_and_never_understated(monkeypatch):
    seen = []
    monkeypatch.setattr("fedmentor_core.privacy.plan.epsilon_prv", lambda history, delta: seen.append(history) or 1.0)
    plan = planned(study(rounds=40, adaptation={"rule": "decreasing"}), with_prv=True)
    (history,) = seen
    charged = [spend.noise_multiplier for spend in history for _ in range(spend.steps // 8)]
    assert len(charged) == 40
    assert len(history) <= 12
    assert all(low <= real for low, real in zip(charged, plan.noise_schedule, strict=True))


# --- what reductions would cost ---------------------------------------------------------------------------------------


def test_each_reductions_price_is_right_when_counted_elsewhere():
    gamma = 0.985
    config = study(adaptation={"gamma": gamma}, privacy={"reserve_fraction": 0.22})
    plan = planned(config)
    assert [one.limited_by for one in plan.reductions] == ["rule"] * 3 + ["budget"]
    assert [one.after_round for one in plan.reductions] == [0, 1, 2, 3]
    noise, used = plan.noise_multiplier, []
    for one in plan.reductions:
        used.append(noise)
        noise = one.noise_multiplier
        if one.limited_by == "rule":
            assert noise == pytest.approx(gamma * used[-1])
        after = epsilon_elsewhere(plan, used + [noise] * (5 - len(used)))
        assert one.epsilon_at_end == pytest.approx(after, rel=1e-3)
        assert one.epsilon_extra == pytest.approx(after - plan.epsilon_planned_rdp, rel=2e-2, abs=1e-3)
        assert one.epsilon_at_end <= plan.epsilon_budget


def test_the_last_reduction_is_as_low_as_the_budget_goes():
    plan = planned(study(adaptation={"gamma": 0.5}))
    assert plan.reductions[0].limited_by == "budget"
    lower = [plan.noise_multiplier] + [plan.reductions[0].noise_multiplier - 3e-4] * 4
    assert epsilon_elsewhere(plan, lower) > plan.epsilon_budget > plan.reductions[0].epsilon_at_end


def test_the_floor_limits_the_ladder_and_patience_spreads_it():
    free = planned(study(privacy={"reserve_fraction": 0.6}))
    floor = round(0.9 * free.noise_multiplier, 4)
    config = study(
        floor=floor, privacy={"reserve_fraction": 0.6}, adaptation={"gamma": 0.8, "patience_rounds": 2}, rounds=5
    )
    (one,) = planned(config).reductions
    assert (one.after_round, one.noise_multiplier, one.limited_by) == (1, floor, "floor")


def test_a_rule_that_sees_no_metric_has_no_reductions_to_price():
    assert planned(study(adaptation={"rule": "decreasing"})).reductions == ()


def test_the_ladder_is_what_a_run_with_low_utility_does():
    config = study(adaptation={"rule": "spend-down", "final_noise_fraction": 0.7})
    plan = planned(config)
    account = PrivacyAccount.of(plan)
    spent, noise, below, answered = 0.0, plan.noise_multiplier, 0, []
    for index in range(4):
        spent += account.charge_of(noise, plan.sample_rate, plan.steps_per_round)
        decision, below = decide(
            config, plan, noise_multiplier=noise, spent_rdp=spent, rounds_left=4 - index, utility=0.0, threshold=0.5,
            rounds_below=below + 1,
        )  # fmt: skip
        noise = decision.noise_after
        if below == 0:
            answered.append((index, noise))
    assert answered
    assert [(one.after_round, one.noise_multiplier) for one in plan.reductions] == answered


# --- shares of a lifetime budget --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["paper", "spend-down"])
def test_thirty_nights_each_fit_their_share_and_together_the_lifetime(rule, tmp_path: Path):
    config = study(rounds=2, adaptation={"rule": rule}, privacy={"planned_runs": 30})
    ledger = Ledger(open_store(f"file://{tmp_path}/store"), "d")
    for night in range(30):
        before = ledger.runs_charged(besides=f"night-{night}")
        plan = planned(config, account_in_force=ledger.account(), spent_rdp=ledger.spent_rdp(), runs_before=before)
        assert (plan.refusals, plan.runs_before, plan.planned_runs) == ((), night, 30)
        left = plan.rdp_budget - ledger.spent_rdp()
        assert plan.run_rdp_budget == pytest.approx(ledger.spent_rdp() + left / (30 - night))
        account = ledger.open_account(
            PrivacyAccount.of(plan), run_id=f"night-{night}", dataset_fingerprint=plan.dataset_fingerprint
        )
        for index, noise in enumerate(plan.noise_schedule):
            ledger.charge(
                account, run_id=f"night-{night}", round_index=index, attempt=0, dataset_fingerprint="f" * 64,
                noise_multiplier=noise, sample_rate=plan.sample_rate, steps=plan.steps_per_round,
                run_rdp_share=plan.run_rdp_share,
            )  # fmt: skip
        assert ledger.spent_rdp() <= plan.run_rdp_budget
        assert ledger.runs_charged(besides="another") == night + 1
    epsilon = account.epsilon_spent(ledger.spent_rdp())
    used = [noise for entry in ledger.entries() if entry.kind == "charge" for noise in [entry.noise_multiplier]]
    assert len(used) == 60
    assert epsilon == pytest.approx(epsilon_elsewhere(plan, used), rel=1e-3)
    assert 0.95 * 5.0 < epsilon <= 5.0


def test_what_a_night_did_not_spend_is_there_for_the_nights_after():
    config = study(privacy={"planned_runs": 10})
    first = planned(config)
    account = PrivacyAccount.of(first)
    missed, spent = (
        planned(config, account_in_force=account, spent_rdp=rdp, runs_before=1)
        for rdp in (0.01 * first.run_rdp_budget, first.run_rdp_budget)
    )
    assert missed.noise_multiplier < first.noise_multiplier <= spent.noise_multiplier + 1e-4


def test_after_the_planned_runs_the_rest_is_one_share():
    config = study(privacy={"planned_runs": 3})
    first = planned(config)
    late = planned(config, account_in_force=PrivacyAccount.of(first), spent_rdp=0.5 * first.rdp_budget, runs_before=7)
    assert late.run_rdp_budget == pytest.approx(late.rdp_budget)


def test_the_order_is_chosen_for_the_lifetime():
    lifetime = planned(study(rounds=5, privacy={"planned_runs": 40}))
    assert lifetime.rdp_order == PrivacyAccount.open(5.0, 1e-5, lifetime.sample_rate, 8 * 5 * 40).rdp_order
    assert lifetime.rdp_order != planned(study(rounds=5)).rdp_order


def test_too_small_a_share_is_refused_and_says_what_to_change():
    plan = planned(study(epsilon=1.0, privacy={"planned_runs": 5000}))
    assert "in one of 5000 more runs" in plan.refusals[0]
    assert "privacy.planned_runs" in plan.refusals[0]
    assert (plan.noise_multiplier, plan.noise_schedule) == (None, ())


# --- what one unit is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "unit"),
    [
        (InventedSource(corpus="sleep", n_units=9), "post"),
        (CorpusSource(kind="irf"), "post"),
        (CorpusSource(kind="dreaddit"), "post_id"),
        (CorpusSource(kind="dreaddit", form="instruction"), "post_id"),
        (CorpusSource(kind="dreaddit", form="instruction", human_labels=False), "post"),
        (TableSource(kind="csv", path="x", columns=ColumnMapping(post="p", response="r", question_text="?")), "post"),
        (
            TableSource(
                kind="csv", path="x", columns=ColumnMapping(post="p", response="r", question_text="?", unit="patient")
            ),
            "patient",
        ),
    ],
)
def test_the_unit_is_named(source, unit):
    assert privacy_unit(source) == unit


# --- what is shown ------------------------------------------------------------------------------------------------------


def shown(plan: StudyPlan, monkeypatch, capsys) -> str:
    monkeypatch.setenv("COLUMNS", "100")
    print_plan(plan)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    return text


def test_an_officer_finds_every_answer_in_the_table(monkeypatch, capsys):
    config = study(adaptation={"gamma": 0.97}, privacy={"planned_runs": 30, "reserve_fraction": 0.2})
    plan = planned(config, with_prv=True)
    gate = ValidationPlan(
        account="d.gate", split="gate", n_units=250, releases=8, noise_multiplier=10, metric_std=0.04,
        epsilon_budget=2.5, delta=1e-5, epsilon_spent_before=0.25, epsilon_planned=1.31, rdp_order=4, rdp_budget=1,
        run_rdp_budget=1, dataset_fingerprint="f",
    )  # fmt: skip
    shared = SharedPosts(accounts=("d", "other"), n_posts=37, epsilon_spent=1.5, epsilon_budget=14, delta=2e-5)
    text = shown(
        StudyPlan(
            domains=(plan.model_copy(update={"validation": (gate,), "warnings": ("weak [thing]",)}),),
            bytes_per_round=210_000,
            refusals=("domain 'other': too small",),
            shared_posts=(shared,),
        ),
        monkeypatch,
        capsys,
    )
    share = PrivacyAccount.of(plan).epsilon_spent(plan.run_rdp_budget)
    for number in (
        plan.noise_multiplier, plan.sample_rate, plan.epsilon_planned_rdp, plan.epsilon_planned_prv, share,
        plan.reductions[0].noise_multiplier, plan.reductions[0].epsilon_at_end,
    ):  # fmt: skip
        assert f"{number:.4g}" in text
    for words in (
        "800", "5 x 8", "1.0e-05", "0.12 MB", "d.gate", "0.04", "1.31", "d, other", "37", "14", "2.0e-05", "30",
        f"{plan.reserve_epsilon:.4f}", f"{plan.reductions[0].epsilon_extra:.4f}", "refused: domain 'other'",
        "warning: weak [thing]", "0.21 MB a round",
    ):  # fmt: skip
        assert words in text, words


def test_the_table_holds_without_privacy_and_for_a_refused_domain(monkeypatch, capsys):
    open_plan, refused = planned(study(privacy={"mode": "none"})), planned(study(epsilon=1e-4))
    assert refused.refusals
    text = shown(
        StudyPlan(domains=(open_plan, refused), bytes_per_round=1, refusals=refused.refusals), monkeypatch, capsys
    )
    assert "0.0001" in text


def test_a_schedule_that_falls_is_shown_from_first_to_last(monkeypatch, capsys):
    plan = planned(study(adaptation={"rule": "decreasing"}))
    text = shown(StudyPlan(domains=(plan,), bytes_per_round=1, refusals=()), monkeypatch, capsys)
    assert f"{plan.noise_schedule[0]:.4g} to {plan.noise_schedule[-1]:.4g}" in text


def test_the_json_keeps_its_contract():
    plan = StudyPlan(domains=(planned(study()),), bytes_per_round=210_000, refusals=()).model_dump(mode="json")
    assert {"domains", "bytes_per_round", "refusals"} <= plan.keys()
    assert plan["domains"][0].keys() >= {
        "domain", "n_units", "sample_rate", "steps_per_round", "rounds", "noise_multiplier", "clip_norm", "delta",
        "epsilon_budget", "epsilon_planned_rdp", "epsilon_planned_prv", "bytes_up_per_round", "bytes_down_per_round",
        "noise_schedule", "reserve_epsilon", "reductions", "run_rdp_budget",
    }  # fmt: skip
