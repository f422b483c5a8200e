"""Noise rules one by one: what each proposes, what bounds it, and what its docstring claims about utility."""

import math
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from fedmentor_core import plugins
from fedmentor_core.config import AdaptationConfig, StudyConfig
from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import BudgetError, ConfigError
from fedmentor_core.privacy import rules
from fedmentor_core.privacy.accountant import rdp_per_step
from fedmentor_core.privacy.adaptation import change_of, count_below, decide, settle, threshold_for
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.plan import plan_domain
from fedmentor_core.privacy.rules import find_rule, rule_names
from fedmentor_core.privacy.rules.base import Proposal, RunShare, Standing
from fedmentor_core.records import (
    DomainEvaluation,
    DomainPlan,
    EvaluationMetrics,
    GateVerdict,
    Metrics,
    ScorerIdentities,
)
from fedmentor_core.rounds import RoundState, commit_round, find_manifest
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import Workspace

N_UNITS = 640
ROUNDS = 6


def study(**changes) -> StudyConfig:
    """Six rounds of ten steps at sample rate 0.05."""
    return validate_config(
        {
            "name": "noise", "rounds": ROUNDS,
            "domains": [
                {"name": "d", "source": {"kind": "invented", "corpus": "sleep", "n_units": 20}, "epsilon": 6.0,
                 "min_noise_multiplier": changes.pop("floor", 0.3)},
            ],
            "training": {"steps_per_round": 10, "batch_size": 32},
            "adaptation": {"threshold": 0.5, **changes.pop("adaptation", {})},
            "privacy": changes.pop("privacy", {}),
            "evaluation": {"gate_data": changes.pop("gate_data", "public")},
        }
    )  # fmt: skip


def planned(config: StudyConfig, **known) -> DomainPlan:
    return plan_domain(
        config, config.domains[0], n_units=N_UNITS, dataset_fingerprint="f" * 64, bytes_up=1, bytes_down=1,
        with_prv=False, **known,
    )  # fmt: skip


def decided(config: StudyConfig, plan: DomainPlan, **changes):
    given = {
        "noise_multiplier": plan.noise_multiplier, "spent_rdp": RunShare.of(plan).cost(plan.noise_schedule[:1]),
        "rounds_left": ROUNDS - 1, "utility": 0.4, "threshold": 0.5, "rounds_below": 1,
    }  # fmt: skip
    found = decide(config, plan, **{**given, **changes})
    assert found is not None
    return found


def play(config: StudyConfig, plan: DomainPlan, utility, costs=lambda index: 1) -> tuple[list[float], float]:
    """Rounds as a study plays them. Round ``index`` is charged ``costs(index)`` times: 0 rests, 2 was retried."""
    share = RunShare.of(plan)
    noise, spent, below, used = plan.noise_multiplier, 0.0, 0, []
    for index in range(ROUNDS):
        used.append(noise)
        spent += costs(index) * share.cost([noise])
        below = count_below(below, utility, 0.5)
        decision, below = decide(
            config, plan, noise_multiplier=noise, spent_rdp=spent, rounds_left=ROUNDS - 1 - index, utility=utility,
            threshold=0.5, rounds_below=below,
        )  # fmt: skip
        noise = decision.noise_after
    return used, spent


# --- the paper's rule -------------------------------------------------------------------------------------------------


def test_paper_lowers_by_gamma_when_the_reserve_carries_it():
    config = study(adaptation={"gamma": 0.97}, privacy={"reserve_fraction": 0.5})
    plan = planned(config)
    decision, below = decided(config, plan)
    assert decision.noise_after == 0.97 * plan.noise_multiplier
    assert decision.reason == "bertscore_f1 0.4000 below 0.5000 for 1 round(s): noise times gamma"
    assert below == 0
    change = change_of(decision)
    assert (change.domain, change.from_, change.to) == ("d", plan.noise_multiplier, decision.noise_after)


def test_paper_waits_for_its_patience_and_starts_counting_anew():
    config = study(adaptation={"patience_rounds": 2})
    plan = planned(config)
    kept, below = decided(config, plan, rounds_below=1)
    assert (kept.noise_after, below) == (plan.noise_multiplier, 1)
    assert "fewer than 2" in kept.reason
    assert change_of(kept) is None
    lowered, below = decided(config, plan, rounds_below=2)
    assert lowered.noise_after < plan.noise_multiplier
    assert below == 0


def test_paper_with_good_utility_leaves_its_reserve():
    config = study(privacy={"reserve_fraction": 0.2})
    plan = planned(config)
    used, spent = play(config, plan, utility=0.9)
    assert set(used) == {plan.noise_multiplier}
    assert 0.795 * plan.run_rdp_budget < spent <= 0.8 * plan.run_rdp_budget


