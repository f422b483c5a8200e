"""From generated text to a label, and from labels to F1. Pure functions, no model library."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

_WORD = re.compile(r"\w+(?:['’]\w+)*")
# An apostrophe belongs to its word: "No's" and "don't" are one word each.
YES_NO = ("yes", "no")
"""The answer words of the three corpora's instruction form (``Yes, ... Reasoning: ...``)."""


def parse_label(text: str, answers: Sequence[str] = YES_NO) -> str | None:
    """The answer that a text opens with, or None when it opens with none of them.

    The rule is the first word: what the text says later does not count, because an explanation may quote the
    other answer. Case, white space and punctuation before the answer are ignored; the answer must end at a
    word border, so that "Nobody" is not "no". Answers may have several words ("not stressed"); the longest
    that fits wins.

    Args:
        text: The generated text, or a reference in the same form.
        answers: The answers that exist, in the form that is returned.

    Returns:
        The matching element of ``answers``, or None.

    Raises:
        ValueError: ``answers`` is empty, or holds an answer without a letter or digit.
    """
    expected = _longest_first(tuple(answers))
    words = _words(text, at_most=len(expected[0][0]))
    return next((answer for opening, answer in expected if words[: len(opening)] == opening), None)


@lru_cache(maxsize=64)
def _longest_first(answers: tuple[str, ...]) -> list[tuple[list[str], str]]:
    expected = [(_words(answer), answer) for answer in answers]
    if not expected or not all(words for words, _ in expected):
        raise ValueError(f"answers: need at least one, each with a letter or digit, got {len(answers)} answers")
    return sorted(expected, key=lambda pair: -len(pair[0]))


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How a domain's answers say their label.

    Attributes:
        answers: the closed set of labels, in the form that is returned. No two may have the same words.
        opening: what stands before the label, such as "The cause is"; empty where the label comes first.
    """

    answers: tuple[str, ...] = YES_NO
    opening: str = ""

    def parse(self, text: str) -> str | None:
        """The label that follows the opening, else the one that the text opens with, or None.

        A text without the opening counts by its first words: a model that answers with the bare label has answered.
        """
        opening = _words(self.opening)
        if opening:
            words = _words(text)
            if words[: len(opening)] == opening:
                found = parse_label(" ".join(words[len(opening) :]), self.answers)
                if found is not None:
                    return found
        return parse_label(text, self.answers)


YES_NO_FORM = AnswerForm()
"""The form of the three corpora."""


def label_accuracy(gold: Sequence[str], predicted: Sequence[str | None]) -> float:
    """Share of examples with the right label; an unparsable answer (None) is wrong.

    Raises:
        ValueError: No examples, or lengths differ.
    """
    _check(gold, predicted)
    return sum(g == p for g, p in zip(gold, predicted, strict=True)) / len(gold)


def label_f1(gold: Sequence[str], predicted: Sequence[str | None]) -> float:
    """Macro F1 over the labels that occur; an unparsable answer (None) is wrong.

    None takes recall from its gold label and precision from none, and is no label of its own in the mean.
    A label of a closed set that neither list has is in no mean: with few examples it may be missing by chance.
    Equals ``sklearn.metrics.f1_score(..., average="macro", zero_division=0)`` over the labels that occur in
    either list.

    Raises:
        ValueError: No examples, or lengths differ.
    """
    _check(gold, predicted)
    scores = []
    for label in sorted({*gold, *(p for p in predicted if p is not None)}):
        hits = sum(g == label == p for g, p in zip(gold, predicted, strict=True))
        in_gold = sum(g == label for g in gold)
        in_predicted = sum(p == label for p in predicted)
        scores.append(2 * hits / (in_gold + in_predicted))
    return sum(scores) / len(scores)


def same_words(a: str, b: str) -> bool:
    """Whether two answers cannot be told apart: case and punctuation are ignored when a text is read."""
    return _words(a) == _words(b)


def _words(text: str, at_most: int | None = None) -> list[str]:
    return [match.group() for match in islice(_WORD.finditer(text.casefold()), at_most)]


def _check(gold: Sequence[str], predicted: Sequence[str | None]) -> None:
    if len(gold) != len(predicted):
        raise ValueError(f"gold and predicted: lengths must be equal, got {len(gold)} and {len(predicted)}")
    if not gold:
        raise ValueError("gold: a label score needs at least one example, got 0")
