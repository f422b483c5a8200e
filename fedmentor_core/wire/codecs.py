"""The codecs: how one tensor of fp32 numbers is written, and read back. To add one, add it to ``_CODECS``.

    name    bits a number                      what is read differs from what was meant by
    fp32    32                                 nothing
    bf16    16                                 less than 1/128 of the number
    int8    8, and 16 for each block of 64     less than a step, 1/126 of the block's largest magnitude
    int4    4, and 16 for each block of 32     less than a step, 1/6.9 of the block's largest magnitude

All but fp32 round by coin (``rounding.py``): on average they write what was meant. Codes are symmetric about zero, from
-127 to 127 and from -7 to 7. What is written is a function of the shape alone in size, so a plan knows it to the byte.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fedmentor_core.errors import IntegrityError
from fedmentor_core.wire.blocks import in_blocks, n_blocks, scales_of
from fedmentor_core.wire.packing import packed, unpacked
from fedmentor_core.wire.rounding import round_by_coin, to_bfloat16_by_coin

Shape = tuple[int, ...]
StoredType = Literal["F64", "F32", "BF16", "I8", "U8"]
Layout = Mapping[str, tuple[StoredType, Shape]]
"""Stored tensors by name (or by suffix of a name): safetensors' word for the type, and the shape."""
SCALES = ".scales"
"""Suffix of the name under which a tensor's scales are stored."""


class Codec(Protocol):
    """How one tensor is written. A codec keeps no state; the same tensor and coins give the same parts."""

    @property
    def name(self) -> str:
        """What the ``wire`` section of a configuration calls it."""
        ...

    @property
    def block(self) -> int | None:
        """Numbers that share a scale; None: there are no scales."""
        ...

    def layout(self, shape: Shape) -> Layout:
        """What is stored for a tensor of this shape, by suffix of its name."""
        ...

    def encode(self, values: Any, generator: Any) -> dict[str, Any]:
        """The stored parts of ``values``, by suffix, as ``layout`` says.

        Args:
            values: fp32, of any shape.
            generator: from ``rounding.coins``.
        """
        ...

    def decode(self, parts: Mapping[str, Any], shape: Shape) -> Any:
        """The fp32 tensor that ``parts`` stand for.

        Args:
            parts: by suffix, with types and shapes as ``layout`` says.
            shape: of the tensor.

        Raises:
            IntegrityError: they hold what no encoder writes, such as a scale that is negative or not finite.
        """
        ...


@dataclass(frozen=True)
class Exact:
    """fp32 as it is."""

    name = "fp32"
    block = None

    def layout(self, shape: Shape) -> Layout:
        """The tensor."""
        return {"": ("F32", shape)}

    def encode(self, values: Any, generator: Any) -> dict[str, Any]:
        """The tensor; no coin is thrown."""
        return {"": values}

    def decode(self, parts: Mapping[str, Any], shape: Shape) -> Any:
        """The tensor."""
        return parts[""]


@dataclass(frozen=True)
class HalfBits:
    """bfloat16: the range of fp32, and 8 significant bits."""

    name = "bf16"
    block = None

    def layout(self, shape: Shape) -> Layout:
        """The tensor in bfloat16."""
        return {"": ("BF16", shape)}

    def encode(self, values: Any, generator: Any) -> dict[str, Any]:
        """Each number as one of its two neighbours."""
        return {"": to_bfloat16_by_coin(values, generator)}

    def decode(self, parts: Mapping[str, Any], shape: Shape) -> Any:
        """As fp32, exactly."""
        return parts[""].float()


@dataclass(frozen=True)
class BlockCodes:
    """Whole-number codes with a scale per block.

    Attributes:
        name: of the codec.
        bits: 8, or 4 with two codes a byte.
        block: numbers that share a scale; even.
    """

    name: str
    bits: Literal[4, 8]
    block: int

    @property
    def largest_code(self) -> int:
        """The codes go from minus this to this."""
        return int(2 ** (self.bits - 1)) - 1

    def layout(self, shape: Shape) -> Layout:
        """Codes, in the tensor's own shape where one takes a byte, and scales."""
        n = math.prod(shape)
        codes: tuple[StoredType, Shape] = ("I8", shape) if self.bits == 8 else ("U8", (-(-n // 2),))
        return {"": codes, SCALES: ("BF16", (n_blocks(n, self.block),))}

    def encode(self, values: Any, generator: Any) -> dict[str, Any]:
        """Each number as one of the two neighbouring multiples of its block's scale.

        What is not finite becomes a scale that its reader refuses.
        """
        import torch

        blocks = in_blocks(values, self.block)
        scales = scales_of(blocks, self.largest_code)
        # where the scale is zero all codes are: division by infinity says so without a branch
        blocks.div_(torch.where(scales == 0, math.inf, scales.float())[:, None])
        whole = round_by_coin(blocks, generator).clamp_(-self.largest_code, self.largest_code)
        codes = whole.nan_to_num_(0.0).to(torch.int8).flatten()[: values.numel()]
        return {"": codes.view(values.shape) if self.bits == 8 else packed(codes), SCALES: scales}

    def decode(self, parts: Mapping[str, Any], shape: Shape) -> Any:
        """Each code times its block's scale: exact in fp32."""
        import torch

        scales, n = parts[SCALES].float(), math.prod(shape)
        if not bool(torch.isfinite(scales * self.largest_code).all()) or bool((scales < 0).any()):
            raise IntegrityError(f"{self.name}: a scale is negative, too large, NaN or infinity.")
        codes = parts[""].flatten() if self.bits == 8 else unpacked(parts[""], n)
        if bool((codes < -self.largest_code).any()):
            raise IntegrityError(f"{self.name}: a code is below {-self.largest_code}, which no encoder writes.")
        values = torch.zeros(len(scales) * self.block)
        values[:n] = codes
        return values.view(-1, self.block).mul_(scales[:, None]).flatten()[:n].view(shape)


CodecName = Literal["fp32", "bf16", "int8", "int4"]
_CODECS: dict[str, Codec] = {
    one.name: one for one in (Exact(), HalfBits(), BlockCodes("int8", 8, 64), BlockCodes("int4", 4, 32))
}


def find_codec(name: str) -> Codec:
    """The codec called ``name``.

    Raises:
        IntegrityError: there is none; whoever wrote this has another version of FedMentor.
    """
    try:
        return _CODECS[name]
    except KeyError:
        raise IntegrityError(f"unknown wire codec {name[:40]!r}; known are {', '.join(_CODECS)}.") from None
