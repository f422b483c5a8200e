"""The envelope: a safetensors file whose header says how its tensors were written, and so how to read them.

An fp32 file is a plain safetensors file without an envelope, which every reader of safetensors reads. Any other codec
stores each tensor's parts under the tensor's name and a suffix, and one entry ``wire`` in the header's metadata: format
version, codec, block size, type and shape of what is read, what it is to be added to, and the seed of the dither where
the codec has one. The entry has the same length whatever the numbers are.

What arrives is judged before it is decoded: names, types and shapes of all parts follow from the header, so a file
cannot make its reader allocate more than about ten times its own size.
"""

import json
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from fedmentor_core.adapters.lora import State, metadata_from_bytes, state_from_bytes, state_to_bytes
from fedmentor_core.errors import IntegrityError
from fedmentor_core.hashing import canonical_json
from fedmentor_core.records import Record
from fedmentor_core.wire.codecs import Codec, Layout, Shape, find_codec
from fedmentor_core.wire.dither import Dither
from fedmentor_core.wire.rounding import coins
from fedmentor_core.wire.sizes import file_bytes

VERSION: Literal[1] = 1
KEY = "wire"
_TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "I8": "int8", "U8": "uint8"}


class Envelope(Record):
    """How the tensors of one file were written."""

    version: Literal[1] = VERSION
    codec: str = Field(max_length=40)
    block: int | None = Field(default=None, description="Numbers that share a scale.")
    dtype: Literal["float32"] = Field(default="float32", description="Type of what is read.")
    base: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="Digest of the global adapter that what is read is to be added to; none: it is the value itself.",
    )
    dither: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{16}$",
        description="Seed of the dither, as a number of 64 bits; none, and not written: the codec has no dither.",
    )
    shapes: dict[str, tuple[Annotated[int, Field(ge=1)], ...]] = Field(description="Shape of each tensor that is read.")

    @classmethod
    def of(cls, codec: Codec, shapes: Mapping[str, Shape], *, seed: int, base: str | None = None) -> "Envelope":
        """The envelope of tensors with these shapes.

        Args:
            codec: that writes them.
            shapes: by name.
            seed: of the coins or the dither, below 2^64.
            base: digest of the global adapter that they are a change of.
        """
        dither = f"{seed:016x}" if codec.dithered else None
        return cls(codec=codec.name, block=codec.block, base=base, dither=dither, shapes=dict(shapes))

    @property
    def layout(self) -> Layout:
        """Everything that is stored, by full name.

        Raises:
            IntegrityError: an unknown codec, another block size than the codec has, or a dither where it has none.
        """
        codec = find_codec(self.codec)
        if self.block != codec.block:
            raise IntegrityError(f"wire codec {self.codec!r} has block size {codec.block}, the file says {self.block}.")
        if codec.dithered != (self.dither is not None):
            raise IntegrityError(f"wire codec {self.codec!r} has {'a' if codec.dithered else 'no'} dither.")
        return layout_of(codec, self.shapes)

    def metadata(self) -> dict[str, str]:
        """For the file's header; empty for fp32, which needs no envelope."""
        if self.codec == "fp32":
            return {}
        unsaid = {"dither"} if self.dither is None else None
        return {KEY: canonical_json(self.model_dump(mode="json", exclude=unsaid)).decode()}

    @classmethod
    def in_metadata(cls, metadata: Mapping[str, str]) -> "Envelope | None":
        """Read a header; None: the file is plain fp32.

        Raises:
            IntegrityError: it says something that this version does not know.
        """
        said = metadata.get(KEY)
        if said is None:
            return None
        try:
            raw = json.loads(said)
        except (ValueError, RecursionError):
            raise IntegrityError("the wire header of a file is not JSON: torn or tampered.") from None
        version = raw.get("version") if isinstance(raw, dict) else None
        if version != VERSION:
            raise IntegrityError(
                f"a file has wire format version {str(version)[:20]}; this installation reads version {VERSION}. "
                "Install the same version of FedMentor everywhere."
            )
        try:
            return cls.model_validate(raw)
        except ValidationError:
            raise IntegrityError("the wire header of a file has an unknown form: torn or tampered.") from None

    def decode(
        self, stored: Collection[str], read: Callable[[str], Any], names: Collection[str] | None = None
    ) -> State:
        """The tensors of a file with this envelope.

        Args:
            stored: names of all tensors that the file holds.
            read: reads one of them.
            names: what is wanted; None: everything.

        Raises:
            IntegrityError: the file holds other tensors than its header says.
        """
        layout, codec, dither = self.layout, find_codec(self.codec), Dither(int(self.dither or "0", 16))
        if set(stored) != set(layout):
            raise IntegrityError(f"a file with wire codec {self.codec!r} lacks tensors, or holds unknown ones.")
        decoded: State = {}
        for name in self.shapes if names is None else names:
            if name not in self.shapes:
                raise IntegrityError(f"a file with wire codec {self.codec!r} holds no tensor {name!r}.")
            shape = self.shapes[name]
            parts = {}
            for suffix in codec.layout(shape):
                tensor, (kind, expected) = read(name + suffix), layout[name + suffix]
                if str(tensor.dtype) != f"torch.{_TORCH_NAMES[kind]}" or tuple(tensor.shape) != expected:
                    raise IntegrityError(
                        f"{name + suffix} is {tuple(tensor.shape)} {tensor.dtype}, expected {expected} "
                        f"{_TORCH_NAMES[kind]}."
                    )
                parts[suffix] = tensor
            decoded[name] = codec.decode(parts, shape, partial(dither.of, name))
        return decoded


