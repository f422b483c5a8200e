"""A corpus with a closed set of labels joins by configuration alone: from its columns to label F1, public and private."""

import csv
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.metrics import f1_score

from fedmentor_core.config_io import load_config
from fedmentor_core.data.describe import describe, render
from fedmentor_core.data.loading import load_study_data
from fedmentor_core.data.mapping import map_rows
from fedmentor_core.data.records import Counter
from fedmentor_core.data.sources import ColumnMapping, answer_form_of
from fedmentor_core.errors import DataError
from fedmentor_core.evaluation.evaluate import metrics_of_rows
from fedmentor_core.evaluation.labels import YES_NO_FORM, AnswerForm, label_f1
from fedmentor_core.evaluation.private_metrics import N_SCORES, cells, metrics_of_means, unit_scores
from fedmentor_core.evaluation.scores import RowScores
from fedmentor_core.privacy.release import release_means

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "infra" / "configs" / "examples" / "another_corpus.yaml"
CAUSES = (
    "school", "family", "social relationships", "romantic relationship", "work", "money", "health", "daily decisions",
    "other",
)  # fmt: skip
COLUMNS = {
    "post": "entry",
    "label": "cause",
    "question_text": "What is the cause?",
    "labels": CAUSES,
    "label_values": {"0": "school", "family life": "family"},
    "answer": "The cause is {label}.",
}


def mapping(**changed):
    values = {**COLUMNS, **changed}
    return ColumnMapping(**{name: value for name, value in values.items() if value is not None})


def build(records, columns, counter=None):
    return map_rows("causes.csv", list(records[0]), records, columns, counter or Counter())


def test_answers_are_built_from_labels_and_codes():
    records = [
        {"entry": "The exam.", "cause": "0", "why": "an exam"},
        {"entry": "My sister.", "cause": " Family Life ", "why": ""},
        {"entry": "The rent.", "cause": "MONEY", "why": "rent"},
    ]
    rows = build(records, mapping(reasoning="why"))
    assert [(row.label, row.response, row.gold) for row in rows] == [
        ("school", "The cause is school. Reasoning: an exam", True),
        ("family", "The cause is family.", True),
        ("money", "The cause is money. Reasoning: rent", True),
    ]


def test_a_label_is_read_from_an_answer_where_there_is_no_label_column():
    records = [
        {"entry": "The exam.", "said": "The cause is school, surely."},
        {"entry": "My sister.", "said": "Social relationships."},
        {"entry": "The rent.", "said": "Hard to say; school?"},
    ]
    rows = build(records, mapping(label=None, response="said", label_values=None))
    assert [(row.label, row.gold) for row in rows] == [("school", False), ("social relationships", False), ("", False)]


def test_an_answer_against_its_label_is_counted():
    counter = Counter()
    records = [{"entry": "The exam.", "cause": "school", "said": "The cause is work."}]
    (row,) = build(records, mapping(response="said"), counter)
    assert (row.label, counter.total().answer_against_label) == ("school", 1)


def test_an_unknown_label_is_refused_without_being_quoted():
    records = [{"entry": "x", "cause": "school"}, {"entry": "y", "cause": "private words"}]
    with pytest.raises(
        DataError, match=r"row 2, column 'cause': a value of 13 characters.*0 \(school\).*label_values"
    ) as e:
        build(records, mapping())
    assert "private" not in str(e.value)
    assert all(cause in str(e.value) for cause in CAUSES)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"labels": ("school",)}, "at least 2 items"),
        ({"labels": ("school", "School!")}, "got 'School!' twice"),
        ({"labels": ("school", "...")}, "at least one letter or digit"),
        ({"labels": ("school", "wo\nrk")}, "one line"),
        ({"yes_values": ("1",)}, "got labels and yes_values"),
        ({"labels": None}, "answer and label_values need 'labels'"),
        ({"label_values": {"1": "schol"}}, "'1' means 'schol', which is no label. Allowed: school, family"),
        ({"label_values": {"SCHOOL": "work"}}, "'SCHOOL' means two labels"),
        ({"label_values": {"a": "work", "A": "money"}}, "'A' means two labels"),
        ({"answer": "It is so."}, "with {label} in it once"),
        ({"answer": "{label} {label}"}, "with {label} in it once"),
        ({"answer": "{label}ness"}, "for 'school' it gives 'schoolness', which reads as no label"),
        ({"labels": ("work", "work life"), "answer": "{label} life"}, "'work life', which reads as 'work life'"),
    ],
)
def test_what_cannot_be_read_back_is_refused(changed, expected):
    if changed.get("labels"):
        changed = {"label_values": None, **changed}
    with pytest.raises(ValidationError, match=re.escape(expected)):
        mapping(**changed)


words = st.text("abcdefgh äß'", min_size=1, max_size=8)


