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
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Continue tokenised prompts greedily.

    Args:
        model: a causal language model with ``generate`` (a peft model too), in eval mode.
        tokenizer: decodes the continuation; must have a padding token.
        prompts: token ids per prompt.
        max_new_tokens: longest continuation.
        batch_size: prompts per forward pass.
        device: where the model is.
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
            width = max(len(prompts[index]) for index in chunk)
            input_ids = torch.full((len(chunk), width), tokenizer.pad_token_id, dtype=torch.long)
            mask = torch.zeros((len(chunk), width), dtype=torch.long)
            for row, index in enumerate(chunk):
                length = len(prompts[index])
                input_ids[row, width - length :] = torch.tensor(prompts[index])
                mask[row, width - length :] = 1
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
            texts = tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
            for index, text in zip(chunk, texts, strict=True):
                outputs[index] = text.strip()
            done += len(chunk)
            on_batch(done, len(order))
    return outputs
