"""Rows to token ids, for training and for generation.

The prompt is the tokenizer's chat template around one user message where it has a template, else
``prompting.build_prompt``. Where prompt and answer are too long together, the **post** is cut at its end (at
a space, where there is one near) and the prompt is built again from the shorter post, so that question,
quotes and answer prefix are always whole. The answer is cut only where it alone exceeds its own limit, and
that is counted.

Completion: ``ANSWER_PREFIX + response + eos``; under a chat template the response follows the template's own
opening of the assistant's turn, without the space. It is tokenised by itself, so that training sees the same
prompt ids as generation.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedmentor_core.data.prompting import build_completion, build_prompt
from fedmentor_core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""Label of a position that carries no loss."""


@dataclass(frozen=True, slots=True)
class EncodedExamples:
    """Prompt and answer of each row as one sequence; ragged, plain lists."""

    input_ids: list[list[int]]
    labels: list[list[int]]
    """``input_ids`` with ``IGNORED`` on the prompt."""
    unit_index: list[int]
    """Place of each row's unit in ``unit_ids``."""
    unit_ids: list[str]
    """Units in order of their first row."""
    n_posts_cut: int
    n_responses_cut: int

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows_by_unit(self) -> list[list[int]]:
        """For each unit, the indices of its rows: what a sampler over units draws from."""
        rows: list[list[int]] = [[] for _ in self.unit_ids]
        for row, unit in enumerate(self.unit_index):
            rows[unit].append(row)
        return rows


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """Prompts to generate from; ragged, plain lists."""

    input_ids: list[list[int]]
    n_posts_cut: int

    def __len__(self) -> int:
        return len(self.input_ids)


def prompt_text(tokenizer: Any, post: str, question: str) -> str:
    """The prompt of one row as text, by the tokenizer's chat template or the plain form."""
    if not getattr(tokenizer, "chat_template", None):
        return build_prompt(post, question)
    message = {"role": "user", "content": f'Consider this post: "{post}" Question: {question}'}
    return str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))