def test_the_sites_floor_stops_a_reduction_and_the_record_says_so():
    reserve = {"reserve_fraction": 0.6}
    floor = 0.98 * planned(study(privacy=reserve)).noise_multiplier
    config = study(floor=floor, adaptation={"gamma": 0.5}, privacy=reserve)
    decision, _ = decided(config, planned(config))
    assert decision.noise_after == floor
    assert decision.reason.endswith("limited by the site's floor")


def test_what_the_remaining_rounds_can_carry_stops_a_reduction():
    config = study(adaptation={"gamma": 0.5})
    plan = planned(config)
    decision, _ = decided(config, plan)
    assert decision.noise_after == decision.least_noise < plan.noise_multiplier
    assert decision.reason.endswith("limited by what the remaining rounds can carry")
    share = RunShare.of(plan)
    assert share.fits(decision.spent_rdp, decision.noise_after, ROUNDS - 1)
    assert not share.fits(decision.spent_rdp, decision.noise_after - 2e-4, ROUNDS - 1)


# --- every decision is recorded -------------------------------------------------------------------------------------


def test_a_decision_to_keep_noise_holds_all_its_inputs():
    config = study()
    plan = planned(config)
    decision, below = decided(config, plan, utility=0.7, rounds_below=0)
    assert (decision.noise_before, decision.noise_after, below) == (plan.noise_multiplier, plan.noise_multiplier, 0)
    assert (decision.rule, decision.metric, decision.value, decision.threshold) == ("paper", "bertscore_f1", 0.7, 0.5)
    assert (decision.run_rdp_budget, decision.remaining_steps) == (plan.run_rdp_budget, 50)
    assert "not below" in decision.reason
    assert not decision.value_noised


def test_a_private_gates_metric_is_marked_as_noised():
    config = study(gate_data="private")
    assert decided(config, planned(config))[0].value_noised


def test_a_rule_that_sees_no_metric_records_none():
    config = study(adaptation={"rule": "fixed"}, gate_data="private")
    decision, below = decided(config, planned(config))
    assert (decision.metric, decision.value, decision.threshold, decision.value_noised) == (None, None, None, False)
    assert (decision.noise_after, below) == (decision.noise_before, 1)


def test_the_last_rounds_decision_says_that_no_round_is_left():
    decision, _ = decided(study(), planned(study()), rounds_left=0)
    assert (decision.reason, decision.remaining_steps) == ("no round is left", 0)


def test_a_spent_budget_changes_nothing_and_says_that_the_domain_will_rest():
    plan = planned(study())
    decision, _ = decided(study(), plan, spent_rdp=plan.run_rdp_budget)
    assert (decision.noise_after, decision.least_noise) == (plan.noise_multiplier, None)
    assert "rest" in decision.reason


def test_a_domain_without_an_account_has_no_decision():
    config = study(privacy={"mode": "none"})
    plan = planned(config)
    assert decide(
        config, plan, noise_multiplier=1.0, spent_rdp=0, rounds_left=1, utility=0.1, threshold=0.5, rounds_below=1
    ) is None  # fmt: skip


# --- noise rises only as far as a charged retry forces it -------------------------------------------------------------


@pytest.mark.parametrize("rule", ["fixed", "decreasing", "spend-down"])
def test_a_charged_retry_raises_noise_just_so_that_the_rest_fits(rule):
    config = study(adaptation={"rule": rule, "final_noise_fraction": 0.95})
    plan = planned(config)
    share = RunShare.of(plan)
    spent = 3 * share.cost([plan.noise_multiplier])  # of a first round that was tried three times
    decision, _ = decided(config, plan, utility=0.9, rounds_below=0, spent_rdp=spent)
    assert decision.noise_after > plan.noise_multiplier
    assert decision.noise_after == decision.least_noise
    assert share.fits(spent, decision.noise_after, ROUNDS - 1)
    assert "charged retry" in decision.reason


class Stubborn:
    name = "stubborn"
    watches_utility = False
    keeps_reserve = False

    def __init__(self, wanted: float) -> None:
        self.wanted = wanted

    def plan(self, settings, share, rdp, rounds):
        return (share.least_noise(rdp, rounds),) * rounds

    def propose(self, settings, share, standing):
        return Proposal(self.wanted, "because")


