"""Any table by column mapping."""

import pytest

from fedmentor_core.data.mapping import map_rows, read_hub
from fedmentor_core.data.records import Counter, Row, clean
from fedmentor_core.data.sources import ColumnMapping, HubSource
from fedmentor_core.errors import DataError

RECORDS = [
    {"id": "p1", "text": "The bus was late.", "y": "1", "why": "it says late"},
    {"id": "p1", "text": "The bus came.", "y": "No", "why": ""},
]
LABELLED = ColumnMapping(post="text", label="y", question_text="Late?", reasoning="why", unit="id")


def build(records, mapping, counter=None):
    return map_rows("rows.csv", list(records[0]), records, mapping, counter or Counter())


def test_answers_are_built_from_labels_and_reasons():
    assert build(RECORDS, LABELLED) == [
        Row("The bus was late.", "Late?", "Yes. Reasoning: it says late", "yes", True, "p1"),
        Row("The bus came.", "Late?", "No.", "no", True, "p1"),
    ]


def test_answers_that_exist_are_kept_and_their_word_is_no_gold_label():
    records = [
        {"p": "A post.", "q": "Late?", "r": " Yes, it is late. "},
        {"p": "B", "q": "Why?", "r": "Rain."},
    ]
    rows = build(records, ColumnMapping(post="p", question="q", response="r"))
    assert [(r.response, r.label, r.gold, r.unit) for r in rows] == [
        ("Yes, it is late.", "yes", False, None),
        ("Rain.", "", False, None),
    ]


def test_a_label_beside_an_answer_is_gold_and_a_contradiction_is_counted():
    counter = Counter()
    records = [{"p": "A post.", "r": "Yes, late.", "y": "false"}]
    (only,) = build(records, ColumnMapping(post="p", question_text="Late?", response="r", label="y"), counter)
    assert (only.label, only.gold, only.response) == ("no", True, "Yes, late.")
    assert counter.total().answer_against_label == 1


def test_unknown_label_names_row_and_column_but_not_the_value():
    records = [*RECORDS, {"id": "p2", "text": "x", "y": "private words", "why": ""}]
    with pytest.raises(DataError, match=r"row 3, column 'y': a value of 13 characters.*1, yes, true") as caught:
        build(records, LABELLED)
    assert "private" not in str(caught.value)


def test_a_unit_column_must_be_filled():
    with pytest.raises(DataError, match="row 1 has an empty value in the unit column 'id'"):
        build([{**RECORDS[0], "id": " "}], LABELLED)


def test_rows_are_repaired_once_and_counted_once():
    counter = Counter()
    (only,) = build([{"id": "p", "text": "I don‚Äôt", "y": "1", "why": "he can‚Äôt"}], LABELLED, counter)
    assert (only.post, only.response) == ("I don’t", "Yes. Reasoning: he can’t")
    assert counter.total().mojibake == 1


def test_duplicates_and_empty_rows_are_dropped_whatever_the_order():
    rows = [
        Row("A post.", "Late?", "Yes.", "yes", True, "p2"),
        Row("A  post.", "Late?", "No.", "no", True, "p1"),
        Row("A post.", "Cold?", "No.", "no", True, "p2"),
        Row("", "Late?", "No.", "no", True, "p3"),
        Row("B post.", "Late?", "", "", True, "p4"),
    ]
    counter = Counter()
    kept = clean(rows, lambda row: row.unit, counter)
    assert {(r.unit, r.question) for r in kept} == {("p1", "Late?"), ("p2", "Cold?")}
    repairs = counter.total()
    assert (repairs.duplicates_dropped, repairs.conflicting_labels, repairs.empty_dropped) == (1, 1, 2)
    assert set(clean(rows[::-1], lambda row: row.unit, Counter())) == set(kept)


def test_hub_source_reads_what_datasets_can_load_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "owned"
    folder.mkdir()
    (folder / "train.csv").write_text("text,y\nThe bus was late.,1\nThe bus came.,0\n")
    mapping = ColumnMapping(post="text", label="y", question_text="Late?")
    import datasets

    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: load(*args, cache_dir=tmp_path / "cache", **kwargs)
    )
    rows = read_hub(HubSource(name=str(folder), columns=mapping), Counter())
    assert [row.label for row in rows] == ["yes", "no"]
    with pytest.raises(DataError, match="cannot be loaded"):
        read_hub(HubSource(name=str(folder), split="nosuch", columns=mapping), Counter())
