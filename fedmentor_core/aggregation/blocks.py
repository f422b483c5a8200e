"""Sums over tensors in fp64, a block at a time: what one step leaves for the next is still in the processor's cache.

Torch would make an fp64 copy of each whole tensor to add it to fp64, in memory that is got anew each time. Here each
thread has 1.5 MiB of scratch memory and keeps it.

Exactness: fp32 and narrower numbers become fp64 without loss, and ``add`` rounds each sum once, as torch does on whole
tensors: the same to the bit, whatever the blocks. ``squared_distance`` rounds each fp32 difference once before squaring
it in fp64: the distance is off by at most 2^-24 of itself (and by fp64 rounding), or infinite where a difference is
beyond fp32.
"""

import threading
from collections.abc import Iterable
from typing import Any

_BLOCK = 2**17  # numbers; larger blocks leave the cache, with smaller ones the calls cost more than the sums


def add(total: Any, tensor: Any, weight: float) -> None:
    """Add ``weight * tensor`` to ``total``, in place.

    Args:
        total: fp64, contiguous.
        tensor: of the same shape, of any floating type.
        weight: what each of its numbers counts for.
    """
    scratch = _scratch()
    for part, numbers in _parts(total, tensor):
        part.add_(scratch.in_shape(part.shape).fp64.copy_(numbers), alpha=weight)


def squared_distance(one: Any, other: Any) -> float:
    """Sum of the squares of ``one - other``; NaN or infinite where any number of the two is.

    Args:
        one: of any shape and floating type.
        other: of the same shape and type.
    """
    import torch

    scratch, squares = _scratch(), 0.0
    for left, right in _parts(one, other):
        room = scratch.in_shape(left.shape)
        if left.dtype == torch.float32:
            room.fp64.copy_(torch.sub(left, right, out=room.fp32))
        else:
            room.fp64.copy_(left).sub_(right)
        squares += torch.dot(room.vector, room.vector).item()
    return squares


def _parts(one: Any, other: Any) -> Iterable[tuple[Any, Any]]:
    """Two tensors of one shape side by side: whole where they fit a block, else as vectors that do."""
    if one.numel() <= _BLOCK:
        return ((one, other),)
    return zip(one.reshape(-1).split(_BLOCK), other.reshape(-1).split(_BLOCK), strict=True)


class _InShape:
    """The scratch memory in a tensor's shape, and in fp64 as a vector too."""

    __slots__ = ("fp32", "fp64", "vector")

    def __init__(self, fp32: Any, fp64: Any, shape: Any) -> None:
        self.fp32, self.fp64, self.vector = fp32.view(shape), fp64.view(shape), fp64


class _Scratch:
    def __init__(self) -> None:
        import torch

        self._fp32 = torch.empty(_BLOCK, dtype=torch.float32)
        self._fp64 = torch.empty(_BLOCK, dtype=torch.float64)
        self._shapes: dict[Any, _InShape] = {}

    def in_shape(self, shape: Any) -> _InShape:
        """Made once a shape: a view costs as much as a small sum."""
        found = self._shapes.get(shape)
        if found is None:
            n = shape.numel()
            found = self._shapes[shape] = _InShape(self._fp32[:n], self._fp64[:n], shape)
        return found


_of_thread = threading.local()


def _scratch() -> _Scratch:
    if not hasattr(_of_thread, "scratch"):
        _of_thread.scratch = _Scratch()
    found: _Scratch = _of_thread.scratch
    return found