@pytest.mark.parametrize(
    ("wanted", "becomes"), [(1e9, 1.0), (math.nan, 1.0), (math.inf, 1.0), (0.0, 0.8), (-math.inf, 0.8), (0.9, 0.9)]
)
def test_whatever_a_rule_proposes_is_kept_within_the_bounds(wanted, becomes):
    limit = 2 * RunShare(4.0, 0.0, 0.05, 10, 0.7).cost([0.8])
    share = RunShare(rdp_order=4.0, rdp_limit=limit, sample_rate=0.05, events_per_round=10, floor=0.7)
    standing = Standing(
        noise_multiplier=1.0, planned=(1.0,) * 3, rounds_left=2, spent_rdp=0.0, least_noise=0.8, utility=0.4,
        threshold=0.5, rounds_below=1,
    )  # fmt: skip
    assert settle(AdaptationConfig(), Stubborn(wanted), share, standing).noise_multiplier == becomes


# --- planned schedules ------------------------------------------------------------------------------------------------


def test_decreasing_plays_its_plan_whatever_utility_is_and_uses_its_share():
    config = study(adaptation={"rule": "decreasing", "final_noise_fraction": 0.8})
    plan = planned(config)
    assert plan.noise_schedule[-1] == pytest.approx(0.8 * plan.noise_schedule[0], abs=2e-4)
    ratios = [later / earlier for earlier, later in zip(plan.noise_schedule, plan.noise_schedule[1:], strict=False)]
    assert ratios == pytest.approx([0.8 ** (1 / (ROUNDS - 1))] * (ROUNDS - 1), abs=3e-4)
    for utility in (0.0, 0.9):
        used, spent = play(config, plan, utility)
        assert tuple(used) == plan.noise_schedule
        assert 0.99 * plan.run_rdp_budget < spent <= plan.run_rdp_budget


def test_a_floor_in_the_schedule_gives_what_it_leaves_to_the_rounds_before():
    free = planned(study(adaptation={"rule": "decreasing", "final_noise_fraction": 0.5}))
    floor = round(free.noise_schedule[-1] * 1.1, 4)
    held = planned(study(floor=floor, adaptation={"rule": "decreasing", "final_noise_fraction": 0.5}))
    assert held.noise_schedule[-1] == floor
    assert held.noise_schedule[0] < free.noise_schedule[0]
    assert RunShare.of(held).cost(held.noise_schedule) > 0.99 * held.run_rdp_budget


def test_decreasing_is_planned_anew_after_a_charged_retry_and_still_fits():
    config = study(adaptation={"rule": "decreasing"})
    plan = planned(config)
    used, spent = play(config, plan, 0.9, costs=lambda index: 2 if index == 1 else 1)
    assert used[2] > plan.noise_schedule[2]
    assert 0.99 * plan.run_rdp_budget < spent <= plan.run_rdp_budget


def test_spend_down_undisturbed_plays_the_plan_of_decreasing():
    config = study(adaptation={"rule": "spend-down"})
    plan = planned(config)
    assert plan.noise_schedule == planned(study(adaptation={"rule": "decreasing"})).noise_schedule
    used, spent = play(config, plan, utility=0.9)
    assert used == pytest.approx(plan.noise_schedule, abs=3e-4)
    assert 0.99 * plan.run_rdp_budget < spent <= plan.run_rdp_budget


def test_spend_down_uses_what_a_rested_round_left_and_decreasing_does_not():
    spent = {}
    for rule in ("spend-down", "decreasing"):
        config = study(adaptation={"rule": rule})
        plan = planned(config)
        _, spent[rule] = play(config, plan, 0.9, costs=lambda index: 0 if index == 2 else 1)
        assert spent[rule] <= plan.run_rdp_budget
    assert spent["spend-down"] > 0.99 * plan.run_rdp_budget
    assert spent["decreasing"] < 0.9 * plan.run_rdp_budget


def test_lagging_utility_brings_spend_down_forward_and_the_late_rounds_pay():
    config = study(adaptation={"rule": "spend-down", "final_noise_fraction": 0.8})
    plan = planned(config)
    (good, _), (lagging, spent) = play(config, plan, 0.9), play(config, plan, 0.1)
    assert lagging[0] == good[0]
    assert all(low < high for low, high in zip(lagging[1:3], good[1:3], strict=True))
    assert lagging[-1] > good[-1]
    assert 0.99 * plan.run_rdp_budget < spent <= plan.run_rdp_budget


@pytest.mark.parametrize("rule", ["fixed", "paper", "decreasing", "spend-down"])
def test_one_round_is_a_schedule_too(rule):
    config = validate_config({**study(adaptation={"rule": rule}).model_dump(mode="json"), "rounds": 1})
    plan = planned(config)
    assert len(plan.noise_schedule) == 1
    assert plan.reductions == ()


