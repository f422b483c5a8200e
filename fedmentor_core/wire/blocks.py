"""Blocks of neighbouring numbers that share one scale: a large number costs precision in its own block only.

A tensor is read in row-major order and cut into blocks; the last one may be short. The scale of a block is its largest
magnitude over the largest code, rounded up to bfloat16, so no number is cut off. bfloat16 has the range of fp32, and
with it the product of a code of up to 8 bits and a scale is exact in fp32: all who decode get the same numbers.
"""

from typing import Any

_LEAST = 2.0**-126
"""Least scale that is written, the least normal bfloat16; a block below it is zero."""


def n_blocks(n: int, block: int) -> int:
    """How many blocks hold ``n`` numbers."""
    return -(-n // block)


def in_blocks(values: Any, block: int) -> Any:
    """(n_blocks, block) fp32 copy, filled up with zeros."""
    import torch

    flat = values.detach().to("cpu").float().flatten()
    missing = -len(flat) % block
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, block) if missing else flat.view(-1, block).clone()


def scales_of(blocks: Any, largest_code: int) -> Any:
    """(n_blocks,) bfloat16 scales: ``scale * largest_code`` is at least the block's largest magnitude.

    It exceeds it by less than one part in 128. The scale of a block with NaN or infinity is that, for its reader to
    refuse.
    """
    import torch

    exact = blocks.abs().amax(dim=1) / largest_code
    upwards = (exact.view(torch.int32) + 0xFFFF) >> 16
    rounded = upwards.to(torch.int16).view(torch.bfloat16)
    rounded = torch.where(exact < _LEAST, torch.zeros_like(rounded), rounded)
    return torch.where(torch.isfinite(exact), rounded, exact.bfloat16())
