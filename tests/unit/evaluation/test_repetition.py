"""Outputs that go round in circles."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmentor_core.evaluation.repetition import is_repetitive


@pytest.mark.parametrize(
    ("text", "repetitive"),
    [
        ("", False),
        ("no " * 5, False),  # two 4-grams
        ("no " * 6, True),  # three
        ("they feel alone and " * 3, True),
        ("They feel alone and. they FEEL alone and, they feel alone and", False),  # a dot makes another word
        ("one two three four five " * 2, False),
        ("Yes, the post shows this risk. Reasoning: they say that they are a burden to their family.", False),
    ],
)
def test_by_hand(text, repetitive):
    assert is_repetitive(text) is repetitive


@given(st.text(alphabet="abc", min_size=1, max_size=5), st.integers(6, 40))
def test_a_constant_output_is_always_repetitive(word, times):
    assert is_repetitive(" ".join([word] * times))


@given(st.lists(st.integers(), max_size=40, unique=True))
def test_an_output_of_different_words_never_is(words):
    assert not is_repetitive(" ".join(map(str, words)))
