"""Negative log-likelihoods of targets, in one buffer of logits where torch's own cross entropy holds three.

At a large vocabulary the step's memory peaks here: 2,048 targets over 49,152 tokens are 403 MB in fp32, and torch keeps
the log-probabilities and makes two gradients of that size. Here the backward pass turns the logits themselves into
their gradient, softmax minus one at the target, in place. Same numbers, to rounding (``tests/reference``).
"""

from functools import cache
from typing import Any

_ROWS = 64  # at once: what is made on the way stays in the processor's cache


def target_losses(logits: Any, targets: Any) -> Any:
    """The negative log-likelihood of each target.

    Args:
        logits: (N, V) in fp32; a backward pass uses their memory up, so nothing else may read them after it.
        targets: (N,) indices.

    Returns:
        (N,) in fp32. Their graph allows one backward pass; another raises RuntimeError.
    """
    return _function().apply(logits, targets)


@cache
def _function() -> Any:
    """The autograd function; made at the first use, because torch takes seconds to import."""
    import torch

    class TargetLosses(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Any, targets: Any) -> Any:
            highest = logits.amax(dim=1, keepdim=True) if logits.numel() else logits.new_zeros((0, 1))
            parts = zip(logits.split(_ROWS), highest.split(_ROWS), strict=True)
            total = torch.cat([(rows - top).exp_().sum(dim=1, keepdim=True) for rows, top in parts])
            ctx.held = logits, highest, total, targets[:, None]
            return (total.log() - (logits.gather(1, targets[:, None]) - highest))[:, 0]

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> tuple[Any, None]:
            if ctx.held is None:
                raise RuntimeError("a second backward pass through target_losses: its logits became their gradient")
            (logits, *rest), ctx.held = ctx.held, None
            pieces = (whole.split(_ROWS) for whole in (logits, *rest, gradients[0][:, None]))
            for rows, highest, total, at, gradient in zip(*pieces, strict=True):
                rows.sub_(highest).exp_()
                rows.scatter_add_(1, at, -total)
                rows.mul_(gradient / total)
            return logits, None

    return TargetLosses
