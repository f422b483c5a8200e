"""One client's traffic in a round at 1.7B scale, in every codec: bytes as they lie in a store, and what they cost.

The shapes are those of SmolLM2-1.7B: 24 blocks, hidden size 2048, inner size 8192, 32 heads and as many for keys, LoRA
of rank 16 on all linear layers, B trained. That is 10.2 million numbers up and as many down. No model is loaded: an
adapter's bytes depend on shapes alone. The frozen A, 7.9 million numbers, travels down once, in the first round.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import Arm, Finding, Plan, Ratio, Sample, Scale, Turn, benchmark, median_of

LAYERS, RANK, HIDDEN, INNER = 24, 16, 2048, 8192
MODULES = {  # (out, in)
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
CODECS = {
    "fp32": ("fp32", "fp32"),
    "bf16": ("bf16", "bf16"),
    "int8": ("int8", "int8"),
    "int6 up, int7 down": ("int6", "int7"),
    "int4 up, int8 down": ("int4", "int8"),
    "int4": ("int4", "int4"),
}
SMALL = "int6 up, int7 down"
TARGET_BYTES = 17.3e6

State = dict[str, Any]


@benchmark("traffic", title="bytes of one client in a round, both ways, 1.7B at rank 16", minutes=1.0)
def traffic(scale: Scale) -> Plan:
    """Every codec writes, stores, reads and decodes the same update and the same global adapter."""
    layers = 2 if scale.quick else LAYERS
    share = layers / LAYERS

    def conclude(samples: Mapping[str, Sequence[Sample]]) -> list[Finding]:
        if SMALL not in samples:
            return []
        ours = samples[SMALL]
        return [
            Finding(f"{SMALL}, a round", median_of(ours, "bytes") / 1e6, "MB", at_most=TARGET_BYTES * share / 1e6),
            Finding(f"{SMALL}, in the first round besides", median_of(ours, "frozen_bytes") / 1e6, "MB"),
        ]

    return Plan(
        arms=[Arm(name, exchange, {"upload": up, "download": down, "layers": layers})
              for name, (up, down) in CODECS.items()],
        ratios=[
            Ratio(f"{SMALL}, bytes over fp32's", of=SMALL, to="fp32", what="bytes"),
            Ratio(f"{SMALL}, time over plain safetensors'", of=SMALL, to="fp32"),
        ],
        turns=2 if scale.quick else 5,
        warm_up=1,
        conclude=conclude,
        notes=[
            "Bytes are those of the stored files, headers included, and equal what the plan foretells. Megabytes a "
            "second are of fp32 numbers, one torch thread; 'fp32' is plain safetensors. Errors are relative, in L2: of "
            "the update's change, and of the global adapter.",
        ],
    )  # fmt: skip


def exchange(upload: str, download: str, layers: int) -> Turn:
    """One client's round: the global adapter down, the update up, each through an artifact store."""
    import torch

    from fedmentor_core.storage.base import open_store
    from fedmentor_core.wire.codecs import find_codec
    from fedmentor_core.wire.envelope import decoded, encoded, shapes_of
    from fedmentor_core.wire.planned import adapter_bytes
    from fedmentor_core.wire.traffic import update_metadata
    from fedmentor_core.wire.update import Base, decode_update, encode_update, update_bytes

    torch.set_num_threads(1)
    up, down = find_codec(upload), find_codec(download)
    adapter, change = _state(layers, "B", 1, 1e-2), _state(layers, "B", 2, 3e-3)
    frozen = _state(layers, "A", 3, 1e-2)
    folder = tempfile.TemporaryDirectory(prefix="fedmentor-bench-")
    turns = 0

    def turn() -> Sample:
        nonlocal turns
        turns += 1
        store = open_store(Path(folder.name, str(turns)).as_uri())

        started = time.perf_counter()
        written = encoded(adapter, down, seed=turns, metadata={})
        wrote_adapter = time.perf_counter() - started
        sent_down = store.put("adapter", written)
        data = store.get(sent_down)
        started = time.perf_counter()
        read = decoded(data)
        read_adapter = time.perf_counter() - started

        base = Base(sent_down.sha256, read)
        after = {name: tensor + change[name] for name, tensor in read.items()}
        metadata = update_metadata("quickstart-00000000", 1, base.sha256)
        started = time.perf_counter()
        written = encode_update(after, up, base, metadata, turns)
        wrote_update = time.perf_counter() - started
        sent_up = store.put("update", written)
        data = store.get(sent_up)
        started = time.perf_counter()
        found = decode_update(data, up, base)
        read_update = time.perf_counter() - started
        sent_once = store.put("frozen", encoded(frozen, down, seed=0, metadata={}))

        stored = {one.key: Path(folder.name, str(turns), one.key).stat().st_size for one in (sent_down, sent_up)}
        shapes = shapes_of(adapter)
        foretold = {
            "adapter": adapter_bytes(shapes, down, held={}, base={}, server={}),
            "update": update_bytes(shapes, up, metadata),
        }
        if stored != foretold:
            raise AssertionError(f"Expected the plan's bytes {foretold}, stored are {stored}.")
        megabytes = sum(tensor.numel() for tensor in adapter.values()) * 4 / 1e6
        return Sample(
            seconds=wrote_adapter + read_adapter + wrote_update + read_update,
            bytes=sum(stored.values()),
            figures={
                "up_bytes": stored["update"],
                "down_bytes": stored["adapter"],
                "frozen_bytes": sent_once.n_bytes,
                "encode_mb_per_second": 2 * megabytes / (wrote_adapter + wrote_update),
                "decode_mb_per_second": 2 * megabytes / (read_adapter + read_update),
                "update_error": _error(found, after, read),
                "adapter_error": _error(read, adapter),
            },
        )

    return turn


def _state(layers: int, factor: str, seed: int, size: float) -> State:
    """A or B of every linear layer, as numbers of that size."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shapes = {name: (out, RANK) if factor == "B" else (RANK, into) for name, (out, into) in MODULES.items()}
    return {
        f"model.layers.{layer}.{module}.lora_{factor}.weight": size * torch.randn(shape, generator=generator)
        for layer in range(layers)
        for module, shape in shapes.items()
    }


def _error(found: State, meant: State, start: State | None = None) -> float:
    """L2 distance over L2 size, of the change from ``start`` where there is one."""
    missed = sum(float((found[name] - tensor).double().square().sum()) for name, tensor in meant.items())
    size = sum(
        float((tensor - start[name] if start else tensor).double().square().sum()) for name, tensor in meant.items()
    )
    return float((missed / size) ** 0.5)
