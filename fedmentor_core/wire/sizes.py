"""The size of a safetensors file from its names, types and shapes alone: what a plan says before there is a tensor.

Layout (https://github.com/huggingface/safetensors, "Format"): eight bytes with the header's length; the header, JSON
without spaces, filled up to a multiple of eight; the tensors one behind the other, largest type first, then by name.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from fedmentor_core.wire.codecs import Layout, StoredType

_BYTES: dict[StoredType, int] = {"F64": 8, "F32": 4, "BF16": 2, "I8": 1, "U8": 1}
_ORDER = tuple(_BYTES)  # in which the format puts the types


def file_bytes(layout: Layout, metadata: Mapping[str, str] | None = None) -> int:
    """Bytes of the file that ``adapters.lora.state_to_bytes`` would write.

    Args:
        layout: type and shape of each tensor by name.
        metadata: what the header is to say besides.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (kind, shape) in sorted(layout.items(), key=lambda item: (_ORDER.index(item[1][0]), item[0])):
        start, end = end, end + math.prod(shape) * _BYTES[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + length + -length % 8 + end
