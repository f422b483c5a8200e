"""From token batches to one loss per sequence, computing vocabulary logits only where there is a target."""

from typing import Any

from fedmentor_core.training.target_loss import target_losses

_PLAIN_HEADS = frozenset({"llama", "qwen2", "qwen3", "mistral", "smollm3"})


def losses_of(model: Any, input_ids: Any, attention_mask: Any, labels: Any, *, first_token_weight: float = 0.0) -> Any:
    """Mean negative log-likelihood of each sequence's own targets.

    A model's built-in loss averages over all tokens of the batch: one example's gradient would then depend on the
    lengths of the others, and clipping it would no longer bound its influence.

    Args:
        model: a peft model, possibly within ``RowGradients``.
        input_ids: (B, T), right padded.
        attention_mask: (B, T).
        labels: (B, T), -100 where nothing is to be learnt.
        first_token_weight: w in [0, 1); the loss is (1 - w) times the mean over all targets plus w times the loss of
            the first target, the token that says yes or no. In a long answer that token would otherwise be one in
            sixty. The weights depend on the sequence alone, so clipping bounds its influence as before.

    Returns:
        (B,) losses in fp32; 0 for a sequence without targets.
    """
    import torch

    base = _base(model)
    targets = labels[:, 1:]  # (B, T-1)
    wanted = targets != -100
    if base.config.model_type in _PLAIN_HEADS:
        hidden = base.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        head = base.get_output_embeddings()
        with torch.autocast(hidden.device.type, enabled=False):  # the number of targets differs each time
            logits = head(hidden[:, :-1][wanted].to(head.weight.dtype))  # (n_targets, V)
    else:
        logits = base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1][wanted]
    losses = target_losses(logits.float(), targets[wanted])
    row = torch.arange(len(labels), device=labels.device)[:, None].expand_as(targets)[wanted]
    weights = (1.0 - first_token_weight) / wanted.sum(dim=1).clamp(min=1)[row]
    if first_token_weight:
        is_first = (wanted & (wanted.cumsum(dim=1) == 1))[wanted]
        weights = weights + first_token_weight * is_first
    return torch.zeros(len(labels), device=losses.device).index_add(0, row, losses * weights)


def _base(model: Any) -> Any:
    inner = getattr(model, "_module", model)  # of RowGradients
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner
