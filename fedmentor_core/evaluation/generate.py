"""Batched greedy generation, sorted by length so that little is padding."""

from collections.abc import Callable, Sequence
from typing import Any


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    device: str = "cpu",
    width: int | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Continue tokenised prompts greedily.

    With ``width``, every batch has the one shape (batch_size, width): then what is written for a prompt follows from
    that prompt alone. Otherwise its neighbours decide how much it is padded, rounding differs, and now and then a
    near tie between two tokens falls the other way.

    Args:
        model: a causal language model with ``generate`` (a peft model too), in eval mode.
        tokenizer: decodes the continuation; must have a padding token.
        prompts: token ids per prompt.
        max_new_tokens: longest continuation.
        batch_size: prompts per forward pass.
        device: where the model is.
        width: tokens that every prompt is padded to; at least the longest prompt. None: as few as each batch needs.
        on_batch: progress, called with (prompts done, prompts in all).

    Returns:
        Continuations in the prompts' order, stripped, without special tokens; may be empty strings.
    """
    import torch

    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    outputs = [""] * len(prompts)
    done = 0
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            filled = chunk if width is None else chunk + [chunk[-1]] * (batch_size - len(chunk))
            columns = max(len(prompts[index]) for index in chunk) if width is None else width
            input_ids = torch.full((len(filled), columns), tokenizer.pad_token_id, dtype=torch.long)
            mask = torch.zeros((len(filled), columns), dtype=torch.long)
            for row, index in enumerate(filled):
                length = len(prompts[index])
                input_ids[row, columns - length :] = torch.tensor(prompts[index])
                mask[row, columns - length :] = 1
            generated = model.generate(
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                use_cache=True,
            )
            texts = tokenizer.batch_decode(generated[: len(chunk), columns:], skip_special_tokens=True)
            for index, text in zip(chunk, texts, strict=True):
                outputs[index] = text.strip()
            done += len(chunk)
            on_batch(done, len(order))
    return outputs
