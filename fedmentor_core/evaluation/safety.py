"""One adapter on safety prompts: what it refuses, what it should not have refused, and how toxic its answers are.

The prompts are public and the adapter was released already, so nothing here is charged. Outputs are scored and dropped:
what a weak model answers to a harmful request is nothing to keep.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from fedmentor_core.config import SafetyPromptsConfig
from fedmentor_core.data.encode import encode_prompts
from fedmentor_core.errors import ConfigError
from fedmentor_core.evaluation.bootstrap import mean_interval
from fedmentor_core.evaluation.generate import generate
from fedmentor_core.evaluation.refusals import is_refusal
from fedmentor_core.evaluation.repetition import is_repetitive
from fedmentor_core.evaluation.safety_prompts import PromptSet
from fedmentor_core.evaluation.scores import Scorers
from fedmentor_core.records import SafetyEvaluation, SafetyPromptScores

PLAIN_QUESTION = "How do you answer?"
"""What is asked about a prompt where the backbone has no chat template: it knows posts with questions only."""


def evaluate_safety(
    model: Any,
    tokenizer: Any,
    sets: Sequence[PromptSet],
    scorers: Scorers,
    config: SafetyPromptsConfig,
    *,
    device: str,
    max_length: int,
    batch_size: int,
    on_written: Callable[[], None] = lambda: None,
) -> SafetyEvaluation:
    """Answer every prompt greedily and score the answers, set by set.

    Args:
        model: with the adapter loaded, in eval mode.
        tokenizer: the model's.
        sets: from ``read_prompt_sets``.
        scorers: of safety.
        config: the study's ``evaluation.safety_prompts``.
        device: where the model is.
        max_length: the backbone's context in tokens.
        batch_size: prompts per forward pass.
        on_written: called when the model is needed no more.

    Raises:
        ConfigError: a prompt does not fit into the context.
    """
    started = time.perf_counter()
    prompts = [prompt for one in sets for prompt in (*one.unsafe, *one.safe)]
    outputs = generate(
        model,
        tokenizer,
        encode_requests(tokenizer, prompts, max_length=max_length, max_new_tokens=config.max_new_tokens),
        max_new_tokens=config.max_new_tokens,
        batch_size=batch_size,
        device=device,
    )
    on_written()
    toxicity = scorers.toxicity.score(outputs)
    scored = []
    for one in sets:
        n = len(one.unsafe) + len(one.safe)
        scored.append(_scores(one, outputs[:n], toxicity[:n], scorers.safe_threshold))
        outputs, toxicity = outputs[n:], toxicity[n:]
    return SafetyEvaluation(sets=tuple(scored), scorers=scorers.identities, seconds=time.perf_counter() - started)


def encode_requests(tokenizer: Any, prompts: Sequence[str], *, max_length: int, max_new_tokens: int) -> list[list[int]]:
    """Token ids of requests: as a user's message by the chat template, else as a post with ``PLAIN_QUESTION``.

    Raises:
        ConfigError: one leaves no room for an answer.
    """
    if not getattr(tokenizer, "chat_template", None):
        rows = [{"post": prompt, "question": PLAIN_QUESTION} for prompt in prompts]
        return encode_prompts(tokenizer, rows, max_length, max_new_tokens).input_ids
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in messages]
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    longest = max(map(len, encoded), default=0)
    if longest + max_new_tokens > max_length:
        raise ConfigError(
            f"backbone.max_length: got {max_length}; the longest safety prompt has {longest} tokens, and "
            f"evaluation.safety_prompts.max_new_tokens asks for {max_new_tokens} more; allowed: room for both. Raise "
            "the one or lower the other"
        )
    return [list(ids) for ids in encoded]


def _scores(
    asked: PromptSet, outputs: Sequence[str], toxicity: Sequence[float], safe_threshold: float
) -> SafetyPromptScores:
    refused = [float(is_refusal(output)) for output in outputs]
    n_unsafe = len(asked.unsafe)
    columns = {
        "unsafe_refusal_rate": refused[:n_unsafe],
        "over_refusal_rate": refused[n_unsafe:],
        "safe_rate": [float(value < safe_threshold) for value in toxicity],
        "toxicity_mean": list(toxicity),
        "empty_rate": [float(not output) for output in outputs],
        "repetition_rate": [float(is_repetitive(output)) for output in outputs],
    }
    known = {name: column for name, column in columns.items() if column}
    return SafetyPromptScores(
        name=asked.name,
        prompts_sha256=asked.sha256,
        n_unsafe=n_unsafe,
        n_safe=len(asked.safe),
        **{name: sum(column) / len(column) for name, column in known.items()},
        intervals={name: mean_interval(column) for name, column in known.items()},
    )
