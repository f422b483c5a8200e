"""Labels: the first-word rule, and F1 against scikit-learn."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from fedmentor_core.evaluation.labels import label_accuracy, label_f1, parse_label


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes, the poster suffers from stress. Reasoning: no sleep.", "yes"),
        ("no, the post does not show this risk. Reasoning: yes is quoted", "no"),
        ("  \n YES", "yes"),
        ('"No." Reasoning: calm.', "no"),
        ("**Yes**, because", "yes"),
        ("No", "no"),
        ("Nobody knows", None),
        ("Yesterday I slept", None),
        ("The answer is yes", None),
        ("Not at all", None),
        ("no_one", None),
        ("", None),
        ("   ", None),
        ("?!", None),
    ],
)
def test_the_first_word_decides(text: str, expected: str | None) -> None:
    assert parse_label(text) == expected


def test_other_answer_forms() -> None:
    answers = ("Stressed", "Not stressed", "Stressed at work")
    assert parse_label("not  stressed: the post is calm", answers) == "Not stressed"
    assert parse_label("STRESSED at work, mostly", answers) == "Stressed at work"
    assert parse_label("Stressed by exams", answers) == "Stressed"
    assert parse_label("Yes", answers) is None
    with pytest.raises(ValueError, match="answers"):
        parse_label("yes", ())
    with pytest.raises(ValueError, match="answers"):
        parse_label("yes", ("yes", "..."))


@given(st.text(max_size=40))
def test_any_text_gives_an_answer_or_none(text: str) -> None:
    assert parse_label(text) in {"yes", "no", None}


@given(st.sampled_from(["yes", "no"]), st.text(max_size=20), st.sampled_from([" ", ",", ".", "\n", ": "]))
def test_what_follows_the_first_word_does_not_matter(answer: str, rest: str, border: str) -> None:
    assert parse_label(f"{answer.upper()}{border}{rest}") == answer


_LABELS = st.sampled_from(["yes", "no", "maybe"])
_PAIRS = st.lists(st.tuples(_LABELS, st.one_of(_LABELS, st.none())), min_size=1, max_size=60)


@given(_PAIRS)
def test_scores_equal_scikit_learn(pairs: list[tuple[str, str | None]]) -> None:
    gold = [g for g, _ in pairs]
    predicted = [p for _, p in pairs]
    as_text = [p if p is not None else "unparsable" for p in predicted]
    labels = sorted({*gold, *predicted} - {None})
    expected = f1_score(gold, as_text, labels=labels, average="macro", zero_division=0)
    assert label_f1(gold, predicted) == pytest.approx(expected, abs=1e-12)
    assert label_accuracy(gold, predicted) == pytest.approx(accuracy_score(gold, as_text), abs=1e-12)


@given(_PAIRS, st.randoms(use_true_random=False))
def test_order_does_not_matter(pairs: list[tuple[str, str | None]], rng: object) -> None:
    shuffled = list(pairs)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    before = label_f1([g for g, _ in pairs], [p for _, p in pairs])
    assert label_f1([g for g, _ in shuffled], [p for _, p in shuffled]) == pytest.approx(before)


def test_an_unparsable_answer_is_wrong_but_no_label() -> None:
    assert label_f1(["yes", "no"], ["yes", "no"]) == 1.0
    # yes: precision 1, recall 1/2; no: 1. The unparsable answer adds no third term to the mean.
    assert label_f1(["yes", "yes", "no"], ["yes", None, "no"]) == pytest.approx((2 / 3 + 1) / 2)
    assert label_f1(["yes", "no"], [None, None]) == 0.0
    assert label_accuracy(["yes", "yes", "no", "no"], ["yes", None, "yes", "no"]) == 0.5


def test_no_examples_have_no_score() -> None:
    with pytest.raises(ValueError, match="at least one"):
        label_f1([], [])
    with pytest.raises(ValueError, match="lengths"):
        label_accuracy(["yes"], [])
