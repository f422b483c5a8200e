"""The text form in which a post and a question reach a backbone without a chat template.

One row of any corpus becomes ``prompt + completion + eos``::

    Consider this post: "<post>" Question: <question>
    Answer: <response><eos>

The prompt ends at ``Answer:`` with no trailing space; the space belongs to the completion, because a
byte-level BPE tokenizer joins a space to the word that follows it. No ``bos`` token is written: a tokenizer
that adds one itself may do so. The bundled backbone was pretrained on exactly these bytes, so a change here
needs a new backbone.
"""

from typing import Final

ANSWER_PREFIX: Final = " "
"""What stands between the prompt and the response: the completion is ``ANSWER_PREFIX + response``."""


def build_prompt(post: str, question: str) -> str:
    """Return the prompt for one post and one question, up to and including ``Answer:``.

    Args:
        post: The post, as cut by the caller; it is quoted as it is, with nothing escaped.
        question: The question, with its own question mark.

    Returns:
        The text to tokenise; it ends in a colon, never in a space.
    """
    return f'Consider this post: "{post}" Question: {question}\nAnswer:'


def build_completion(response: str) -> str:
    """Return what follows the prompt, without the ``eos`` token that ends it.

    Args:
        response: The response: a label sentence, then ``Reasoning:`` and an explanation where there is one.
    """
    return f"{ANSWER_PREFIX}{response}"
