"""Codes of fewer than eight bits, one behind the other without a gap: eight codes fill as many bytes as each has bits.

Bits are counted from the least of the first byte on, on every machine; a code is in two's complement. What is left over
in the last byte is zero.
"""

from typing import Any

from fedmentor_core.errors import IntegrityError

_GROUP = 8
"""Codes that fill whole bytes together, whatever their bits are."""


def packed_bytes(n: int, bits: int) -> int:
    """How many bytes hold ``n`` codes."""
    return -(-n * bits // 8)


def packed(codes: Any, bits: int) -> Any:
    """(packed_bytes(n, bits),) uint8.

    Args:
        codes: (n,) int8 in [-2^(bits-1), 2^(bits-1) - 1].
        bits: 2 to 7.
    """
    import torch

    n = len(codes)
    groups = _filled_up(codes, _GROUP).view(-1, _GROUP)
    words = torch.zeros(len(groups), dtype=torch.int64)
    for place in range(_GROUP):
        words |= (groups[:, place].long() & _ones(bits)) << (bits * place)
    data = torch.empty(len(groups), bits, dtype=torch.uint8)
    for place in range(bits):
        data[:, place] = (words >> (8 * place)) & 0xFF
    return data.flatten()[: packed_bytes(n, bits)]


def unpacked(data: Any, n: int, bits: int) -> Any:
    """The ``n`` codes, int8; the inverse of ``packed``.

    Args:
        data: (packed_bytes(n, bits),) uint8.
        n: how many codes.
        bits: of each.

    Raises:
        IntegrityError: a bit behind the last code is not zero, which ``packed`` never writes.
    """
    import torch

    groups = _filled_up(data, bits).view(-1, bits)
    words = torch.zeros(len(groups), dtype=torch.int64)
    for place in range(bits):
        words |= groups[:, place].long() << (8 * place)
    sign = 1 << (bits - 1)
    codes = torch.empty(len(groups), _GROUP, dtype=torch.int8)
    for place in range(_GROUP):
        codes[:, place] = (((words >> (bits * place)) & _ones(bits)) ^ sign) - sign
    flat = codes.flatten()
    if bool(flat[n:].any()):
        raise IntegrityError(f"bits behind the last of {n} codes of {bits} bits are not zero, which no encoder writes.")
    return flat[:n]


def _ones(bits: int) -> int:
    return (1 << bits) - 1


def _filled_up(values: Any, multiple: int) -> Any:
    """With zeros behind, to a whole number of groups."""
    import torch

    missing = -len(values) % multiple
    return torch.nn.functional.pad(values, (0, missing)) if missing else values
