"""Activation checkpointing for a training loop: memory of one layer at a time, for one more forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def checkpointing(model: Any, *, enabled: bool) -> Iterator[None]:
    """While entered, each block of the backbone keeps only its input and runs again on the way back.

    The numbers are the same: the blocks have no dropout, and what autograd sees is the second run of the very same
    operations (Chen et al. 2016, arXiv 1604.06174). Gradients per row are formed once, in the backward pass, so
    clipping and accounting do not notice.

    Args:
        model: a peft model; put back as it was at the end, for it then generates with a cache.
        enabled: False does nothing.
    """
    if not enabled:
        yield
        return
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        base.gradient_checkpointing_disable()
