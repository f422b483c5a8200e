"""The report, built from invented records."""

import pytest
from invented_summary import (
    BUDGETS,
    check,
    make_config,
    make_evaluation,
    make_samples,
    make_summary,
)

from fedmentor_core.report import build_report, svg, words, write_report


def test_a_promoted_study_says_what_a_reader_wants():
    html = build_report(make_summary(), make_config(), make_samples())
    _, text = check(html)
    for expected in (
        "invented-study",
        "Promoted",
        "Final result, on the test set",
        "a test set of 144 examples that no decision looked at",
        "fedmentor-adapter v3",
        "@challenger, @champion",
        "2.47 MB",
        "6 min 12 s",
        "all-MiniLM-L6-v2, layer 5",
        "rouge-score 0.1.2, stemmed",
        "fedmentor-toxicity-small, sha256 ab12",
        "bertscore_f1 0.48 was below 0.50 for 1 round",
        "fedmentor run --config study.yaml",
        "steps_per_round: 12",
        "at most 55 times as likely as if any one post had not been in its data",
        "Spent before 0.4 By earlier runs on the same account.",
    ):
        assert expected in text, expected
    assert "> PRIVATE <" in f">{html}<".replace(">PRIVATE<", "> PRIVATE <")
    assert "NOT PRIVATE" not in text
    final, base = make_evaluation(3, list(BUDGETS)), make_evaluation(0, list(BUDGETS))
    assert f"{final.bertscore_f1:.3f}" in text
    assert f"+{final.bertscore_f1 - base.bertscore_f1:.3f}" in text


def test_every_threshold_of_every_round_is_shown():
    html = build_report(make_summary(), make_config(), [])
    assert html.count("✓ pass") == 4 + 2 + 2
    assert html.count("✗ fail") == 2 + 2
    for expected in ("≥ 0.6000", "≥ 0.6600", "≥ 95.0 %", "≤ 0.0500", "not available", "the reference run"):
        assert expected in html


def test_equal_arguments_give_equal_bytes():
    def build():
        return build_report(make_summary(), make_config(), make_samples(), round_samples={1: make_samples()})

    assert build() == build()


def test_figures_have_words_and_tables_have_headers():
    parser, _ = check(build_report(make_summary(), make_config(), make_samples()))
    charts = parser.tags.count("figure")
    assert charts == 3 + 3 + 3 + 2 + 2  # utility, safety, one plan per domain, spending, cost
    labels = [value for tag, name, value in parser.attributes if tag == "svg" and name == "aria-label"]
    assert len(labels) == charts
    assert any("BERTScore F1 on the gate set by round" in label and "stress: from" in label for label in labels)
    assert [v for tag, name, v in parser.attributes if tag == "th" and name == "scope"].count("row") > 10


def test_hostile_text_is_only_text():
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7 * 7 }}"
    summary = make_summary(
        warnings=(evil,),
        study=evil,
        run_id=evil,
        clients=lambda k, lines: [lines[0].model_copy(update={"reason": evil, "domain": evil}), *lines[1:]],
    )
    samples = [
        sample.model_copy(update={"domain": evil, "question": evil, "output": evil, "reference": evil})
        for sample in make_samples(post=evil)
    ]
    html = build_report(summary, make_config(), samples, round_samples={1: samples[:1]})
    _, text = check(html)
    assert "<script" not in html
    assert "<img" not in html
    assert text.count("alert(1)") > 10
    assert "{{ 7 * 7 }}" in text


def test_a_private_gate_set_withholds_samples_even_if_given():
    config = make_config()  # a private gate set may be refused by the config's own rules; the report holds anyway
    private = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"gate_data": "private"})})
    html = build_report(
        make_summary(),
        private,
        make_samples(post="SECRET POST"),
        round_samples={1: make_samples(post="SECRET POST")},
    )
    _, text = check(html)
    assert "SECRET POST" not in html
    assert "Withheld. The gate set is private" in text


def test_passwords_in_addresses_are_blanked():
    html = build_report(make_summary(), make_config(), [])
    assert "hunter2" not in html
    assert "secret" not in html
    assert "tracker:5432" in html


@pytest.mark.parametrize(
    ("privacy", "private", "expected"),
    [
        ({"mode": "none"}, False, "privacy was switched off"),
        ({"noise_seed": 1}, True, "the noise was seeded"),
        ({}, False, "a client trained with no privacy cost on record"),
    ],
)
def test_not_private_is_said_with_its_reason(privacy, private, expected):
    _, text = check(build_report(make_summary(private=private), make_config(**privacy), []))
    assert "NOT PRIVATE" in text
    assert expected.lower() in text.lower()


