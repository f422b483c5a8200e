"""Text repair and the normal forms that posts are compared by: pure functions."""

import re
from functools import lru_cache

KEY_LETTERS = 150
"""How many letters of a post make its key."""

_ANSWER_WORD = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)

# The lead characters of UTF-8 sequences as each wrong encoding shows them, followed by a non-ASCII character.
# Both are needed: an accent or a typographic quote by itself is ordinary text.
_MAC_ROMAN_LEAD = re.compile("[‚√¬ÔÓ\uf8ff][^\x00-\x7f]")
_CP1252_LEAD = re.compile("[âÃÂïðÄÅÎÏÐÑ][^\x00-\x7f]")
_NON_ASCII_RUN = re.compile("[^\x00-\x7f]{2,}")


def repair_mojibake(text: str) -> tuple[str, bool]:
    """Undo UTF-8 that was read as Mac Roman or as Windows-1252.

    The whole text is tried first, then each run of non-ASCII characters by itself (a text may mix broken and
    sound characters). A piece is changed only where it holds a typical lead sequence and decodes without a
    fault, so that sound text with accents, quotes or emoji comes back unchanged.

    Returns:
        The text, and whether it was changed.
    """
    if text.isascii():
        return text, False
    repaired = _decode_again(text)
    if repaired is None:
        repaired = _NON_ASCII_RUN.sub(lambda match: _decode_again(match.group()) or match.group(), text)
    return repaired, repaired != text


def _decode_again(text: str) -> str | None:
    if _MAC_ROMAN_LEAD.search(text):
        try:
            return text.encode("mac_roman").decode("utf-8")
        except UnicodeError:
            pass
    if _CP1252_LEAD.search(text):
        try:
            return b"".join(_cp1252_byte(character) for character in text).decode("utf-8")
        except UnicodeError:
            pass
    return None


def _cp1252_byte(character: str) -> bytes:
    # Windows-1252 leaves five bytes undefined; programs show them as the control character of the same
    # number.
    if "\x80" <= character <= "\x9f":
        return bytes([ord(character)])
    return character.encode("cp1252")


def squeeze(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(text.split())


def letters_of(text: str) -> str:
    """All letters of a text in lower case; a text without letters keeps its other characters."""
    lowered = text.lower()
    return "".join(filter(str.isalpha, lowered)) or "".join(lowered.split())


@lru_cache(maxsize=256)  # the rows of one post follow each other
def post_key(post: str) -> str:
    """What two posts must share to count as the same post: their first 150 letters, case ignored.

    Posts must be repaired first. The rule errs towards joining: texts that start alike land in one unit and
    one split. The key is text: it must not leave the data package (see ``units.digest``).
    """
    head = "".join(filter(str.isalpha, post[: 2 * KEY_LETTERS].lower()))  # nearly always enough, and much faster
    return (head if len(head) >= KEY_LETTERS else letters_of(post))[:KEY_LETTERS]


def answer_word(response: str) -> str:
    """The label that an answer opens with: ``"yes"``, ``"no"`` or ``""``."""
    match = _ANSWER_WORD.match(response)
    return match.group(1).lower() if match else ""