def layout_of(codec: Codec, shapes: Mapping[str, Shape]) -> Layout:
    """Everything that a codec stores for tensors with these shapes, by full name."""
    return {
        name + suffix: stored for name, shape in shapes.items() for suffix, stored in codec.layout(tuple(shape)).items()
    }


def shapes_of(state: Mapping[str, Any]) -> dict[str, Shape]:
    """Shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in sorted(state.items())}


def encoded(
    state: Mapping[str, Any], codec: Codec, *, seed: int, metadata: Mapping[str, str], base: str | None = None
) -> bytes:
    """A file with ``state`` in it.

    Args:
        state: fp32 tensors by name.
        codec: how they are written.
        seed: of the coins or the dither, below 2^64; public.
        metadata: what else the header is to say.
        base: digest of the global adapter that ``state`` is a change of.

    Returns:
        The same bytes for the same arguments; their number depends on names, shapes, codec and the metadata's length.
    """
    generator, dither = coins(seed), Dither(seed)
    parts = {
        name + suffix: part
        for name, tensor in sorted(state.items())
        for suffix, part in codec.encode(tensor, generator, partial(dither.of, name)).items()
    }
    return state_to_bytes(parts, {**metadata, **Envelope.of(codec, shapes_of(state), seed=seed, base=base).metadata()})


def encoded_bytes(
    shapes: Mapping[str, Shape], codec: Codec, *, metadata: Mapping[str, str], base: str | None = None
) -> int:
    """The number of bytes that ``encoded`` returns, without a tensor."""
    header = {**metadata, **Envelope.of(codec, shapes, seed=0, base=base).metadata()}
    return file_bytes(layout_of(codec, shapes), header)


def decoded(data: bytes) -> State:
    """The tensors of a file, whatever codec wrote them: the values themselves, not a change of others.

    Raises:
        IntegrityError: torn, tampered with, or of another version.
    """
    tensors = state_from_bytes(data)
    envelope = Envelope.in_metadata(metadata_from_bytes(data))
    if envelope is None:
        return tensors
    if envelope.base is not None:
        raise IntegrityError("the file holds a change of another adapter, where an adapter is expected.")
    return envelope.decode(tensors.keys(), tensors.__getitem__)
