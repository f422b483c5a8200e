"""The three corpora's forms, on invented files in their layout."""

import csv

import pytest

from fedmentor_core.data.corpora import CORPORA, read_corpus
from fedmentor_core.data.records import Counter
from fedmentor_core.data.sources import CorpusSource
from fedmentor_core.errors import ConfigError, DataError

STRESS = "Does the poster suffer from stress?"
RAW_DREADDIT = [
    ["text", "post_id", "label"],
    ["The train was late and I ran.", "t1", "1"],
    ["Then I sat down with tea.", "t1", "0"],
    ['Somebody asked: "Well? Question: are we there?" and left.', "t2", "0"],
]


def write(root, name, rows):
    path = root / name
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)


def read(root, **source):
    counter = Counter()
    return read_corpus(CorpusSource(**source), str(root), counter), counter.total()


def test_raw_dreaddit_has_human_labels_units_and_no_reasoning(tmp_path):
    write(tmp_path, "dreaddit/raw_train.csv", RAW_DREADDIT)
    rows, _ = read(tmp_path, kind="dreaddit", files=["dreaddit/raw_train.csv"])
    assert [(r.unit, r.label, r.gold) for r in rows] == [
        ("t1", "yes", True),
        ("t1", "no", True),
        ("t2", "no", True),
    ]
    assert [r.response for r in rows[:2]] == [
        "Yes, the poster suffers from stress.",
        "No, the poster does not suffer from stress.",
    ]


def test_raw_irf_takes_spans_as_reasoning(tmp_path):
    write(
        tmp_path,
        "irf/raw_train.csv",
        [
            ["Unnamed: 0", "text", "belong", "belong_exp", "burden", "burden_exp"],
            ["0", "Nobody came. I don‚Äôt mind.", "1", "nobody  came", "0", ""],
            ["1", "All is well.", "0", "", "1", ""],
        ],
    )
    rows, repairs = read(tmp_path, kind="irf", files=["irf/raw_train.csv"])
    assert [r.response for r in rows] == [
        'Yes, the post shows this risk. Reasoning: the post says "nobody came".',
        "No, the post does not show this risk.",
        "No, the post does not show this risk.",
        "Yes, the post shows this risk.",
    ]
    assert rows[0].post == "Nobody came. I don’t mind."
    assert all(r.gold and r.unit is None for r in rows)
    assert repairs.mojibake == 1


def test_raw_multiwd_asks_six_questions(tmp_path):
    header = ["text", "Spiritual", "Physical", "Intellectual", "Social", "Vocational", "Emotional"]
    write(tmp_path, "multiwd/raw_test.csv", [header, ["I ran.", *"010000"]])
    rows, _ = read(tmp_path, kind="multiwd", files=["multiwd/raw_test.csv"])
    assert [r.label for r in rows] == ["no", "yes", "no", "no", "no", "no"]
    assert rows[1].question == "Does the physical wellness dimension exist in the post?"
    assert rows[1].response == "Yes, this wellness dimension exists in the post."


INSTRUCTION = [
    ["query", "gpt-3.5-turbo"],
    [
        f'Consider this post: "{RAW_DREADDIT[1][0]}" Question: {STRESS}',
        "No, the poster rests. Reasoning: invented.",
    ],
    [
        f'Consider this post: "{RAW_DREADDIT[3][0]}" Question: {STRESS}',
        "No, it does not. Reasoning: invented.",
    ],
    [f'Consider this post: "Nowhere else." Question: {STRESS}', "Yes, it does. Reasoning: invented."],
]
COMPLETION_QUESTION = ' Question: The answer to the question "Does the poster suffers from stress?" is '
COMPLETION = [
    ["post", "question", "response"],
    *(
        ["Post: " + q[21 : q.index('" Question: Does')] + "  ", COMPLETION_QUESTION, " " + a]
        for q, a in INSTRUCTION[1:]
    ),
]
COMPLETION_QUERY = [
    ["query", "gpt-3.5-turbo"],
    *([post + question, answer] for post, question, answer in COMPLETION[1:]),
]


