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

_MAX_CUT_STEPS = 8
_CUT_SLACK_TOKENS = 8
_POST_MARK, _QUESTION_MARK = "\ue000post\ue001", "\ue000question\ue001"


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
        raise ConfigError("the backbone's tokenizer has no eos token; an answer must end with one. Set the eos token.")
    listed = list(rows)
    templated = bool(getattr(tokenizer, "chat_template", None))
    responses = [_defuse(row["response"], tokenizer.all_special_tokens) for row in listed]
    texts = responses if templated else [build_completion(response) for response in responses]
    targets = [[*ids, tokenizer.eos_token_id] for ids in _tokenize(tokenizer, texts, special=False)]
    n_responses_cut = sum(len(target) > max_target_tokens for target in targets)
    targets = [target[:max_target_tokens] for target in targets]
    room = [max_length - len(target) for target in targets]
    prompts, n_posts_cut = _fit_prompts(tokenizer, listed, room, "backbone.max_length")
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
        tokenizer, listed, [max_length - max_new_tokens] * len(listed), "backbone.max_length"
    )
    return EncodedPrompts(prompts, n_posts_cut)


@dataclass(slots=True)
class _Cut:
    """A post that is being cut: what is known to fit, and what is known to be too long."""

    index: int
    limit: int
    fits: int
    fits_ids: list[int]
    too_long: int
    too_long_tokens: int
    guess: int | None = None

    def next_length(self) -> int | None:
        """Characters to try next; None when the cut is close enough."""
        slack = self.limit - len(self.fits_ids)
        if self.fits and slack <= _CUT_SLACK_TOKENS:
            return None
        length, self.guess = self.guess, None
        if length is None:
            share = (slack - 1) / max(1, self.too_long_tokens - len(self.fits_ids))
            length = self.fits + int((self.too_long - self.fits) * max(0.0, share))
        return length if self.fits < length < self.too_long else None

    def learn(self, length: int, ids: list[int]) -> None:
        """Take in the prompt with ``length`` characters of the post."""
        if len(ids) <= self.limit:
            self.fits, self.fits_ids = length, ids
        else:
            self.too_long, self.too_long_tokens = length, len(ids)


def _fit_prompts(
    tokenizer: Any, rows: Sequence[Mapping[str, Any]], room: Sequence[int], setting: str
) -> tuple[list[list[int]], int]:
    """Prompts of at most ``room`` tokens, and how many posts were cut for it.

    A cut post is the longest start that fits, to within a few words. The first guess comes from the post's
    own tokens, worked out once per post; what it misses is found by interpolation, for all rows side by side.
    """
    special = not getattr(tokenizer, "chat_template", None)  # a template writes its own special tokens
    prompt = _prompter(tokenizer)
    posts = [_defuse(row["post"], tokenizer.all_special_tokens) for row in rows]
    questions = [_defuse(row["question"], tokenizer.all_special_tokens) for row in rows]

    def encode(pairs: Iterable[tuple[str, str]]) -> list[list[int]]:
        return _tokenize(tokenizer, [prompt(post, question) for post, question in pairs], special=special)

    distinct = sorted(set(questions))
    frames = dict(zip(distinct, encode(("", question) for question in distinct), strict=True))
    token_ends = _token_ends(tokenizer, sorted(set(posts)))
    whole: list[int] = []
    cuts: list[_Cut] = []
    for index, limit in enumerate(room):
        frame, ends = frames[questions[index]], token_ends.get(posts[index])
        keep = limit - len(frame) - 1
        if ends is None or len(ends) <= keep + 4:
            whole.append(index)
        else:
            guess = ends[keep] if keep > 0 else None
            cuts.append(_Cut(index, limit, 0, frame, len(posts[index]), len(frame) + len(ends), guess))
    prompts: list[list[int]] = [[] for _ in rows]
    for index, ids in zip(whole, encode((posts[i], questions[i]) for i in whole), strict=True):
        prompts[index] = ids
        if len(ids) > room[index]:
            cuts.append(_Cut(index, room[index], 0, frames[questions[index]], len(posts[index]), len(ids)))
    for cut in cuts:
        if len(cut.fits_ids) > cut.limit:
            raise ConfigError(  # without lengths: one row's text decides them
                f"{setting}: a question and its answer leave no room for any of the post; allowed: room for both and "
                f"a start of the post. Raise {setting}, or lower the answer's limit."
            )
    pending = cuts
    for _ in range(_MAX_CUT_STEPS):
        steps = [(cut, length) for cut in pending if (length := cut.next_length()) is not None]
        tried = encode((_start_of(posts[cut.index], length), questions[cut.index]) for cut, length in steps)
        for (cut, length), ids in zip(steps, tried, strict=True):
            cut.learn(length, ids)
        pending = [cut for cut, _ in steps]
    for cut in cuts:
        prompts[cut.index] = cut.fits_ids
    return prompts, len(cuts)


def _token_ends(tokenizer: Any, posts: Sequence[str]) -> dict[str, list[int]]:
    """For each post, where in it each of its tokens ends; empty where the tokenizer does not tell."""
    if not getattr(tokenizer, "is_fast", False) or not posts:
        return {}
    batch = tokenizer(
        list(posts), add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
    )
    return {post: [end for _, end in offsets] for post, offsets in zip(posts, batch["offset_mapping"], strict=True)}


def _prompter(tokenizer: Any) -> Callable[[str, str], str]:
    """``prompt_text`` for many rows: a chat template is rendered once, around markers."""
    if not getattr(tokenizer, "chat_template", None):
        return build_prompt
    before, _, rest = prompt_text(tokenizer, _POST_MARK, _QUESTION_MARK).partition(_POST_MARK)
    between, found, after = rest.partition(_QUESTION_MARK)
    if not found or _POST_MARK in rest or _QUESTION_MARK in after:
        raise ConfigError(
            "the backbone's chat template does not show a user's message exactly once, as it is; allowed: "
            "one that does. Use another backbone, or remove its chat template."
        )
    return lambda post, question: before + post + between + question + after


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


def collate(examples: EncodedExamples, pad_id: int, indices: Sequence[int] | None = None) -> dict[str, "Tensor"]:
    """Training batch, padded on the right.

    Shapes:
        ``input_ids``, ``attention_mask``, ``labels``: (rows, longest row), int64; no rows give shape (0, 1),
        so that an empty Poisson batch is still a batch.
    """
    chosen = range(len(examples)) if indices is None else indices
    ids = [examples.input_ids[i] for i in chosen]
    labels = [examples.labels[i] for i in chosen]
    return _batch({"input_ids": (ids, pad_id), "labels": (labels, IGNORED)}, left=False)


def collate_prompts(prompts: EncodedPrompts, pad_id: int, indices: Sequence[int] | None = None) -> dict[str, "Tensor"]:
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
