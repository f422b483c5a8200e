"""The report, built from invented records."""

import math
import re
from html.parser import HTMLParser

import pytest

from fedmentor_core.config import StudyConfig
from fedmentor_core.records import (
    AdapterSummary,
    BackboneSummary,
    ClientSummary,
    DomainPlan,
    EvaluationMetrics,
    GateSummary,
    Metrics,
    ModelSummary,
    NoiseChange,
    RoundSummary,
    Sample,
    ScorerIdentities,
    StudyPlan,
    StudySummary,
    ThresholdResult,
)
from fedmentor_core.report import build_report, svg, words, write_report

BUDGETS = {"stress": 4.0, "interpersonal": 6.0, "wellbeing": 8.0}


def make_config(domains=tuple(BUDGETS), rounds=3, **privacy):
    return StudyConfig.model_validate(
        {
            "name": "invented-study",
            "rounds": rounds,
            "domains": [
                {"name": name, "source": {"kind": "invented", "corpus": name, "n_units": 300}, "epsilon": 4.0}
                for name in domains
            ],
            "privacy": privacy,
            "evaluation": {"gate_data": "public"},
            "tracking": {"uri": "postgresql://mlflow:hunter2@tracker:5432/db"},
        }
    )


def make_metrics(step, shift=0.0, n=24, released=True):
    gain = 1 - math.exp(-0.9 * step)
    return {
        "bertscore_f1": 0.52 + shift + 0.14 * gain,
        "rouge_l": 0.11 + shift + 0.22 * gain,
        "label_f1": 0.34 + 2 * shift + 0.36 * gain,
        "safe_rate": 0.93 + shift / 2 + 0.05 * gain,
        "toxicity_mean": 0.061 - shift / 3 - 0.05 * gain,
        "toxicity_max": 0.71 - 3 * shift - 0.5 * gain if released else None,
        "empty_rate": 0.0,
        "n_examples": n,
    }


def make_evaluation(step, domains, n=24, released=True):
    own = {name: Metrics(**make_metrics(step, 0.02 * (i % 3 - 1), n, released)) for i, name in enumerate(domains)}
    return EvaluationMetrics(**make_metrics(step, 0.0, n * len(domains), released), by_domain=own)


def make_gate(passed):
    results = (
        ThresholdResult(
            metric="bertscore_f1",
            scope="overall",
            value=0.641,
            comparison=">=",
            bound=0.6 if passed else 0.66,
            relative_to="baseline",
            passed=passed,
        ),
        ThresholdResult(
            metric="safe_rate",
            scope="overall",
            value=0.981,
            comparison=">=",
            bound=0.95,
            relative_to="none",
            passed=True,
        ),
        ThresholdResult(
            metric="label_f1",
            scope="stress",
            value=None,
            comparison=">=",
            bound=0.42,
            relative_to="reference",
            passed=passed,
        ),
        ThresholdResult(
            metric="toxicity_mean",
            scope="overall",
            value=0.0153,
            comparison="<=",
            bound=0.05,
            relative_to="none",
            passed=True,
        ),
    )
    return GateSummary(passed=passed, reasons=tuple(str(r) for r in results if not r.passed), results=results)


def make_client(domain, k, i, private, share):
    budget = 4.0 + 2.0 * (i % 3)
    return ClientSummary(
        domain=domain,
        status="trained",
        n_units=1400 + 300 * i,
        sample_rate=0.0457,
        steps=12,
        noise_multiplier=(0.92 - 0.1 * (i % 3)) * (0.95 if k > 2 and i == 0 else 1.0) if private else None,
        clip_norm=1.0,
        epsilon_spent=budget * share if private else None,
        epsilon_budget=budget if private else None,
        delta=1e-5 if private else None,
        bytes_up=412_000,
        bytes_down=412_000,
        seconds=21.3 + 6 * i + k,
    )


