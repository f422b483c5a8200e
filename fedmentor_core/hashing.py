"""Digests: of bytes, of JSON values in one canonical form, of named tensors."""

import hashlib
import json
from typing import Any


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one byte form of a JSON value: sorted keys, no spaces, UTF-8, NaN refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def canonical_sha256(value: Any) -> str:
    """Hex sha256 of ``canonical_json(value)``."""
    return sha256_bytes(canonical_json(value))


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from (study seed, purpose, round, client, ...), independent of process order."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
