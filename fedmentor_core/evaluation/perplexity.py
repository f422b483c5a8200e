"""How well a candidate predicts the reference answers: their log-likelihood, token by token, with no generation.

Perplexity is exp(sum of negative log-likelihoods / number of tokens) over all tokens of the answers, each given the
post, the question and the answer so far. It needs one forward pass where generation needs one per token, and no greedy
choice flips it, so it shows smaller differences between two adapters than any score of outputs. It compares models
with one tokenizer only.

References:
    Jelinek et al. 1977, "Perplexity: a measure of the difficulty of speech recognition tasks".
"""

import math
from collections.abc import Sequence
from typing import Any

from fedmentor_core.data.encode import EncodedExamples, collate
from fedmentor_core.training.forward import losses_of

_MOST_NATS = 700.0  # exp of more is no float
_MOST_ROWS_ON_CPU = 8  # rows side by side gain nothing there, and padding costs


def log_losses(
    model: Any, tokenizer: Any, targets: EncodedExamples, *, batch_size: int, device: str
) -> tuple[list[float], list[int]]:
    """Negative log-likelihood of each reference, and how many tokens it has.

    Args:
        model: with the adapter loaded, in eval mode.
        tokenizer: the model's; must have a padding token.
        targets: encoded rows; a reference longer than the training limit was cut there.
        batch_size: most rows per forward pass; a processor takes 8 at most.
        device: where the model is.

    Returns:
        Nats and tokens per row, in order.
    """
    import torch

    rows = min(batch_size, _MOST_ROWS_ON_CPU) if device == "cpu" else batch_size
    losses = [0.0] * len(targets)
    counts = [sum(label != -100 for label in labels) for labels in targets.labels]
    order = sorted(range(len(targets)), key=lambda index: len(targets.input_ids[index]))
    with torch.inference_mode():
        for start in range(0, len(order), rows):
            chunk = order[start : start + rows]
            batch = collate(targets, tokenizer.pad_token_id, chunk)
            found = losses_of(model, *(batch[name].to(device) for name in ("input_ids", "attention_mask", "labels")))
            for index, mean in zip(chunk, found.tolist(), strict=True):
                losses[index] = mean * counts[index]
    return losses, counts


def perplexity(losses: Sequence[float], n_tokens: Sequence[int]) -> float | None:
    """exp(mean nats per token) over all rows together.

    None without a token, and where it is no finite number, as of a model that diverged: then a gate's threshold fails.
    """
    total = sum(n_tokens)
    mean = sum(losses) / total if total else math.nan
    return math.exp(mean) if mean < _MOST_NATS else None