# --- what the docstrings claim about utility: noise contracted by later rounds, at the accountant's prices -----------


def final_variance(schedule, contraction: float) -> float:
    """Of the last adapter, when a whole run contracts its first round's variance to ``contraction``."""
    rounds = len(schedule)
    each = contraction ** (1 / (rounds - 1))
    return math.fsum(each ** (rounds - 1 - index) * noise**2 for index, noise in enumerate(schedule))


def run_share(sample_rate: float, steps: int, rounds: int, epsilon: float = 4.0) -> tuple[RunShare, float]:
    account = PrivacyAccount.open(epsilon, 1e-5, sample_rate, steps * rounds)
    return RunShare(account.rdp_order, account.rdp_budget, sample_rate, steps, 0.0), account.rdp_budget


def best_fraction(share: RunShare, budget: float, rounds: int, contraction: float) -> float:
    """The final noise fraction that leaves the least variance at equal cost."""
    return min(
        (step / 50 for step in range(20, 51)),
        key=lambda f: final_variance(share.geometric(budget, rounds, f ** (1 / (rounds - 1))), contraction),
    )


@pytest.mark.parametrize(("sample_rate", "steps", "steeper"), [(1.0, 1, 0.0), (0.032, 12, 6.0)])
def test_the_best_schedule_is_the_one_that_the_derivation_gives(sample_rate, steps, steeper):
    share, budget = run_share(sample_rate, steps, rounds=8)
    noise = share.least_noise(budget, 8)
    price = [math.log(rdp_per_step(noise * f, sample_rate, share.rdp_order)) for f in (1 / 1.02, 1.02)]
    p = (price[0] - price[1]) / (2 * math.log(1.02))
    assert p >= 2 + steeper - 1e-6
    assert best_fraction(share, budget, 8, contraction=0.4) == pytest.approx(0.4 ** (1 / (p + 2)), abs=0.04)
    assert best_fraction(share, budget, 8, contraction=1.0) == 1.0  # nothing forgets: constant noise is best


def test_a_gentle_decrease_beats_constant_noise_of_equal_cost_and_a_steep_one_does_not_where_units_are_sampled():
    share, budget = run_share(0.032, 12, rounds=8)
    constant = final_variance((share.least_noise(budget, 8),) * 8, 0.24)
    gentle, steep = (final_variance(share.geometric(budget, 8, f ** (1 / 7)), 0.24) / constant for f in (0.9, 0.7))
    assert 0.98 < gentle < 0.992
    assert 1.06 < steep < 1.10


@pytest.mark.parametrize(("sample_rate", "steps"), [(1.0, 1), (0.032, 12), (0.05, 12)])
@pytest.mark.parametrize("contraction", [0.1, 0.24, 0.5])
def test_spending_down_leaves_less_variance_than_an_unused_reserve(sample_rate, steps, contraction):
    settings = AdaptationConfig()
    share, budget = run_share(sample_rate, steps, rounds=8)
    paper = find_rule("paper").plan(settings, share, 0.9 * budget, 8)
    ours = find_rule("spend-down").plan(settings, share, budget, 8)
    assert final_variance(ours, contraction) < 0.99 * final_variance(paper, contraction)


# --- the threshold ----------------------------------------------------------------------------------------------------


def test_rounds_below_are_counted_in_a_row():
    assert count_below(0, 0.4, 0.5) == 1
    assert count_below(3, 0.4, 0.5) == 4
    assert count_below(3, 0.5, 0.5) == 0
    assert count_below(3, math.nan, 0.5) == 0


def test_a_threshold_may_be_relative_to_another_run():
    one = Metrics(
        bertscore_f1=0.6, rouge_l=0.2, label_f1=0, safe_rate=1, toxicity_mean=0, toxicity_max=0, empty_rate=0,
        n_examples=4,
    )  # fmt: skip
    other = EvaluationMetrics(**one.model_dump(), by_domain={"d": one})
    relative = AdaptationConfig(threshold=0.9, relative_to="baseline")
    assert threshold_for(AdaptationConfig(threshold=0.4), "d", {"baseline": other}) == 0.4
    assert threshold_for(relative, "d", {"baseline": other}) == pytest.approx(0.54)
    assert threshold_for(relative, "d", {"baseline": None}) == 0.9


# --- rules are found by name -----------------------------------------------------------------------------------------


def test_the_built_in_rules_are_found():
    assert {"decreasing", "fixed", "paper", "spend-down"} <= set(rule_names())
    assert all(find_rule(name).name == name for name in rule_names())