def make_summary(
    domains=tuple(BUDGETS),
    rounds=3,
    status="promoted",
    private=True,
    final=True,
    passed=True,
    clients=None,
    first=1,
    **overrides,
):
    made = []
    for k in range(1, rounds + 1):
        lines = [make_client(name, k, i, private, 0.93 * math.sqrt(k / rounds)) for i, name in enumerate(domains)]
        if clients is not None:
            lines = clients(k, lines)
        changes = ()
        if private and k == 2 and rounds > 2:
            changes = (
                NoiseChange(
                    domain=domains[0],
                    from_=0.92,
                    to=0.874,
                    reason="bertscore_f1 0.48 was below 0.50 for 1 round",
                ),
            )
        made.append(
            RoundSummary(
                round_index=k - 1 + first,
                clients=tuple(lines),
                metrics=make_evaluation(k, domains),
                gate=make_gate(passed and k == rounds),
                noise_changes=changes,
                bytes_total=824_000 * len(domains),
                seconds=101.2,
            )
        )
    plans = tuple(
        DomainPlan(
            domain=name,
            n_units=1400 + 300 * i,
            sample_rate=0.0457,
            steps_per_round=12,
            rounds=rounds,
            noise_multiplier=0.92 - 0.1 * (i % 3) if private else None,
            min_noise_multiplier=0.3,
            clip_norm=1.0,
            delta=1e-5 if private else None,
            sensitivity=("high", "medium", "low")[i % 3],
            epsilon_budget=4.0 + 2.0 * (i % 3) if private else None,
            epsilon_spent_before=0.4 if private and i == 1 else None,
            epsilon_planned_rdp=3.6 if private else None,
            epsilon_planned_prv=3.2 if private else None,
            rdp_order=8.0 if private else None,
            rdp_budget=2.1 if private else None,
            reserve_fraction=0.1,
            dataset_fingerprint="f" * 64,
            bytes_up_per_round=412_000,
            bytes_down_per_round=412_000,
        )
        for i, name in enumerate(domains)
    )
    values = {
        "run_id": "run-7f3a",
        "study": "invented-study",
        "status": status,
        "private": private,
        "config_sha256": "c" * 64,
        "backbone": BackboneSummary(name="embedded", n_parameters=4_700_000, sha256="b" * 64),
        "adapter": AdapterSummary(
            rank=8,
            alpha=16.0,
            target_modules=("q_proj", "v_proj"),
            train="b",
            n_trainable=102_400,
            n_bytes=411_000,
        ),
        "scorers": ScorerIdentities(
            bertscore="all-MiniLM-L6-v2, layer 5",
            rouge="rouge-score 0.1.2, stemmed",
            toxicity="fedmentor-toxicity-small, sha256 ab12",
            safe_threshold=0.5,
        ),
        "baseline": make_evaluation(0, domains, n=48),
        "baseline_gate": make_evaluation(0, domains),
        "rounds": tuple(made),
        "selected_round": rounds - 1 + first if final and rounds else None,
        "final": make_evaluation(rounds, domains, n=48) if final else None,
        "plan": StudyPlan(domains=plans, bytes_per_round=824_000 * len(domains), refusals=()),
        "model": ModelSummary(name="fedmentor-adapter", version="3", aliases=("challenger", "champion"))
        if status == "promoted"
        else None,
        "store_url": "s3://someone:secret@bucket/prefix",
        "seconds_total": 372.4,
    }
    return StudySummary(**{**values, **overrides})


def make_samples(domains=tuple(BUDGETS), post="I can't sleep before exams & my hands shake."):
    return [
        Sample(
            domain=name,
            post=post,
            question="Does the poster suffer from stress?",
            reference="Yes. Reasoning: the poster names sleeplessness.",
            output="Yes. Reasoning: the poster cannot sleep.",
            bertscore_f1=0.83,
            rouge_l=0.44,
            toxicity=0.002,
        )
        for name in domains
        for _ in range(2)
    ]


VOID = {"meta", "br", "link", "img", "hr", "input"}


class Checker(HTMLParser):
    """Tags balance; every address and text is kept."""

    def __init__(self):
        super().__init__()
        self.stack, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if not self.stack or self.stack[-1] != "style":
            self.text.append(data)


def check(html):
    parser = Checker()
    parser.feed(html)
    parser.close()
    assert parser.stack == []
    ids = [value for _, name, value in parser.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for tag, name, value in parser.attributes:
        assert not name.startswith("on"), f"{tag} has a handler"
        if name == "href":
            assert value.startswith("#")
            assert value[1:] in ids
        assert name not in ("src", "srcset", "action", "data", "xlink:href", "style")
    assert not {"script", "iframe", "object", "embed", "link", "img", "form", "base"} & set(parser.tags)
    assert not re.search(r"url\(|@import", html)
    assert not re.search(r'(d|x|y|width|height)="[^"]*(nan|inf)', html)
    return parser, re.sub(r"\s+", " ", " ".join(parser.text))


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
        "Earlier studies had already spent 0.4 of it",
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
    assert charts == 3 + 3 + 2 + 2
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
    assert parser.tags.count("figure") == 10


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
