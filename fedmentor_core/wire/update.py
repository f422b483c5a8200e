"""A client's update on its way up: what fp32 writes as it is, any other codec writes as a change of the global adapter.

The change is smaller than the adapter, so the same bits reach further. Both sides take it against the very same
numbers, those that the stored global adapter is decoded to, so nothing drifts.

The update was noised and charged before it is encoded, and the coins depend on no private data: post-processing, which
costs no privacy (``rounding.py``). Its bytes are stored before they are released and a retry sends those, so no coin is
thrown a second time for an update that has left.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fedmentor_core.adapters.lora import State, metadata_from_bytes, state_from_bytes
from fedmentor_core.errors import IntegrityError
from fedmentor_core.hashing import derive_seed
from fedmentor_core.wire.codecs import Codec, Shape
from fedmentor_core.wire.envelope import Envelope, encoded, encoded_bytes, shapes_of


@dataclass(frozen=True)
class Base:
    """The global adapter that an update starts from.

    Attributes:
        sha256: digest of the adapter object.
        state: its tensors at the client's rank, at least those that the client trains.
    """

    sha256: str
    state: State


def update_seed(study_seed: int, round_index: int, domain: str, attempt: int) -> int:
    """Seed of an update's coins or dither: public, and another for every client, round and attempt."""
    return derive_seed(study_seed, "rounding", round_index, domain, attempt)


def encode_update(state: State, codec: Codec, base: Base, metadata: Mapping[str, str], seed: int) -> bytes:
    """An update as it is sent.

    Args:
        state: the trained tensors after training and noise.
        codec: of ``wire.upload``.
        base: what they started from.
        metadata: what the update says of itself (``traffic.update_metadata``).
        seed: of the coins or the dither (``update_seed``).
    """
    if codec.name == "fp32":
        return encoded(state, codec, seed=seed, metadata=metadata)
    change = {name: tensor.float().cpu() - base.state[name].float() for name, tensor in state.items()}
    return encoded(change, codec, seed=seed, metadata=metadata, base=base.sha256)


def update_bytes(shapes: Mapping[str, Shape], codec: Codec, metadata: Mapping[str, str]) -> int:
    """The number of bytes of an update with these shapes; ``metadata`` names a base of the usual length."""
    return encoded_bytes(shapes, codec, metadata=metadata, base=_base_of(codec, "0" * 64))


def update_header(
    shapes: Mapping[str, Shape], codec: Codec, base_sha256: str, metadata: Mapping[str, str], seed: int
) -> dict[str, str]:
    """All that the header of an update must say, to the letter."""
    return {**metadata, **Envelope.of(codec, shapes, seed=seed, base=_base_of(codec, base_sha256)).metadata()}


def decode_update(data: bytes, codec: Codec, base: Base | None) -> State:
    """The trained tensors of an update.

    Args:
        data: as it arrived; nobody vouches for it yet.
        codec: of ``wire.upload``; an update in any other is refused.
        base: what it must start from; may be None for fp32.

    Raises:
        IntegrityError: torn, of another codec or version, of another global adapter, or with tensors, types, shapes,
            scales or codes that no encoder writes. Shape, norm and finiteness of what is read are judged where it is
            added up (``aggregation/base.py``).
    """
    tensors = state_from_bytes(data)
    envelope = Envelope.in_metadata(metadata_from_bytes(data))
    found = "fp32" if envelope is None else envelope.codec
    if found != codec.name:
        raise IntegrityError(f"an update is in wire codec {found!r}, expected {codec.name!r} (wire.upload).")
    if envelope is None:
        return tensors
    if base is None or envelope.base != base.sha256:
        raise IntegrityError("an update is a change of another global adapter than the round's.")
    expected = shapes_of({name: base.state[name] for name in envelope.shapes if name in base.state})
    if expected != dict(sorted(envelope.shapes.items())):
        raise IntegrityError("an update has tensors or shapes that the round's global adapter has not.")
    change = envelope.decode(tensors.keys(), tensors.__getitem__)
    return {name: base.state[name].float() + tensor for name, tensor in change.items()}


def _base_of(codec: Codec, sha256: str) -> str | None:
    return None if codec.name == "fp32" else sha256
