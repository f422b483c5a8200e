"""Two codes of four bits in one byte, the first in the lower half."""

from typing import Any


def packed(codes: Any) -> Any:
    """(ceil(n / 2),) bytes.

    Args:
        codes: (n,) int8 in [-8, 7]; an odd number of them leaves the last upper half zero.
    """
    import torch

    if len(codes) % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    halves = codes.view(torch.uint8)
    return (halves[0::2] & 0x0F) | (halves[1::2] << 4)


def unpacked(data: Any, n: int) -> Any:
    """The first ``n`` codes, int8; the inverse of ``packed``."""
    import torch

    codes = torch.empty(2 * len(data), dtype=torch.int8)
    signed = data.view(torch.int8)
    codes[0::2] = (signed << 4) >> 4  # the sign is carried down from the upper half
    codes[1::2] = signed >> 4
    return codes[:n]
