"""Updates that are checked and added while they arrive: read once, tensor by tensor, the next bytes on their way.

A tensor is checked by shape and type before it is yielded; digest, names and norm of an update are known only when its
last tensor has been taken. So a sum counts for nothing unless the iteration came to its end. Where it does not, the
caller throws the sum away, judges every update by itself, and joins those that pass (``rounds.aggregate``): a refused
update costs a second reading and never enters an average.

Memory: four pieces of ``storage/body.py`` (2 MiB each from files, 8 MiB over a network) and one tensor, whatever the
number and size of updates. A tensor is a view of the piece that it lies in; only one that lies in two is copied. An
update in another wire codec than fp32 is decoded whole: one update, and its bytes.

A piece is read and digested in a thread of its own while the one before it is checked and added. It is read into this
process's memory, never mapped: what was digested is what is added, whatever happens to the file meanwhile.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedmentor_core.aggregation.ahead import read_ahead
from fedmentor_core.aggregation.base import ArrivingUpdate, State, UpdateCheck
from fedmentor_core.errors import IntegrityError

Pieces = Iterator[bytes]
Tensors = Iterator[tuple[str, Any]]

_PIECES_AHEAD = 1
_LARGEST_HEADER_BYTES = 16 * 2**20
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Source:
    """Where an update comes from, and what it is held against.

    Attributes:
        weight: public; the weights of all sources sum to one.
        expected: the round's tensors that the client trains.
        max_update_norm: largest L2 distance from them, over all tensors jointly.
        pieces: opens the update; raises before its last piece where the digest is wrong (``ArtifactStore.stream``).
        decode: turns its bytes into tensors; None: it is a plain safetensors file.
    """

    weight: float
    expected: State
    max_update_norm: float
    pieces: Callable[[], Pieces]
    decode: Callable[[bytes], State] | None = None


def arriving(sources: Mapping[str, Source]) -> Iterator[ArrivingUpdate]:
    """The updates of all clients, one after another.

    Raises:
        UpdateRejectedError: an update must not enter an average.
        IntegrityError, StorageError: it is not what was released, or cannot be read.
    """

    def read() -> Iterator[bytes | None]:
        for source in sources.values():
            yield from source.pieces()
            yield None

    with read_ahead(read(), _PIECES_AHEAD) as pieces:
        for domain, source in sources.items():
            own = iter(pieces.__next__, None)
            yield ArrivingUpdate(source.weight, _checked(domain, source, own))


def _checked(domain: str, source: Source, pieces: Iterable[bytes]) -> Tensors:
    check = UpdateCheck(domain, source.expected, source.max_update_norm)
    if source.decode is not None:
        tensors: Iterable[tuple[str, Any]] = source.decode(b"".join(pieces)).items()
    else:
        tensors = tensors_in(pieces, source.expected)
    for name, tensor in tensors:
        check.see(name, tensor)
        yield name, tensor
        del tensor  # it keeps its piece in memory
    check.finish()


def tensors_in(pieces: Iterable[bytes], expected: State) -> Tensors:
    """The tensors of a plain safetensors file in the order in which they lie in it, to be read and not written to.

    Args:
        pieces: the file's bytes in order.
        expected: what it must hold, by name; nothing larger is made room for.

    Raises:
        IntegrityError: not such a file, or it holds something else.
    """
    unread = _Unread(pieces)
    for name, kind, shape, n_bytes in _layout(unread):
        wanted = expected.get(name)
        if wanted is None or tuple(wanted.shape) != shape or str(wanted.dtype) != f"torch.{_TYPES.get(kind)}":
            raise IntegrityError(f"an update holds a tensor that the round's adapter has not: {shape} {kind}.")
        if n_bytes != wanted.numel() * wanted.element_size():
            raise IntegrityError("an update's header gives a tensor another length than its shape: torn or tampered.")
        yield name, _read_only(unread.take(n_bytes)).view(wanted.dtype).view(wanted.shape)
    unread.end()


def _read_only(data: memoryview) -> Any:
    """Bytes as a tensor, not copied. ``torch.frombuffer`` would warn: it takes such bytes for a mistake."""
    import numpy
    from torch.utils.dlpack import from_dlpack

    return from_dlpack(numpy.frombuffer(data, dtype=numpy.uint8))


def _layout(unread: "_Unread") -> list[tuple[str, str, tuple[int, ...], int]]:
    """Name, type, shape and number of bytes of each tensor, in the order in which they lie in the file."""
    n_header = int.from_bytes(unread.take(8), "little")
    if n_header > _LARGEST_HEADER_BYTES:
        raise IntegrityError("an update's header is too long: torn or tampered.")
    found, at = [], 0
    try:
        header = json.loads(bytes(unread.take(n_header)))
        if "wire" in header.pop("__metadata__", {}):
            raise IntegrityError("an update comes in another wire codec than the study's (wire.upload).")
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            if type(begin) is not int or type(end) is not int or begin != at or end < begin:
                raise ValueError
            found.append((name, str(entry["dtype"]), tuple(entry["shape"]), end - begin))
            at = end
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise IntegrityError("an update is not a safetensors file: torn or tampered.") from None
    return found


class _Unread:
    """Bytes that come in pieces, taken in other portions."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._piece = memoryview(b"")

    def take(self, n_bytes: int) -> memoryview:
        """The next bytes; copied where the piece at hand has not all of them."""
        if n_bytes <= len(self._piece):
            return self._cut(n_bytes)
        parts: list[bytes] = []
        while n_bytes:
            if not self._piece:
                self._piece = memoryview(b"")  # gives the last piece back before the next one comes
                self._piece = memoryview(self._next())
                if not self._piece:
                    raise IntegrityError("an update ends too early: torn or tampered.")
            parts.append(bytes(self._cut(min(n_bytes, len(self._piece)))))
            n_bytes -= len(parts[-1])
        return memoryview(b"".join(parts))

    def _cut(self, n_bytes: int) -> memoryview:
        taken, self._piece = self._piece[:n_bytes], self._piece[n_bytes:]
        return taken

    def end(self) -> None:
        """Nothing may follow; asking for it is also what has the store verify the digest."""
        if self._piece or self._next():
            raise IntegrityError("an update is longer than its header says: torn or tampered.")

    def _next(self) -> bytes:
        return next(self._pieces, b"")