def test_without_privacy_no_budget_is_invented():
    _, text = check(build_report(make_summary(private=False), make_config(mode="none"), []))
    assert "No budget was spent." in text
    assert "No noise was added." in text
    assert "nothing is promised" in text
    assert "lifetime budget, ε" not in text


def test_a_held_study_shows_gate_scores_as_no_result():
    summary = make_summary(status="held", final=False, passed=False)
    _, text = check(build_report(summary, make_config(), make_samples()))
    assert "No final result. Gate set, round 3" in text
    assert "read them as a diagnosis, not as a result" in text
    assert "FAIL: bertscore_f1 [overall] 0.6410 >= 0.6600 (from the baseline)" in text
    assert "nothing was registered" in text
    assert "Final result" not in text


def test_rested_and_failed_clients_give_their_reasons():
    def clients(k, lines):
        if k < 3:
            return lines
        rested = {
            "status": "rested",
            "reason": "its budget cannot pay for this round",
            "steps": 0,
            "bytes_up": 0,
            "bytes_down": 0,
            "seconds": 0.0,
        }
        failed = {"status": "failed", "reason": "deadline of 30 s passed", "bytes_up": 0}
        return [lines[0].model_copy(update=rested), lines[1].model_copy(update=failed), lines[2]]

    summary = make_summary(status="budget_exhausted", final=False, passed=False, clients=clients)
    _, text = check(build_report(summary, make_config(), []))
    assert "Budget exhausted" in text
    assert "stress rested: its budget cannot pay for this round" in text
    assert "interpersonal failed: deadline of 30 s passed" in text
    assert "1 of 3 clients trained" in text


def test_an_overrun_is_never_hidden():
    def clients(k, lines):
        return [lines[0].model_copy(update={"epsilon_spent": 4.2}), *lines[1:]]

    _, text = check(build_report(make_summary(clients=clients), make_config(), []))
    assert "105.0 % spent: OVER BUDGET" in text
    assert text.count("OVER BUDGET") == 1


def test_one_round_one_domain():
    parser, text = check(build_report(make_summary(("only",), rounds=1), make_config(("only",)), []))
    assert "1 of 1 client trained" in text
    assert "all domains (mean)" not in text
    assert parser.tags.count("figure") == 11


def test_no_round_at_all():
    summary = make_summary(rounds=0, status="failed", final=False)
    parser, text = check(build_report(summary, make_config(), []))
    assert "The study ended before its first round was complete." in text
    assert "figure" not in parser.tags


def test_ten_domains_with_long_names_and_many_rounds():
    names = tuple(f"regional-hospital-network-number-{i}-outpatient-department-text" for i in range(10))
    html = build_report(make_summary(names, rounds=30), make_config(names, rounds=30), make_samples(names))
    _, text = check(html)
    assert all(name in text for name in names)
    assert len(html) < 2_000_000


def test_rounds_count_from_one_whatever_the_records_do():
    zero, one = (build_report(make_summary(first=k), make_config(), []) for k in (0, 1))
    assert zero == one
    assert "Round 3" in one


def test_an_unreleased_maximum_is_said():
    summary = make_summary(final=True)
    summary = summary.model_copy(update={"final": make_evaluation(3, list(BUDGETS), released=False)})
    _, text = check(build_report(summary, make_config(), []))
    assert "not released" in text


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.html"
    assert write_report(path, make_summary(), make_config(), []) == path
    before = path.read_bytes()
    assert before.decode() == build_report(make_summary(), make_config(), [])

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("fedmentor_core.report.html.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, make_summary(status="failed"), make_config(), [])
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.04567, "0.0457"),
        (1e-5, "1e−5"),
        (12345, "12,345"),
        (0.9, "0.9"),
        (-1.5, "−1.5"),
        (None, "–"),
    ],
)
def test_significant_digits(value, shown):
    assert words.significant(value) == shown


def test_differences_are_judged_by_what_is_shown():
    bert, toxicity, safe = (words.METRIC[k] for k in ("bertscore_f1", "toxicity_mean", "safe_rate"))
    assert bert.judge(0.0004) == "same"
    assert bert.show_difference(0.0004) == "±0.000"
    assert bert.judge(-0.01) == "worse"
    assert toxicity.judge(-0.01) == "better"
    assert safe.show_difference(0.021) == "+2.1 points"
    assert safe.show_difference(-0.021) == "−2.1 points"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.512, 0.547), (0, 824_000), (-0.2, 0.3), (0.98, 1.0)])
def test_ticks_span_the_range(low, high):
    found = svg.ticks(low, high)
    assert found[0] <= low + 1e-9
    assert found[-1] >= high - 1e-9
    assert 3 <= len(found) <= 7
