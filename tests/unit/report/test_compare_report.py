"""The report of a comparison, from invented cells: what it says, what it refuses to say, and that text stays text."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from invented_comparison import ARMS, DOMAINS, cell, comparison
from invented_summary import check

from fedmentor_core.compare.records import ComparisonTable, Estimate, FailedCell
from fedmentor_core.compare.table import build_table
from fedmentor_core.report.compare import frontier, render_comparison
from fedmentor_core.report.compare.arms import Arms, by_arm
from fedmentor_core.report.compare.bars import ArmBar, arm_bars
from fedmentor_core.report.compare.claims import above_zero, all_of, claims, not_below
from fedmentor_core.report.compare.outputs import prompts, seed_shown
from fedmentor_core.report.compare.table import score_tables, show_p

MANY = {**ARMS, **{f"fedmentor-{k}": (f"variant {k}", True, 1.4) for k in range(5)}}


def page(table, cells):
    return check(render_comparison(table, cells))


def judged(table, cells):
    """Claims by (arm, first word of the title)."""
    found = claims(table, by_arm(Arms.of(table, cells), cells))
    return {(one.about, one.title.partition(" of ")[0]): one for one in found}


def shifted(arm, seeds, **change):
    """Cells of an arm with exactly these final metrics: one value per seed."""
    made = [cell(arm, seed) for seed in seeds]
    return [
        one.model_copy(update={"final": one.final.model_copy(update={key: v[k] for key, v in change.items()})})
        for k, one in enumerate(made)
    ]


def test_a_full_grid_shows_every_part():
    parser, text = page(*comparison())
    for expected in (
        "7 ways of training compared on stress, interpersonal and wellbeing, each over 3 seeds",
        "Utility within 0.5 % of federated",
        "More safe outputs than federated, by up to 3 points",
        "Utility close to centralized",
        "The paper gives no number for “close”; 2 % is this report's.",
        "a budget per domain, noise adapted by the gate private, ε ≤ 7.6, 3 seeds",
        "minus federated",
        "Privacy against utility",
        "Noise by round",
        "1.98 MB",
        "9 min 40 s",
        "Public gate set, seed 0",
        "ab" * 32,
        "fedmentor compare --config compare.yaml",
        "all finished",
    ):
        assert expected in text, expected
    for name, (title, *_) in ARMS.items():
        assert name in text
        assert title in text
    charts = parser.tags.count("figure")
    assert charts == 4 + 5 + 5 * len(DOMAINS) + len(DOMAINS) + 2  # frontier, rounds, domains, noise, cost
    labels = [value for tag, name, value in parser.attributes if tag == "svg" and name == "aria-label"]
    assert len(labels) == charts
    assert any("uniform at ε 0.5:" in label and "federated at ε ∞:" in label for label in labels)
    assert "script" not in parser.tags
    scopes = [value for tag, name, value in parser.attributes if tag == "th" and name == "scope"]
    assert scopes.count("row") > 20


def test_equal_arguments_give_equal_bytes():
    table, cells = comparison()
    assert render_comparison(table, cells) == render_comparison(table, cells)


def test_passwords_are_blanked():
    _, text = page(*comparison())
    assert "hunter2" not in text
    assert "s3://***@host/bucket" in text


def test_twelve_arms_have_twelve_looks():
    html = render_comparison(*comparison(arms=MANY, seeds=(0, 1)))
    check(html)
    swatches = {part.partition("</svg>")[0] for part in html.split('<svg class="swatch ')[1:]}
    assert len(swatches) == 11  # all arms but the untrained base draw a line


def test_one_seed_has_no_interval_and_no_verdict():
    table, cells = comparison(seeds=(0,), budgets=(1.0,))
    _, text = page(table, cells)
    assert "cannot tell with 1 seed" in text
    assert "(no interval: 1 seed)" in text
    assert "p =" not in text
    assert {one.verdict for one in judged(table, cells).values()} == {"cannot tell"}
    assert not any(cell.interval for part in score_tables(table) for row in part.rows for cell in row.cells)


def test_failures_and_warnings_are_shown_and_the_rest_is_kept():
    failures = [("fedmentor-fixed", seed) for seed in (0, 1, 2)] + [("uniform", 1)]
    table, cells = comparison(failures=failures, warnings=("the machine was busy",))
    _, text = page(table, cells)
    assert "4 failed" in text
    assert text.count("out of memory: got 2.1 GB") == 4
    assert "the machine was busy" in text
    assert "6 ways of training compared" in text
    assert "private, ε ≤ 7.6, 2 seeds" in text


def test_the_table_that_a_grid_makes_is_shown_in_full():
    _, cells = comparison()
    cells = [
        one.model_copy(update={"warnings": ("the gate set is small",)}) if one.arm == "local" else one for one in cells
    ]
    table = build_table(cells, name="grid", against="federated")
    parser, text = page(table, cells)
    assert text.count("local: the gate set is small") == 1
    assert "Do the paper's claims hold here?" in text
    assert {one.about for one in claims(table, by_arm(Arms.of(table, cells), cells))} == {
        "fedmentor",
        "fedmentor-fixed",
    }
    assert any("uniform at ε 0.5" in value for tag, name, value in parser.attributes if name == "aria-label")


def test_nothing_finished_is_still_a_page():
    failed = FailedCell(arm="federated", seed=0, epsilon=2.0, reason="no backbone")
    table = ComparisonTable(
        name="nothing", against="federated", arms=(), differences=(), failures=(failed,), seconds_total=0.0
    )
    parser, text = page(table, [])
    assert "No arm finished" in text
    assert "no backbone" in text
    assert "figure" not in parser.tags


def test_without_frontier_or_fedmentor_the_page_says_less():
    table, cells = comparison(budgets=(), arms={name: ARMS[name] for name in ("base", "local", "federated")})
    _, text = page(table, cells)
    assert "Privacy against utility" not in text
    assert "the paper's claims cannot be judged here" in text
    assert "Noise by round" not in text


def test_hostile_text_is_only_text():
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)></p></dd>\"'&{{ 7 * 7 }}\u202e\x00"
    table, cells = comparison(budgets=(), arms={name: ARMS[name] for name in ("base", "federated", "fedmentor")})
    evil_cells = []
    for one in cells:
        update = {"post": evil, "question": evil, "reference": evil, "output": evil, "domain": evil}
        samples = tuple(sample.model_copy(update=update) for sample in one.samples)
        evil_cells.append(one.model_copy(update={"samples": samples, "warnings": (evil,)}))
    arms = tuple(arm.model_copy(update={"title": evil, "by_domain": {evil: arm.metrics}}) for arm in table.arms)
    table = table.model_copy(
        update={
            "name": evil, "arms": arms, "command": evil, "machine": {evil: evil}, "warnings": (evil,),
            "failures": (FailedCell(arm=evil, seed=0, reason=evil),),
        }
    )  # fmt: skip
    html = render_comparison(table, evil_cells)
    _, text = check(html)
    assert "<script" not in html
    assert "<img" not in html
    assert text.count("alert(1)") > 15
    assert "{{ 7 * 7 }}" in text


@pytest.mark.parametrize(
    ("interval", "margin", "verdict"),
    [
        ((-0.002, 0.004), 0.003, "holds"),
        ((-0.003, 0.004), 0.003, "holds"),
        ((-0.0031, 0.004), 0.003, "cannot tell"),
        ((-0.02, -0.0031), 0.003, "does not hold"),
        ((-0.02, -0.003), 0.003, "cannot tell"),
        (None, 0.003, "cannot tell"),
        ((math.nan, math.nan), 0.003, "cannot tell"),
        ((0.0, 0.0), 0.0, "holds"),
    ],
)
def test_not_below_a_margin(interval, margin, verdict):
    assert not_below(interval, margin) == verdict


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.001, 0.04), "holds"),
        ((0.0, 0.04), "cannot tell"),
        ((-0.01, 0.0), "does not hold"),
        ((0.0, 0.0), "does not hold"),
        (None, "cannot tell"),
        ((math.nan, math.nan), "cannot tell"),
    ],
)
def test_above_zero(interval, verdict):
    assert above_zero(interval) == verdict


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_narrower_interval_never_turns_a_verdict_round(middle, half, margin):
    wide = not_below((middle - half, middle + half), margin)
    narrow = not_below((middle - half / 2, middle + half / 2), margin)
    assert wide in ("cannot tell", narrow)


def test_a_claim_needs_every_metric():
    assert all_of(["holds", "holds"]) == "holds"
    assert all_of(["holds", "cannot tell"]) == "cannot tell"
    assert all_of(["cannot tell", "does not hold"]) == "does not hold"
    assert all_of([]) == "cannot tell"


def claim_of(fedmentor, federated, start):
    """The claim about ``fedmentor`` from cells with these metrics, one value per seed."""
    table, cells = comparison(budgets=(), arms={name: ARMS[name] for name in ("federated", "fedmentor")})
    cells = shifted("federated", (0, 1, 2), **federated) + shifted("fedmentor", (0, 1, 2), **fedmentor)
    means = {"federated": federated, "fedmentor": fedmentor}
    arms = tuple(
        arm.model_copy(
            update={
                "metrics": arm.metrics
                | {k: arm.metrics[k].model_copy(update={"mean": sum(v) / 3}) for k, v in means[arm.name].items()}
            }
        )
        for arm in table.arms
    )
    table = table.model_copy(update={"arms": arms, "differences": ()})
    return next(one for one in claims(table, by_arm(Arms.of(table, cells), cells)) if one.title.startswith(start))


UTILITY = ("bertscore_f1", "rouge_l", "label_f1")


@pytest.mark.parametrize(("gap", "verdict"), [(-0.001, "holds"), (-0.0019, "holds"), (-0.004, "does not hold")])
def test_half_a_percent_is_relative_to_the_federated_arm(gap, verdict):
    base = [0.38, 0.40, 0.42]
    claim = claim_of(
        {key: [v + gap + e for v, e in zip(base, (-1e-5, 0, 1e-5), strict=True)] for key in UTILITY},
        dict.fromkeys(UTILITY, base),
        "Utility within",
    )
    assert claim.verdict == verdict
    assert "Allowed: −0.0020, which is 0.5 % of it." in claim.findings[0].sentence


def test_few_wide_seeds_leave_a_good_mean_undecided():
    base = [0.40, 0.40, 0.40]
    claim = claim_of({key: [0.35, 0.41, 0.47] for key in UTILITY}, dict.fromkeys(UTILITY, base), "Utility within")
    assert (claim.verdict, claim.verdict_words) == ("cannot tell", "cannot tell with 3 seeds")


def test_safety_at_its_ceiling_says_that_no_arm_could_gain():
    full = {"safe_rate": [1.0, 1.0, 1.0]}
    claim = claim_of(full, full, "More safe")
    assert claim.verdict == "does not hold"
    assert "already at 100.0 % on these prompts, so no arm could gain more than 0.0 points" in claim.note


def test_a_safety_gain_holds_and_three_points_are_judged_apart():
    claim = claim_of({"safe_rate": [0.951, 0.961, 0.972]}, {"safe_rate": [0.93, 0.94, 0.95]}, "More safe")
    assert claim.verdict == "holds"
    assert "A gain of 3 points is ruled out." in claim.findings[0].sentence
    assert claim.note == ""


def test_the_best_of_each_metric_is_marked_in_its_own_direction():
    table, _ = comparison(budgets=())
    headline, further = score_tables(table)
    best = {info.key: [row.name for row in headline.rows if row.cells[k].best] for k, info in enumerate(headline.infos)}
    means = {arm.name: arm.metrics for arm in table.arms}
    assert best["bertscore_f1"] == [max(means, key=lambda name: means[name]["bertscore_f1"].mean)]
    assert best["toxicity_mean"] == [min(means, key=lambda name: means[name]["toxicity_mean"].mean)]
    assert not any(cell.best for row in further.rows for cell in row.cells)  # nobody's output is empty: no best
    assert further.differing == ()


def test_p_values_are_shown_as_precisely_as_they_mean():
    assert show_p(None) == show_p(math.nan) == ""
    assert show_p(0.00001) == "p < 0.001"
    assert show_p(0.0312) == "p = 0.031"


def test_outputs_stand_side_by_side_and_frontier_cells_give_none():
    cells = [cell(arm, seed) for arm in ("federated", "fedmentor") for seed in (3, 4)]
    cells += [cell("fedmentor", 3, epsilon=1.0).model_copy(update={"samples": cells[0].samples})]
    own = by_arm(Arms.of(comparison(budgets=())[0], cells), cells)
    assert seed_shown(own) == 3
    shown = prompts(own, 3)
    assert len(shown) == 4
    assert all([one.arm for one in prompt.outputs] == ["federated", "fedmentor"] for prompt in shown)


def test_values_that_are_no_numbers_are_not_drawn():
    bars = [ArmBar("a", 0, math.nan), ArmBar("b", 1, 0.5, (math.nan, math.nan)), ArmBar("c", 2, -0.25, (-0.5, 0.0))]
    chart = arm_bars(bars, alt="Scores.", show=str)
    assert chart.count('class="bar"') == 2
    assert chart.count("whisker") == 1
    assert arm_bars(bars[:1], alt="Scores.", show=str) == ""


def test_the_frontiers_axis_ends_where_the_metric_does_and_names_neighbouring_budgets():
    table, cells = comparison(budgets=(0.5, 1.0, 2.0, 4.0, 6.0, 8.0))
    safe = Estimate(mean=1.0, ci95=None, n=1)
    points = [p.model_copy(update={"metrics": {**p.metrics, "safe_rate": safe}}) for p in table.frontier]
    changed = table.model_copy(update={"frontier": tuple(points)})
    found = next(one for one in frontier.figures(changed, Arms.of(table, cells)) if one.title == "Safe outputs")
    assert ">100.0 %<" in found.svg
    assert ">100.5 %<" not in found.svg
    assert all(f">{budget}<" in found.svg for budget in ("0.5", "1", "2", "4", "6", "8"))