@pytest.mark.parametrize(
    ("form", "content"),
    [("instruction", INSTRUCTION), ("completion", COMPLETION), ("completion", COMPLETION_QUERY)],
)
def test_imhi_forms_of_dreaddit_take_human_labels_and_post_ids(tmp_path, form, content):
    write(tmp_path, "dreaddit/raw_train.csv", RAW_DREADDIT)
    write(tmp_path, "dreaddit/raw_test.csv", [RAW_DREADDIT[0], RAW_DREADDIT[2]])
    write(tmp_path, "dreaddit/imhi.csv", content)
    rows, repairs = read(tmp_path, kind="dreaddit", form=form, files=["dreaddit/imhi.csv"])
    assert [r.post for r in rows] == [RAW_DREADDIT[1][0], RAW_DREADDIT[3][0], "Nowhere else."]
    assert {r.question for r in rows} == {STRESS}
    assert [(r.unit, r.label, r.gold) for r in rows] == [
        ("t1", "yes", True),
        ("t2", "no", True),
        (None, "yes", False),
    ]
    assert rows[0].response.startswith("No, the poster rests.")  # the target stays ChatGPT's
    assert (repairs.malformed, repairs.without_human_label, repairs.answer_against_label) == (1, 1, 1)


def test_without_raw_files_dreaddit_is_refused_unless_its_texts_may_be_units(tmp_path):
    write(tmp_path, "dreaddit/imhi.csv", INSTRUCTION)
    source = {"kind": "dreaddit", "form": "instruction", "files": ["dreaddit/imhi.csv"]}
    with pytest.raises(DataError, match=r"raw_train\.csv.*set human_labels to false"):
        read(tmp_path, **source)
    rows, repairs = read(tmp_path, **source, human_labels=False)
    assert len(rows) == 3
    assert not any(r.gold or r.unit for r in rows)
    assert repairs.without_human_label == 0


def test_a_text_with_two_human_labels_is_not_gold(tmp_path):
    doubled = [*RAW_DREADDIT, [RAW_DREADDIT[1][0], "t0", "0"]]
    write(tmp_path, "dreaddit/raw_train.csv", doubled)
    write(tmp_path, "dreaddit/raw_test.csv", [RAW_DREADDIT[0], RAW_DREADDIT[2]])
    write(tmp_path, "dreaddit/imhi.csv", INSTRUCTION[:2])
    (only,), _ = read(tmp_path, kind="dreaddit", form="instruction", files=["dreaddit/imhi.csv"])
    assert (only.gold, only.label, only.unit) == (False, "no", "t0")


def test_one_unreadable_row_is_dropped_and_counted_many_are_refused(tmp_path):
    broken = ["Nothing of the form, but private words", "Yes."]
    write(tmp_path, "irf/one.csv", [INSTRUCTION[0], broken])
    rows, repairs = read(tmp_path, kind="irf", form="instruction", files=["irf/one.csv"])
    assert (len(rows), repairs.malformed_dropped) == (0, 1)
    write(tmp_path, "irf/two.csv", [INSTRUCTION[0], broken, broken])
    with pytest.raises(DataError, match=r"2 of 2 rows \(the first is row 1\)") as caught:
        read(tmp_path, kind="irf", form="instruction", files=["irf/two.csv"])
    assert "private" not in str(caught.value)


def test_wrong_form_and_wrong_label_name_the_place(tmp_path):
    write(tmp_path, "dreaddit/raw_train.csv", RAW_DREADDIT)
    with pytest.raises(DataError, match=r"form instruction.*post.*does not exist.*'text'"):
        read(tmp_path, kind="dreaddit", form="instruction", files=["dreaddit/raw_train.csv"])
    write(tmp_path, "dreaddit/raw_train.csv", [*RAW_DREADDIT, ["x", "t3", "maybe"]])
    with pytest.raises(DataError, match=r"row 4, column 'label'.*Allowed: 0 and 1") as caught:
        read(tmp_path, kind="dreaddit", files=["dreaddit/raw_train.csv"])
    assert "maybe" not in str(caught.value)


def test_root_must_be_set():
    with pytest.raises(ConfigError, match=r"data\.root is not set"):
        read_corpus(CorpusSource(kind="irf"), None, Counter())


def test_default_files_of_every_form():
    assert {(name, form): len(files) for name, corpus in CORPORA.items() for form, files in corpus.files.items()} == {
        ("dreaddit", "raw"): 2,
        ("dreaddit", "instruction"): 3,
        ("dreaddit", "completion"): 3,
        ("irf", "raw"): 3,
        ("irf", "instruction"): 2,
        ("irf", "completion"): 2,
        ("multiwd", "raw"): 2,
        ("multiwd", "instruction"): 2,
        ("multiwd", "completion"): 2,
    }
