"""How many bytes a global adapter will have that nobody has made yet: by the names and shapes of its tensors."""

from collections.abc import Mapping

from fedmentor_core.adapters.parts import AdapterParts, Part
from fedmentor_core.wire.codecs import Codec, Layout, Shape, find_codec
from fedmentor_core.wire.envelope import encoded_bytes, layout_of
from fedmentor_core.wire.sizes import file_bytes

_ANY_DIGEST = "0" * 64


def adapter_bytes(
    own: Mapping[str, Shape], codec: Codec, *, held: Mapping[str, Shape], base: Layout, server: Layout
) -> int:
    """What a client reads of a global adapter: its own object, and what was added to the base.

    Args:
        own: tensors of the adapter object.
        codec: of ``wire.download``.
        held: tensors that the last round left as they were, which clients have; the header names their object.
        base: what was added to the base, as it is stored; at its largest, where that is not known.
        server: memory of the server's step; only the header names it.
    """
    parts = AdapterParts(held=_part(layout_of(find_codec("fp32"), held)), base=_part(base), server=_part(server))
    added = 0 if parts.base is None else parts.base.n_bytes
    return encoded_bytes(own, codec, metadata=parts.metadata()) + added


def _part(layout: Layout) -> Part | None:
    return Part(sha256=_ANY_DIGEST, n_bytes=file_bytes(layout)) if layout else None
