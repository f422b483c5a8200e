import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fedmentor_core.data.invented import CORPORA, fill, generate, speak
from fedmentor_core.errors import DataError

ROOT = Path(__file__).resolve().parents[3]
KEYS = {"unit_id", "post", "question", "response", "label"}
N_UNITS = 400


@pytest.fixture(scope="module")
def corpora():
    return {corpus: generate(corpus, N_UNITS, seed=5) for corpus in CORPORA}


@pytest.mark.parametrize("corpus", list(CORPORA))
def test_rows_have_the_keys_and_one_row_for_each_question(corpora, corpus):
    rows = corpora[corpus]
    questions = CORPORA[corpus].questions
    assert len(rows) == N_UNITS * len(questions)
    assert all(set(row) == KEYS for row in rows)
    by_unit = Counter(row["unit_id"] for row in rows)
    assert len(by_unit) == N_UNITS
    assert set(by_unit.values()) == {len(questions)}
    assert {row["question"] for row in rows} == set(questions)


def test_one_corpus_asks_two_questions_of_a_post_and_no_question_is_shared():
    counts = [len(description.questions) for description in CORPORA.values()]
    assert max(counts) >= 2
    questions = [question for description in CORPORA.values() for question in description.questions]
    assert len(questions) == len(set(questions))
    assert len({description.sensitivity for description in CORPORA.values()}) == 3


@pytest.mark.parametrize("corpus", list(CORPORA))
def test_response_has_the_form_and_agrees_with_the_label(corpora, corpus):
    for row in corpora[corpus]:
        assert re.fullmatch(r"(Yes|No), the [^.]+\. Reasoning: the \w+ [^.]+\.", row["response"]), row["response"]
        assert row["response"].lower().startswith(row["label"])
        assert (" not " in row["response"].split(". Reasoning:")[0]) == (row["label"] == "no")


@pytest.mark.parametrize("corpus", list(CORPORA))
def test_lengths_are_in_range(corpora, corpus):
    for row in corpora[corpus]:
        assert 18 <= len(row["post"].split()) <= 72
        assert 12 <= len(row["response"].split()) <= 36


@pytest.mark.parametrize("corpus", list(CORPORA))
def test_explanation_names_words_of_the_post(corpora, corpus):
    """Nearly every word of the evidence stands in the post: the explanation follows from the text."""
    for row in corpora[corpus]:
        evidence = re.search(r"(?:says that|states that|records that the caller) (.+), \w+ [\w ]+\.$", row["response"])
        assert evidence is not None, row["response"]
        words = re.findall(r"[a-z]+", evidence.group(1).lower())
        post = set(re.findall(r"[a-z]+", row["post"].lower()))
        found = [word in post or word.rstrip("s") in post for word in words]
        assert sum(found) >= 0.5 * len(words) + 1, row


def test_no_marks_are_left_in_the_text(corpora):
    for rows in corpora.values():
        for row in rows:
            assert not set("{}<>") & set(row["post"] + row["response"])


@pytest.mark.parametrize("corpus", list(CORPORA))
def test_labels_follow_the_deciding_statement_and_not_the_rest(corpora, corpus):
    """The same evidence always has the same label."""
    skeletons: dict[tuple[str, str], set[str]] = {}
    for row in corpora[corpus]:
        evidence = row["response"].split("Reasoning: ")[1].rsplit(",", 1)[0]
        skeletons.setdefault((row["question"], evidence), set()).add(row["label"])
    assert all(len(labels) == 1 for labels in skeletons.values())


@pytest.mark.parametrize("corpus", list(CORPORA))
def test_label_balance_is_as_described(corpora, corpus):
    for question, share in zip(CORPORA[corpus].questions, CORPORA[corpus].yes_share, strict=True):
        labels = [row["label"] for row in corpora[corpus] if row["question"] == question]
        assert abs(labels.count("yes") / len(labels) - share) < 0.09


@pytest.mark.parametrize("corpus", list(CORPORA))
def test_posts_differ_within_and_between_seeds(corpora, corpus):
    posts = {row["post"] for row in corpora[corpus]}
    assert len(posts) == N_UNITS
    others = {row["post"] for row in generate(corpus, N_UNITS, seed=6)}
    assert not posts & others


@pytest.mark.parametrize("corpus", list(CORPORA))
def test_seed_fixes_the_corpus_and_a_longer_one_begins_with_the_shorter(corpora, corpus):
    assert generate(corpus, N_UNITS, seed=5) == corpora[corpus]
    n_rows = 50 * len(CORPORA[corpus].questions)
    assert generate(corpus, 50, seed=5) == corpora[corpus][:n_rows]
    assert generate(corpus, 50, seed=6) != corpora[corpus][:n_rows]


def test_generation_does_not_depend_on_the_hash_seed():
    code = "from fedmentor_core.data.invented import generate; print(generate('crisis_notes', 3, 1)[2]['post'])"
    texts = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, cwd=ROOT,
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(texts) == 1


def test_domains_are_not_identically_distributed(corpora):
    """Half of each domain's words or more belong to it alone, and length and style differ."""
    words = {name: Counter(re.findall(r"[\w']+", " ".join(r["post"] for r in rows))) for name, rows in corpora.items()}
    for name, own in words.items():
        for other, theirs in words.items():
            if name != other:
                shared = sum((own & theirs).values()) / sum(own.values())
                assert shared < 0.5, (name, other, shared)
    assert all(row["post"] == row["post"].lower() for row in corpora["peer_forum"])
    assert not any(" my " in row["post"] for row in corpora["crisis_notes"])
    assert all(re.search(r"\d\d:\d\d", row["post"]) for row in corpora["crisis_notes"])


def test_person_is_changed():
    template = "{I have} three reports and {my} sister knows that {I am} tired"
    assert speak(template) == "I have three reports and my sister knows that I am tired"
    third = speak(template, "the writer")
    assert third == "the writer has three reports and their sister knows that they are tired"
    assert speak("{I handed} it in {myself}", "the student") == "the student handed it in themselves"


def test_a_slot_named_twice_gets_two_values():
    import random

    for seed in range(20):
        first, second = fill("<x> <x>", {"x": ("a", "b")}, random.Random(seed)).split()
        assert first != second


def test_bad_arguments_are_refused_with_what_is_allowed():
    with pytest.raises(DataError, match="peer_forum"):
        generate("forum", 3, 1)
    with pytest.raises(DataError, match="0 or more"):
        generate("peer_forum", -1, 1)
    assert generate("peer_forum", 0, 1) == []