def test_an_unknown_rule_is_a_configuration_error_that_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"adaptation\.rule.*'spenddown'.*Did you mean 'spend-down'.*fixed, paper"):
        study(adaptation={"rule": "spenddown"})


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """An installed package, as far as the import system and its entry points are concerned."""

    def register(name: str, source: str) -> None:
        module = f"noise_plugin_{name.replace('-', '_')}"
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        entry = EntryPoint(name=name, value=f"{module}:rule", group=rules.ENTRY_POINT_GROUP)
        monkeypatch.setattr(plugins, "entry_points", lambda group: [entry] if group == entry.group else [])

    return register


def test_another_packages_rule_is_found_by_its_entry_point_and_plans(registered):
    registered(
        "half-again",
        "from fedmentor_core.privacy.rules.fixed import Fixed\n"
        "class HalfAgain(Fixed):\n"
        "    name = 'half-again'\n"
        "    def plan(self, settings, share, rdp, rounds):\n"
        "        return tuple(1.5 * noise for noise in super().plan(settings, share, rdp, rounds))\n"
        "rule = HalfAgain()\n",
    )
    assert "half-again" in rule_names()
    plan, fixed = planned(study(adaptation={"rule": "half-again"})), planned(study(adaptation={"rule": "fixed"}))
    assert plan.rule == "half-again"
    assert plan.noise_multiplier == 1.5 * fixed.noise_multiplier


@pytest.mark.parametrize(
    ("source", "message"),
    [("rule = 3\n", "is no noise rule"), ("import nothing_like_this\n", "cannot be loaded: ModuleNotFoundError")],
)
def test_a_broken_entry_point_is_a_configuration_error(registered, source, message):
    registered(f"broken-{len(source)}", source)
    with pytest.raises(ConfigError, match=message):
        find_rule(f"broken-{len(source)}")


@pytest.mark.parametrize(
    ("schedule", "error"),
    [
        ("(1.0,)", ConfigError),
        ("(0.1,) * rounds", ConfigError),
        ("tuple(1.0 + i for i in range(rounds))", ConfigError),
        ("(float('nan'),) * rounds", ConfigError),
        ("(0.4,) * rounds", BudgetError),
    ],
)
def test_a_rule_that_breaks_its_contract_does_not_train(registered, schedule, error):
    name = f"bad-{abs(hash(schedule))}"
    registered(
        name,
        "from fedmentor_core.privacy.rules.fixed import Fixed\n"
        f"class Bad(Fixed):\n    name = {name!r}\n"
        f"    def plan(self, settings, share, rdp, rounds):\n        return {schedule}\n"
        "rule = Bad()\n",
    )
    config = study(adaptation={"rule": name})
    if error is ConfigError:
        with pytest.raises(ConfigError, match="Use another adaptation"):
            planned(config)
    else:
        assert "costs more than there is" in planned(config).refusals[0]


# --- in a round's record ---------------------------------------------------------------------------------------------


def test_a_committed_round_holds_a_decision_for_every_domain_and_only_real_changes(tiny_study, tmp_path, monkeypatch):
    monkeypatch.setattr("fedmentor_core.privacy.plan.epsilon_prv", lambda *_: 0.0)
    tiny_study["adaptation"] = {"threshold": 0.5}
    workspace = Workspace(open_study(validate_config(tiny_study), tmp_path / "out"))
    state = RoundState.first(workspace)
    scorers = ScorerIdentities(bertscore="b", rouge="r", toxicity="t", safe_threshold=0.5)

    def evaluated(domain: str, value: float) -> DomainEvaluation:
        metrics = Metrics(
            bertscore_f1=value, rouge_l=0, label_f1=0, safe_rate=1, toxicity_mean=0, toxicity_max=0, empty_rate=0,
            n_examples=4,
        )  # fmt: skip
        return DomainEvaluation(domain=domain, split="gate", metrics=metrics, scorers=scorers, seconds=0.0)

    manifest = commit_round(
        workspace, state, state.adapter, [], [evaluated("one", 0.3), evaluated("two", 0.8)],
        GateVerdict(passed=True, results=(), reasons=()), {}, 0.0,
    )  # fmt: skip
    one, two = manifest.summary.noise_decisions
    assert (one.domain, one.value, two.domain, two.value) == ("one", 0.3, "two", 0.8)
    assert one.noise_after < one.noise_before
    assert two.noise_after == two.noise_before
    assert [change.domain for change in manifest.summary.noise_changes] == ["one"]
    assert manifest.next_noise == {"one": one.noise_after, "two": two.noise_after}
    assert manifest.rounds_below == {"one": 0, "two": 0}
    assert find_manifest(workspace, 0) == manifest
