"""Mojibake repair and post keys, on invented sentences."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmentor_core.data.text import KEY_LETTERS, answer_word, letters_of, post_key, repair_mojibake

SOUND = [
    "I don’t know — maybe “tomorrow” … or not",
    "café, naïve, Ärger, señor",
    "Pay £20 or 20 €; ½ of it",
    "all fine \U0001f642 \U0001f499️ thanks",
    "plain ascii, nothing to do",
    "«Ça va» — très bien…",
    "well…école",
]


@pytest.mark.parametrize("text", [text for text in SOUND if "—" in text or "\U0001f642" in text])
def test_utf8_read_as_mac_roman_is_repaired(text):
    assert repair_mojibake(text.encode().decode("mac_roman")) == (text, True)


@pytest.mark.parametrize("text", ["I don’t know", "she said ‘yes’…", "über Ärger é", "naïve – really"])
def test_utf8_read_as_windows_1252_is_repaired(text):
    assert repair_mojibake(text.encode().decode("cp1252")) == (text, True)


def test_undefined_windows_bytes_shown_as_controls_are_repaired():
    assert repair_mojibake("he said â€œgoâ€\x9d") == ("he said “go”", True)


def test_only_the_broken_run_of_a_mixed_text_is_repaired():
    assert repair_mojibake("in the café I don‚Äôt talk") == ("in the café I don’t talk", True)


@pytest.mark.parametrize("text", SOUND)
def test_sound_text_is_left_alone(text):
    assert repair_mojibake(text) == (text, False)


@given(st.text(max_size=80))
def test_repair_never_fails_and_never_touches_ascii(text):
    repaired, changed = repair_mojibake(text)
    assert changed == (repaired != text)
    assert not (text.isascii() and changed)


@given(st.text(alphabet="abc ‘’“”–…éü\U0001f642", min_size=1, max_size=60))
def test_one_mac_roman_round_is_undone(text):
    broken = text.encode().decode("mac_roman")
    assert repair_mojibake(broken)[0] == text


def test_post_key_ignores_case_spaces_and_punctuation():
    assert post_key("Hello, World!  12") == post_key("hello world") == "helloworld"


@given(st.text(max_size=700))
def test_post_key_is_the_first_letters(text):
    assert post_key(text) == letters_of(text)[:KEY_LETTERS]


def test_texts_that_differ_late_share_a_key_and_texts_without_letters_keep_one():
    assert post_key("a" * 150 + "b") == post_key("a" * 150 + "c")
    assert post_key("123 !!") == "123!!"
    assert post_key("123 !!") != post_key("124 !!")


@pytest.mark.parametrize(
    ("response", "word"),
    [("Yes, it does.", "yes"), (" no. Reasoning: x", "no"), ('"Yes"', "yes"), ("Nothing", ""), ("", "")],
)
def test_answer_word(response, word):
    assert answer_word(response) == word
