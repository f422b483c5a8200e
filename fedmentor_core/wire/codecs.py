"""The codecs: how one tensor of fp32 numbers is written, and read back. To add one, add it to ``_CODECS``.

    name    bits a number                      what is read differs from what was meant by
    fp32    32                                 nothing
    bf16    16                                 less than 1/128 of the number
    int8    8, and 16 for each block of 64     less than a step, 1/126 of the block's largest magnitude
    int7    7, and 16 for each block of 128    at most half a step, 1/125 of the block's largest magnitude
    int6    6, and 16 for each block of 64     at most half a step, 1/61 of the block's largest magnitude
    int4    4, and 16 for each block of 32     less than a step, 1/6.9 of the block's largest magnitude

bf16, int8 and int4 round by coin (``rounding.py``), int7 and int6 under a dither that the reader takes off again
(``dither.py``): on average all write what was meant. Codes are symmetric about zero, such as -127 to 127 and -7 to 7.
What is written is a function of the shape alone in size, so a plan knows it to the byte.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fedmentor_core.errors import IntegrityError
from fedmentor_core.wire.blocks import in_blocks, n_blocks, scales_of
from fedmentor_core.wire.dither import Draw
from fedmentor_core.wire.packing import packed, packed_bytes, unpacked
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

    @property
    def dithered(self) -> bool:
        """Whether a reader needs the writer's dither."""
        ...

    def layout(self, shape: Shape) -> Layout:
        """What is stored for a tensor of this shape, by suffix of its name."""
        ...

    def encode(self, values: Any, generator: Any, dither: Draw) -> dict[str, Any]:
        """The stored parts of ``values``, by suffix, as ``layout`` says.

        Args:
            values: fp32, of any shape.
            generator: from ``rounding.coins``.
            dither: draws as many numbers in (-1/2, 1/2) as are asked for; called where the codec is ``dithered``.
        """
        ...

    def decode(self, parts: Mapping[str, Any], shape: Shape, dither: Draw) -> Any:
        """The fp32 tensor that ``parts`` stand for.

        Args:
            parts: by suffix, with types and shapes as ``layout`` says.
            shape: of the tensor.
            dither: draws the numbers that ``encode`` drew.

        Raises:
            IntegrityError: they hold what no encoder writes, such as a scale that is negative or not finite.
        """
        ...


@dataclass(frozen=True)
class Exact:
    """fp32 as it is."""

    name = "fp32"
    block = None
    dithered = False

    def layout(self, shape: Shape) -> Layout:
        """The tensor."""
        return {"": ("F32", shape)}

    def encode(self, values: Any, generator: Any, dither: Draw) -> dict[str, Any]:
        """The tensor; no coin is thrown."""
        return {"": values}

    def decode(self, parts: Mapping[str, Any], shape: Shape, dither: Draw) -> Any:
        """The tensor."""
        return parts[""]


@dataclass(frozen=True)
class HalfBits:
    """bfloat16: the range of fp32, and 8 significant bits."""

    name = "bf16"
    block = None
    dithered = False

    def layout(self, shape: Shape) -> Layout:
        """The tensor in bfloat16."""
        return {"": ("BF16", shape)}

    def encode(self, values: Any, generator: Any, dither: Draw) -> dict[str, Any]:
        """Each number as one of its two neighbours."""
        return {"": to_bfloat16_by_coin(values, generator)}

    def decode(self, parts: Mapping[str, Any], shape: Shape, dither: Draw) -> Any:
        """As fp32, exactly."""
        return parts[""].float()


@dataclass(frozen=True)
class BlockCodes:
    """Whole-number codes with a scale per block.

    Attributes:
        name: of the codec.
        bits: of a code, the sign with it; fewer than 8 are packed without a gap.
        block: numbers that share a scale.
        dithered: rounded to the nearest code under a dither; else up or down by coin.
    """

    name: str
    bits: Literal[4, 6, 7, 8]
    block: int
    dithered: bool = False

    @property
    def largest_code(self) -> int:
        """The codes go from minus this to this."""
        return int(2 ** (self.bits - 1)) - 1

    def layout(self, shape: Shape) -> Layout:
        """Codes, in the tensor's own shape where one takes a byte, and scales."""
        n = math.prod(shape)
        codes: tuple[StoredType, Shape] = ("I8", shape) if self.bits == 8 else ("U8", (packed_bytes(n, self.bits),))
        return {"": codes, SCALES: ("BF16", (n_blocks(n, self.block),))}

    def encode(self, values: Any, generator: Any, dither: Draw) -> dict[str, Any]:
        """Each number in steps of its block's scale: one of the two neighbouring multiples, or the dithered nearest.

        What is not finite becomes a scale that its reader refuses.
        """
        import torch

        blocks = in_blocks(values, self.block)
        scales = scales_of(blocks, self.largest_code)
        # where the scale is zero all codes are: division by infinity says so without a branch
        blocks.div_(torch.where(scales == 0, math.inf, scales.float())[:, None])
        if self.dithered:
            whole = blocks.view(-1).add_(dither(blocks.numel())).round_()
        else:
            whole = round_by_coin(blocks, generator).view(-1)
        whole = whole.clamp_(-self.largest_code, self.largest_code).nan_to_num_(0.0)
        codes = whole.to(torch.int8)[: values.numel()]
        return {"": codes.view(values.shape) if self.bits == 8 else packed(codes, self.bits), SCALES: scales}

    def decode(self, parts: Mapping[str, Any], shape: Shape, dither: Draw) -> Any:
        """Each code, less its dither, times its block's scale: rounded at most once, and so the same everywhere."""
        import torch

        scales, n = parts[SCALES].float(), math.prod(shape)
        if not bool(torch.isfinite(scales * self.largest_code).all()) or bool((scales < 0).any()):
            raise IntegrityError(f"{self.name}: a scale is negative, too large, NaN or infinity.")
        codes = parts[""].flatten() if self.bits == 8 else unpacked(parts[""], n, self.bits)
        if bool((codes < -self.largest_code).any()):
            raise IntegrityError(f"{self.name}: a code is below {-self.largest_code}, which no encoder writes.")
        values = torch.zeros(len(scales) * self.block)
        values[:n] = codes
        if self.dithered:
            values -= dither(len(values))
        return values.view(-1, self.block).mul_(scales[:, None]).flatten()[:n].view(shape)


CodecName = Literal["fp32", "bf16", "int8", "int7", "int6", "int4"]
"""What the ``wire`` section of a configuration may name."""
_BLOCK_CODES = (
    BlockCodes("int8", 8, 64),
    BlockCodes("int7", 7, 128, dithered=True),
    BlockCodes("int6", 6, 64, dithered=True),
    BlockCodes("int4", 4, 32),
)
_CODECS: dict[str, Codec] = {one.name: one for one in (Exact(), HalfBits(), *_BLOCK_CODES)}


def find_codec(name: str) -> Codec:
    """The codec called ``name``.

    Raises:
        IntegrityError: there is none; whoever wrote this has another version of FedMentor.
    """
    try:
        return _CODECS[name]
    except KeyError:
        raise IntegrityError(f"unknown wire codec {name[:40]!r}; known are {', '.join(_CODECS)}.") from None