@given(st.lists(words, min_size=2, max_size=6), st.sampled_from(["{label}.", "I say: {label}!", "Cause ({label})"]))
def test_every_accepted_mapping_reads_its_own_answers_back(labels, answer):
    try:
        columns = mapping(labels=tuple(labels), answer=answer, label_values=None)
    except ValidationError:
        return
    for label in labels:
        assert columns.answer_form.parse(columns.answer_of(label) + " Reasoning: no school, no work") == label


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("The cause is work. Reasoning: not school.", "work"),
        ("the CAUSE is: daily   decisions", "daily decisions"),
        ("Work, I think.", "work"),
        ("The cause is workload.", None),
        ("The cause is unclear", None),
        ("I think the cause is work", None),
        ("", None),
    ],
)
def test_the_label_follows_the_opening_or_stands_first(text, label):
    assert AnswerForm(CAUSES, "The cause is").parse(text) == label


def scored(label, answer):
    said = "" if answer == "empty" else f"The cause is {answer}."
    return RowScores(said, "x", 0.5, 0.5, 0.0, True, label, answer if answer in CAUSES else None)


@pytest.fixture
def nine_way():
    dice = random.Random(4)
    pairs = [(c, dice.choice([c, c, c, dice.choice(CAUSES), "nothing", "empty"])) for c in CAUSES for _ in range(60)]
    return [scored(gold, answer) for gold, answer in pairs]


def test_label_f1_is_the_macro_mean_over_the_nine(nine_way):
    gold, answers = [one.label for one in nine_way], [one.answer for one in nine_way]
    expected = f1_score(gold, [a or "none" for a in answers], labels=list(CAUSES), average="macro", zero_division=0)
    assert label_f1(gold, answers) == pytest.approx(expected)
    assert metrics_of_rows(nine_way).label_f1 == pytest.approx(expected)


def test_a_private_nine_way_set_releases_nearly_the_same_label_f1(nine_way):
    """One table of 9 labels: its sensitivity is that of yes and no, and little noise moves the score little."""
    names = [str(index) for index in range(len(nine_way))]
    vectors = unit_scores(nine_way, names, CAUSES)
    assert {len(one.shares) for one in vectors} == {len(cells(CAUSES))} == {10 * 11}
    assert all(sum(one.shares) == 1 and len(one.scores) == N_SCORES for one in vectors)
    means = release_means(vectors, 0.01, random.Random(1))
    released, exact = metrics_of_means(means, len(names), CAUSES), metrics_of_rows(nine_way)
    assert released.label_f1 == pytest.approx(exact.label_f1, abs=0.01)
    assert released.empty_rate == pytest.approx(exact.empty_rate, abs=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_makes_no_label_and_a_rare_one_counts(seed):
    """Three labels always right, a rare one always wrong, five that never occur: the mean is over four."""
    rows = [scored(c, c) for c in CAUSES[:3] for _ in range(300)] + [scored(CAUSES[3], "nothing")] * 60
    vectors = unit_scores(rows, [str(index) for index in range(len(rows))], CAUSES)
    means = release_means(vectors, 1.0, random.Random(seed))
    assert metrics_of_means(means, len(rows), CAUSES).label_f1 == pytest.approx(0.75, abs=0.02)


def test_the_shipped_example_is_a_fourth_domain_by_configuration_alone(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(EXAMPLE)
    assert len(config.domains) == 4
    own = config.domain("stress-causes")
    assert answer_form_of(own.source) == AnswerForm(CAUSES, "The cause is")
    assert answer_form_of(config.domain("crisis-line").source) == YES_NO_FORM
    data = load_study_data([own], config.data)
    with open(EXAMPLE.parent / "stress_causes.csv", encoding="utf-8", newline="") as file:
        n_rows = sum(1 for _ in csv.reader(file)) - 1
    (report,) = describe(data).domains
    assert (report.n_rows, report.n_units, report.yes_share, report.gold_share) == (n_rows, n_rows // 2, None, 1.0)
    assert set(data["stress-causes"].train["label"]) == set(CAUSES)
    for split in data["stress-causes"].splits().values():
        for row in split:
            assert row["response"].startswith(f"The cause is {row['label']}. Reasoning: it is about ")
    assert len(set(data["stress-causes"].train["question"])) == 2


def test_description_counts_each_label(monkeypatch):
    import io

    from rich.console import Console

    monkeypatch.chdir(ROOT)
    config = load_config(EXAMPLE)
    console = Console(width=140, file=io.StringIO())
    console.print(render(describe(load_study_data([config.domain("stress-causes")], config.data))))
    shown = console.file.getvalue()
    assert "Labels other than yes and no" in shown
    assert all(cause in shown for cause in CAUSES)
    assert "exam" not in shown