def encode_for_training(
    tokenizer: Any, rows: Iterable[Mapping[str, Any]], max_length: int, max_target_tokens: int
) -> EncodedExamples:
    """Encode rows for training.

    Args:
        tokenizer: A Hugging Face tokenizer with an ``eos`` token.
        rows: Rows with ``unit_id``, ``post``, ``question`` and ``response``, such as a split of
            ``DomainData``.
        max_length: Most tokens of prompt and answer together.
        max_target_tokens: Most tokens of an answer, ``eos`` included.

    Raises:
        ConfigError: the tokenizer has no ``eos``, or a prompt without any post does not fit.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the backbone's tokenizer has no eos token; an answer must end with one. Set the eos token."
        )
    listed = list(rows)
    templated = bool(getattr(tokenizer, "chat_template", None))
    responses = [_defuse(row["response"], tokenizer.all_special_tokens) for row in listed]
    texts = responses if templated else [build_completion(response) for response in responses]
    targets = [[*ids, tokenizer.eos_token_id] for ids in _tokenize(tokenizer, texts, special=False)]
    n_responses_cut = sum(len(target) > max_target_tokens for target in targets)
    targets = [target[:max_target_tokens] for target in targets]
    room = [max_length - len(target) for target in targets]
    prompts, n_posts_cut = _fit_prompts(tokenizer, listed, room, "training.max_length")
    places: dict[str, int] = {}
    return EncodedExamples(
        input_ids=[prompt + target for prompt, target in zip(prompts, targets, strict=True)],
        labels=[[IGNORED] * len(prompt) + target for prompt, target in zip(prompts, targets, strict=True)],
        unit_index=[places.setdefault(row["unit_id"], len(places)) for row in listed],
        unit_ids=list(places),
        n_posts_cut=n_posts_cut,
        n_responses_cut=n_responses_cut,
    )


def encode_prompts(
    tokenizer: Any, rows: Iterable[Mapping[str, Any]], max_length: int, max_new_tokens: int
) -> EncodedPrompts:
    """Encode prompts for generation, leaving room for ``max_new_tokens`` within ``max_length``.

    Raises:
        ConfigError: a prompt without any post does not fit.
    """
    listed = list(rows)
    prompts, n_posts_cut = _fit_prompts(
        tokenizer, listed, [max_length - max_new_tokens] * len(listed), "max_length"
    )
    return EncodedPrompts(prompts, n_posts_cut)


def _fit_prompts(
    tokenizer: Any, rows: Sequence[Mapping[str, Any]], room: Sequence[int], setting: str
) -> tuple[list[list[int]], int]:
    special = not getattr(tokenizer, "chat_template", None)  # a template writes its own special tokens

    def encode(post: str, question: str) -> list[int]:
        return _tokenize(tokenizer, [prompt_text(tokenizer, post, question)], special=special)[0]

    posts = [_defuse(row["post"], tokenizer.all_special_tokens) for row in rows]
    questions = [row["question"] for row in rows]
    texts = [prompt_text(tokenizer, post, question) for post, question in zip(posts, questions, strict=True)]
    prompts = _tokenize(tokenizer, texts, special=special)
    n_cut = 0
    for index, limit in enumerate(room):
        if len(prompts[index]) > limit:
            prompts[index] = _cut_post(encode, posts[index], questions[index], prompts[index], limit, setting)
            n_cut += 1
    return prompts, n_cut


def _cut_post(
    encode: Callable[[str, str], list[int]],
    post: str,
    question: str,
    ids: list[int],
    limit: int,
    setting: str,
) -> list[int]:
    """The prompt with the longest start of the post that fits, to within a few words."""
    frame = len(encode("", question))
    if frame > limit:
        raise ConfigError(
            f"{setting}: got room for {max(limit, 0)} prompt tokens beside the answer; allowed: at least "
            f"{frame}, for the question without any post. Raise {setting} or lower the answer's limit."
        )
    fits, fits_ids = 0, encode("", question)
    too_long, too_long_tokens = len(post), len(ids)
    for _ in range(8):  # interpolation: a few steps come within a word or two of the best
        share = (limit - 1 - len(fits_ids)) / max(1, too_long_tokens - len(fits_ids))
        length = fits + int((too_long - fits) * share)
        tried = encode(_start_of(post, length), question)
        if len(tried) <= limit:
            if length <= fits:
                break
            fits, fits_ids = length, tried
            if limit - len(tried) <= 2:
                break
        else:
            too_long, too_long_tokens = length, len(tried)
    return fits_ids


def _start_of(post: str, length: int) -> str:
    """At most ``length`` characters of a post, back to the last space where that costs little."""
    start = post[:length]
    if length < len(post) and not post[length].isspace():
        space = max(start.rfind(" "), start.rfind("\n"))
        if space > length - 40 and space > 0:
            start = start[:space]
    return start.rstrip()


def _defuse(text: str, special_tokens: Sequence[str]) -> str:
    """The text with a space inside whatever spells a special token: a post must not end its own turn."""
    for token in special_tokens:
        if token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def _tokenize(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    batches: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=special, padding=False, truncation=False, verbose=False
    )["input_ids"]
    if special and tokenizer.eos_token_id is not None:
        # Some tokenizers end every text with eos; a prompt must stay open.
        batches = [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in batches]
    return [list(ids) for ids in batches]


def collate(
    examples: EncodedExamples, pad_id: int, indices: Sequence[int] | None = None
) -> dict[str, "Tensor"]:
    """Training batch, padded on the right.

    Shapes:
        ``input_ids``, ``attention_mask``, ``labels``: (rows, longest row), int64; no rows give shape (0, 1),
        so that an empty Poisson batch is still a batch.
    """
    chosen = range(len(examples)) if indices is None else indices
    ids = [examples.input_ids[i] for i in chosen]
    labels = [examples.labels[i] for i in chosen]
    return _batch({"input_ids": (ids, pad_id), "labels": (labels, IGNORED)}, left=False)


def collate_prompts(
    prompts: EncodedPrompts, pad_id: int, indices: Sequence[int] | None = None
) -> dict[str, "Tensor"]:
    """Generation batch, padded on the left.

    Shapes:
        ``input_ids``, ``attention_mask``: (rows, longest row), int64.
    """
    chosen = range(len(prompts)) if indices is None else indices
    return _batch({"input_ids": ([prompts.input_ids[i] for i in chosen], pad_id)}, left=True)


def _batch(columns: dict[str, tuple[list[list[int]], int]], *, left: bool) -> dict[str, "Tensor"]:
    import torch

    ids = columns["input_ids"][0]
    width = max((len(row) for row in ids), default=1)
    columns = {**columns, "attention_mask": ([[1] * len(row) for row in ids], 0)}
    batch = {}
    for name, (rows, fill) in columns.items():
        padding = [[fill] * (width - len(row)) for row in rows]
        padded = [pad + row if left else row + pad for pad, row in zip(padding, rows, strict=True)]
        batch[name] = torch.tensor(padded, dtype=torch.long).reshape(len(rows), width)
    return batch
