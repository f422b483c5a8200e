"""What the Prefect artifacts say of privacy."""

import json

from fedmentor_core.records import NoiseDecision, SharedPosts, ValidationPlan
from fedmentor_core.report.words import NOT_PRIVATE
from tasks.reporting import gate_markdown, plan_rows, result_markdown, shared_rows, validation_rows


def decision(domain="sleep", after=0.95, **overrides):
    values = {
        "domain": domain,
        "rule": "paper",
        "noise_before": 1.0,
        "noise_after": after,
        "reason": "below for 1 round",
        "metric": "bertscore_f1",
        "value": 0.4321,
        "value_noised": True,
        "threshold": 0.5,
        "rounds_below": 1,
        "spent_rdp": 0.1,
        "run_rdp_budget": 1.0,
        "least_noise": 0.6,
        "remaining_steps": 4,
    }
    return NoiseDecision(**{**values, **overrides})


def private_set(domain):
    return ValidationPlan(
        account=f"{domain}.gate",
        split="gate",
        n_units=250,
        releases=3,
        noise_multiplier=10.0,
        metric_std=0.04,
        epsilon_budget=2.0,
        delta=1e-5,
        epsilon_spent_before=0.0,
        epsilon_planned=1.31,
        rdp_order=12.0,
        rdp_budget=0.9,
        run_rdp_budget=0.9,
        dataset_fingerprint="e" * 64,
    )


def test_the_plan_table_holds_the_whole_promise(study):
    plan = study.plan()
    first = plan.domains[0].model_copy(
        update={"planned_runs": 30, "runs_before": 7, "reserve_epsilon": 0.4, "noise_schedule": (1.0, 0.8),
                "privacy_unit": "patient", "policy_sha256": "9f3ab81c44d0" + "0" * 52, "sensitivity": "high"}
    )  # fmt: skip
    row, plain = plan_rows(plan.model_copy(update={"domains": (first, plan.domains[1])}))
    assert (row["epsilon budget"], row["delta"], row["protected"], row["sensitivity"]) == (8.0, 1e-5, "patient", "high")
    assert (row["run"], row["kept back (epsilon)"], row["noise in the last round"]) == ("8 of 30", 0.4, 0.8)
    assert row["site policy"] == "9f3ab81c44d0"
    assert (plain["run"], plain["noise in the last round"]) == ("1 of 1", 1.0)
    client_level = first.model_copy(update={"privacy_level": "client"})
    assert plan_rows(plan.model_copy(update={"domains": (client_level,)}))[0]["protected"] == "the whole client"


def test_private_sets_and_shared_posts_have_tables_of_their_own(study):
    plan = study.plan()
    domains = tuple(one.model_copy(update={"validation": (private_set(one.domain),)}) for one in plan.domains)
    shared = SharedPosts(accounts=("stress", "sleep"), n_posts=3, epsilon_spent=2.0, epsilon_budget=16.0, delta=2e-5)
    plan = plan.model_copy(update={"domains": domains, "shared_posts": (shared,)})
    assert [row["account"] for row in validation_rows(plan)] == ["stress.gate", "sleep.gate"]
    assert validation_rows(plan)[0]["noise in each metric (std)"] == 0.04
    assert shared_rows(plan)[0]["epsilon budget together"] == 16.0
    assert json.dumps([plan_rows(plan), validation_rows(plan), shared_rows(plan)], allow_nan=False)


def test_every_noise_decision_is_told_with_its_inputs(study):
    one = study.round(1).model_copy(
        update={"noise_decisions": (decision(), decision("stress", 1.0, metric=None, value=None, reason="fixed"))}
    )
    told = gate_markdown(one).splitlines()
    assert "- sleep: 1 → 0.95, rule paper, bertscore_f1 0.4321 (noised) against 0.5000 (below for 1 round)" in told
    assert "- stress: 1 kept, rule paper, no metric (fixed)" in told
    assert sum("sleep" in line for line in told) == 1, "the change is not told a second time"


def test_changes_of_older_rounds_are_still_told(study):
    assert "- sleep: 1 → 0.95 (below 0.5)" in gate_markdown(study.round(0)).splitlines()


def test_a_study_that_was_not_private_says_so_first(study):
    summary = study.summary()
    assert NOT_PRIVATE not in result_markdown(summary, "report.html")
    told = result_markdown(summary.model_copy(update={"private": False}), "report.html")
    assert NOT_PRIVATE in told.partition("| metric")[0]
