"""How the report shows privacy: promise, plan, spending, noise decisions, validation budgets, shared posts."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from invented_summary import (
    ROUNDS,
    check,
    make_config,
    make_decision,
    make_private_config,
    make_private_plan,
    make_private_summary,
    make_samples,
    make_shared_posts,
    make_summary,
    make_view,
)

from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.records import StudyPlan, StudySummary
from fedmentor_core.report import build_report, svg, words
from fedmentor_core.report.budget_chart import BudgetPath, budget_chart
from fedmentor_core.report.metric_noise import MetricNoise
from fedmentor_core.report.privacy_plots import budget_path
from fedmentor_core.report.sections.scores import scores

NEW_PLAN_FIELDS = (
    "reserve_epsilon", "rule", "noise_schedule", "reductions", "planned_runs", "runs_before", "run_rdp_budget",
    "privacy_level", "privacy_unit", "policy_sha256", "validation", "warnings",
)  # fmt: skip


def charts_of(html):
    return re.findall(r'<svg class="chart".*?</svg>', html, re.DOTALL)


def in_order(text, *expected):
    place = 0
    for one in expected:
        found = text.find(one, place)
        assert found >= 0, f"{one!r} is missing, or comes too early"
        place = found + len(one)


def test_a_domains_account_reads_from_promise_to_ledger():
    summary = make_private_summary()
    config = make_config(("stress",), rounds=ROUNDS, ledger_url="s3://someone:hunter2@ledgers/site")
    html = build_report(summary, config, [], accounts=[make_view()])
    _, text = check(html)
    plan = summary.plan.domains[0]
    in_order(
        text,
        "Each domain's account",
        "at most 55 times as likely as if any one post had not been in its data",
        "What was promised",
        "Who is protected one post",
        "Budget for life, ε (epsilon) 4",
        "1e−5 The promise may fail with a chance of at most 1 in 100,000.",
        "sensitivity: high The study's rule gives data of high sensitivity ε = 4.",
        "Site's least noise 0.4",
        "Site's policy 9f3ab81c44d0…",
        "What was planned",
        f"Noise at the start {words.significant(plan.noise_multiplier, 4)}",
        f"ε at the end {words.significant(plan.epsilon_planned_rdp)}",
        f"Kept back, in ε {words.significant(plan.reserve_epsilon)}",
        "What was spent, and what is left",
        "Spent in all 3.9 of 4 98 % of the budget",
        f"this run's rounds added {words.significant(plan.epsilon_planned_rdp)}.",
        "Left 0.1 For later runs.",
        "Who keeps the account",
        "s3://***@ledgers/site",
        "✓ verified: 2 entries, newest ab12cd34ef56…",
        "Planned and spent, round by round",
    )
    assert "hunter2" not in html


def test_every_figure_of_an_account_has_a_sentence():
    html = build_report(make_private_summary(), make_config(("stress",)), [], accounts=[make_view()])
    meanings = re.findall(r'<dd class="meaning">(.*?)</dd>', html)
    assert len(meanings) == html.count('<dd class="figure">') > 12
    assert all(meaning.endswith(".") for meaning in meanings)


def test_a_night_of_many_shows_its_share_and_the_budget():
    summary = make_private_summary((make_private_plan(planned_runs=28),))
    _, text = check(build_report(summary, make_config(("stress",)), []))
    assert "By 7 earlier runs on the same account." in text
    assert "Share of this run run 8 of 28" in text
    assert "↑ budget 4" in text
    assert "this run: up to" in text
    assert "not read Check it at any time with fedmentor ledger." in text


def test_charges_that_no_round_shows_are_counted_from_the_ledger():
    """An attempt that failed after its charge is in no round of the summary, but it is spent."""
    summary = make_private_summary()
    _, text = check(build_report(summary, make_config(("stress",)), [], accounts=[make_view(epsilon_spent=3.99)]))
    assert "spent 3.99 · left 0.01" in text
    _, text = check(build_report(summary, make_config(("stress",)), [], accounts=[make_view(epsilon_spent=4.2)]))
    assert "Left 0 Nothing: MORE WAS SPENT THAN WAS PROMISED." in text


def test_a_client_is_named_where_a_client_is_protected():
    plan = make_private_plan(privacy_level="client")
    _, text = check(build_report(make_private_summary((plan,)), make_config(("stress",)), []))
    assert "as if any one client's dataset had not been in its data" in text
    assert "Adding or removing one post" not in text


def test_a_refused_domain_says_so_and_promises_no_schedule():
    refused = make_private_plan(
        noise_multiplier=None, noise_schedule=(), reductions=(), refusals=("needs noise 31, above 20",)
    )
    summary = make_private_summary()
    summary = summary.model_copy(
        update={"rounds": (), "plan": StudyPlan(domains=(refused,), bytes_per_round=1, refusals=refused.refusals)}
    )
    parser, text = check(build_report(summary, make_config(("stress",)), []))
    assert text.count("Refused: needs noise 31, above 20") == 2
    assert "No noise was found at which the planned steps fit the budget." in text
    assert "figure" not in parser.tags


def test_the_planned_lines_are_the_planners_own_numbers():
    for runs in (1, 28):
        plan = make_private_plan(planned_runs=runs)
        path = budget_path(make_private_summary((plan,)), plan, 0)
        assert path.planned[0] == plan.epsilon_spent_before
        assert path.planned[-1] == pytest.approx(plan.epsilon_planned_rdp, rel=1e-9)
        assert path.lowered[-1] == pytest.approx(plan.reductions[-1].epsilon_at_end, rel=1e-9)
        assert path.spent == pytest.approx(path.planned, rel=1e-9)
        assert path.limit == pytest.approx(plan.epsilon_planned_rdp + plan.reserve_epsilon, rel=1e-9)
        assert (path.share is None) == (runs == 1)


def test_a_round_at_rest_adds_nothing_to_what_is_spent():
    summary = make_private_summary()
    third = summary.rounds[2]
    rested = third.clients[0].model_copy(update={"status": "rested", "epsilon_spent": None})
    rounds = (*summary.rounds[:2], third.model_copy(update={"clients": (rested,)}))
    path = budget_path(summary.model_copy(update={"rounds": rounds}), summary.plan.domains[0], 0)
    assert len(path.spent) == 4
    assert path.spent[3] == path.spent[2] > path.spent[1]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.4, 8.0), min_size=1, max_size=6))
def test_a_planned_line_never_falls_and_never_undersells_the_account(schedule):
    plan = make_private_plan(noise_schedule=tuple(schedule), rounds=len(schedule))
    path = budget_path(make_private_summary((plan,)), plan, 0)
    account = PrivacyAccount.of(plan)
    total = sum(account.charge_of(noise, plan.sample_rate, plan.steps_per_round) for noise in schedule)
    assert list(path.planned) == sorted(path.planned)
    assert path.planned[-1] == pytest.approx(account.epsilon_spent(total))


def heights(chart, css):
    """From where to where on the page the thing with class ``css`` reaches."""
    found = re.search(rf'class="{css}"[^>]* y="([\d.]+)"[^>]*height="([\d.]+)"', chart)
    return None if found is None else (float(found[1]), float(found[1]) + float(found[2]))


def level(chart, css):
    """Height of the horizontal line with class ``css``."""
    return float(re.search(rf'class="{css}" d="M[\d.]+ ([\d.]+)H', chart)[1])


def test_the_reserve_lies_between_the_plans_end_and_the_budget():
    path = BudgetPath("stress", 0, 4.0, (0.0, 3.0, 3.5), (0.0, 3.1), (0.0, 3.0, 3.9))
    chart = budget_chart(path, alt="", show=words.significant)
    top, bottom = heights(chart, "reserve")
    assert top == level(chart, "budget")
    dots = [float(y) for y in re.findall(r'planneddot" cx="[\d.]+" cy="([\d.]+)"', chart)]
    assert bottom == pytest.approx(min(dots), abs=0.02)
    assert len(dots) == 2, "a fresh account's zero lies under the scale"
    assert 'class="lowered"' in chart
    assert "stress, spent, after round 1: 3.1" in chart


def test_no_reserve_is_drawn_where_none_is_left():
    path = BudgetPath("stress", 0, 4.0, (0.0, 3.0, 4.0), (0.0, 3.1))
    chart = budget_chart(path, alt="", show=words.significant)
    assert "reserve" not in chart
    assert "lowered" not in chart


def test_an_overrun_stays_inside_the_picture():
    path = BudgetPath("stress", 0, 4.0, (0.0, 3.0, 3.5), (0.0, 3.1, 5.2))
    chart = budget_chart(path, alt="", show=words.significant)
    assert "stress, spent, after round 2: 5.2" in chart
    assert level(chart, "budget") > svg.TOP


def test_noise_decisions_say_what_was_looked_at_and_why():
    def decisions(k):
        lowered = (make_decision("stress", 0.9, 0.855 if k == 1 else 0.9),)
        return lowered if k < 2 else (make_decision("stress", 0.855, 0.855, metric=None, value=None),)

    _, text = check(build_report(make_private_summary(decisions=decisions), make_private_config(), []))
    in_order(
        text,
        "Noise decisions",
        "2 stress paper 0.9 → 0.855 BERTScore F1 0.4812 < 0.5000, 2 rounds below noised lowered by gamma",
        "Every decision 4, those that kept the noise too",
        "1 stress paper 0.9, kept BERTScore F1 0.4812 < 0.5000, 2 rounds below noised kept",
        "4 stress paper 0.855, kept no metric",
    )


def test_a_public_score_is_not_called_noised():
    summary = make_private_summary(decisions=lambda k: (make_decision("stress", 0.9, 0.8, value_noised=False),))
    _, text = check(build_report(summary, make_config(("stress",)), []))
    assert "0.9 → 0.8 BERTScore F1 0.4812 < 0.5000, 2 rounds below lowered by gamma" in text
    assert "Every decision" not in text


def test_what_each_reduction_costs_is_listed():
    summary = make_private_summary()
    _, text = check(build_report(summary, make_config(("stress",)), []))
    last = summary.plan.domains[0].reductions[-1]
    noise, at_end = words.significant(last.noise_multiplier, 4), words.significant(last.epsilon_at_end, 4)
    assert f"{ROUNDS - 1} {noise} {at_end} +{words.significant(last.epsilon_extra)} the rule's own step" in text


def test_validation_budgets_and_the_noise_in_each_metric():
    views = [make_view(), make_view("stress.gate", epsilon_spent=1.29)]
    html = build_report(make_private_summary(), make_private_config(), [], accounts=views)
    _, text = check(html)
    assert "stress.gate steers noise and promotion 250 5 ± 0.04 0.25 1.31 1.29 2 1e−5" in text
    assert "stress.test steers nothing; gives the final figures 400 2 ± 0.025 0.25 1.31 – 2 1e−5" in text
    assert "± 0.025" in text
    assert "“±” is one standard deviation of that noise" in text
    bertscore, _, _, _, _, worst = charts_of(html)[:6]
    assert bertscore.count('class="error"') == 1 + ROUNDS
    assert "± 0.04" in bertscore
    assert 'class="error"' not in worst


def test_public_metrics_carry_no_noise():
    html = build_report(make_summary(), make_config(), [])
    assert 'class="error"' not in html
    assert "one standard deviation" not in html
    assert "Validation budgets" not in html


def test_a_difference_inside_the_noise_is_not_praised():
    summary = make_summary()
    before, after = summary.baseline, summary.final
    gain = after.bertscore_f1 - before.bertscore_f1
    assert scores(after, before, gain / 4)[0].judgement == "better"
    assert scores(after, before, gain / 2)[0].judgement == "unclear"
    assert scores(after, before, None)[0].judgement == "better"
    worst = next(one for one in scores(after, before, gain / 2) if one.label == "Toxicity, highest")
    assert (worst.noise, worst.judgement) == ("", "better")


def test_the_noise_of_a_mean_over_domains_is_that_of_independent_noises():
    noise = MetricNoise({"a": 0.03, "b": 0.04})
    assert noise.of_mean(["a", "b"]) == pytest.approx(0.025)
    assert noise.of_domain("c") is None
    assert MetricNoise().of_mean(["a"]) is None


def test_shared_posts_and_what_they_mean():
    _, text = check(build_report(make_private_summary(shared_posts=(make_shared_posts(),)), make_private_config(), []))
    assert "stress and wellbeing 41 9.4 when planned 12 2e−5 41 posts are in stress and wellbeing" in text
    assert "somebody whose post is in all of them loses from all of them, up to ε 12 together" in text
    _, text = check(build_report(make_private_summary(), make_private_config(), []))
    assert "Posts that several accounts hold" not in text


def test_shared_posts_count_what_the_ledgers_say_now():
    plans = (make_private_plan(), make_private_plan("wellbeing"))
    summary = make_private_summary(plans, shared_posts=(make_shared_posts(),))
    views = [make_view(), make_view("wellbeing", epsilon_spent=7.2)]
    _, text = check(build_report(summary, make_private_config(("stress", "wellbeing")), [], accounts=views))
    assert "stress and wellbeing 41 11.1 12 2e−5" in text


@pytest.mark.parametrize(
    ("privacy", "accounts", "reason"),
    [
        ({"noise_seed": 1}, (), "the noise was seeded"),
        ({"mode": "none"}, (), "privacy was switched off"),
        ({}, (make_view(private=False),), "the ledger of stress holds a charge for seeded noise"),
        ({}, (make_view(verified=False, problem="entry 3"),), "the ledger of stress is broken"),
    ],
)
def test_not_private_is_on_the_page_the_title_and_every_plot(privacy, accounts, reason):
    html = build_report(make_private_summary(), make_config(("stress",), **privacy), make_samples(), accounts=accounts)
    _, text = check(html)
    assert "<title>NOT PRIVATE: " in html
    assert html.index('class="alarm"') < html.index("<header>")
    assert reason in text.lower()
    assert len(charts_of(html)) == 11
    for chart in charts_of(html):
        assert 'aria-label="NOT PRIVATE. ' in chart
        assert ">NOT PRIVATE</text>" in chart
    assert "times as likely" not in text
    assert "nothing is promised" in text


def test_a_private_study_carries_no_such_mark():
    html = build_report(make_private_summary(), make_config(("stress",)), [], accounts=[make_view()])
    assert "NOT PRIVATE" not in html
    assert 'class="alarm"' not in html


def test_a_broken_ledger_is_shown_with_its_place():
    view = make_view(verified=False, problem="ledger of 'stress' is broken at entry 3", epsilon_spent=None)
    _, text = check(build_report(make_private_summary(), make_config(("stress",)), [], accounts=[view]))
    assert "✗ BROKEN" in text
    assert "is broken at entry 3" in text
    assert "✓ verified" not in text


def test_another_studys_account_in_the_same_ledger_is_left_out():
    other = make_view("elsewhere", private=False)
    html = build_report(make_private_summary(), make_config(("stress",)), [], accounts=[make_view(), other])
    assert "elsewhere" not in html
    assert "NOT PRIVATE" not in html


def test_hostile_text_in_the_new_records_is_only_text():
    evil = '"><script>alert(1)</script>{{ 7 * 7 }}'
    plan = make_private_plan(privacy_unit=evil, rule=evil, policy_sha256=evil, warnings=(evil,), refusals=(evil,))
    shared = make_shared_posts().model_copy(update={"accounts": (evil, "stress")})
    summary = make_private_summary(
        (plan,),
        shared_posts=(shared,),
        decisions=lambda k: (make_decision("stress", 2.0, 1.0, reason=evil, rule=evil),),
    )
    view = make_view(verified=False, problem=evil)
    html = build_report(summary, make_private_config(), [], accounts=[view])
    check(html)
    assert "<script" not in html
    assert "{{ 7 * 7 }}" in html


def test_a_summary_written_before_these_records_still_builds():
    """Schema version 1 grew: what an older ``summary.json`` lacks, the report leaves out."""
    old = json.loads(make_summary().model_dump_json(by_alias=True))
    for plan in old["plan"]["domains"]:
        for name in NEW_PLAN_FIELDS:
            del plan[name]
    for name in ("shared_posts", "warnings"):
        del old["plan"][name]
    for one in old["rounds"]:
        del one["noise_decisions"]
    _, text = check(build_report(StudySummary.model_validate(old), make_config(), make_samples()))
    assert "bertscore_f1 0.48 was below 0.50 for 1 round" in text
    assert "Kept back, in ε 10 % of the budget" in text
    assert "Share of this run" not in text
    assert "none of its own" in text


def test_equal_arguments_give_equal_bytes():
    def build():
        summary = make_private_summary(shared_posts=(make_shared_posts(),))
        return build_report(summary, make_private_config(), [], accounts=[make_view()])

    assert build() == build()
