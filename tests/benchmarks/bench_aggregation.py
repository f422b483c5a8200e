"""Joining the updates of a round at 1.7B scale: time and memory as clients are added, and against what rivals do.

The adapter is what a study of SmolLM2-1.7B exchanges: rank 16 on all linear layers of 24 blocks (hidden size 2048, inner
size 8192), only B trained: 10.2 million numbers, 41 MB in fp32. Every arm has the same three updates in a store; a round
of more clients reads them again and again, which spares the disk and nothing else: each read is verified, decoded,
checked and added as that of a client of its own. So the files come from the system's cache, and the speed of reading
them is measured beside it.

A rival's arm runs under another Python, with flwr and chorus-fl, that ``FEDMENTOR_BENCH_PEERS_PYTHON`` names.
"""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness import Arm, Finding, Plan, Ratio, Sample, Scale, SkipArmError, Turn, benchmark, median_of

LAYERS, RANK = 24, 16
WIDTHS = {"q_proj": 2048, "k_proj": 2048, "v_proj": 2048, "o_proj": 2048,
          "gate_proj": 8192, "up_proj": 8192, "down_proj": 2048}  # fmt: skip
DISTINCT = 3
PEERS = "FEDMENTOR_BENCH_PEERS_PYTHON"
MEMORY_TARGET = 3.0  # adapters' worth, whatever the number of clients

State = dict[str, Any]


@benchmark("aggregation", title="joining 10 updates of a 1.7B rank-16 adapter, against rivals", minutes=1.0)
def aggregation(scale: Scale) -> Plan:
    """From files, as a server meets them; and in memory, which is all that a rival's own function does."""
    count, layers = (3, 4) if scale.quick else (10, LAYERS)
    size = {"count": count, "layers": layers}
    peers = os.environ.get(PEERS) or None
    rivals = ("flower", "chorus")
    arms = [
        Arm("read the files", read_files, size),
        Arm("fedmentor, files", fedmentor_files, size),
        *(Arm(f"{name}, files", rival, {"rival": name, "files": True, **size}, python=peers) for name in rivals),
        Arm("fedmentor, in memory", fedmentor_memory, size),
        *(Arm(f"{name}, in memory", rival, {"rival": name, "files": False, **size}, python=peers) for name in rivals),
    ]
    ratios = [Ratio("time over reading the files", of="fedmentor, files", to="read the files")]
    for name in rivals:
        for where in ("files", "in memory"):
            ours, theirs = f"fedmentor, {where}", f"{name}, {where}"
            ratios.append(Ratio(f"time over {name}'s, {where}", of=ours, to=theirs, at_most=1.0))
        ratios.append(Ratio(f"memory over {name}'s, files", of=f"fedmentor, {where}", to=f"{name}, files",
                            what="growth_bytes", at_most=1.0))  # fmt: skip
    notes = [
        f"{count} updates of {_adapter_bytes(layers) / 1e6:.0f} MB, one torch thread. 'growth' is the most memory above "
        "what the process held before, which is Python, torch and the round's global adapter.",
        "Ours verifies each file's digest and checks names, shapes, finiteness and norm, and adds in fp64; a rival's "
        "reads the tensors and adds in fp32, with no check.",
    ]
    return Plan(arms, ratios, turns=1 if scale.quick else 3, fresh=True, notes=notes)


@benchmark("aggregation-memory", title="memory and throughput of joining 3 to 1,000 updates", minutes=2.0)
def aggregation_memory(scale: Scale) -> Plan:
    """One process per count, so that each peak is that of one round."""
    counts, layers = ((3, 12), 4) if scale.quick else ((3, 30, 300, 1_000), LAYERS)
    one = _adapter_bytes(layers)

    def conclude(samples: Mapping[str, Sequence[Sample]]) -> list[Finding]:
        growth = {name: median_of(taken, "growth_bytes") / one for name, taken in samples.items()}
        found = [
            Finding(f"memory of {name}", value, "adapters", at_most=MEMORY_TARGET) for name, value in growth.items()
        ]
        if len(growth) > 1:
            found.append(Finding("most over fewest clients, memory", max(growth.values()) / growth[_arm(counts[0])]))
        return found

    arms = [
        Arm(_arm(count), fedmentor_files, {"count": count, "layers": layers}, limit_seconds=3600.0) for count in counts
    ]
    return Plan(arms, turns=1, fresh=True, conclude=conclude)


def _arm(count: int) -> str:
    return f"{count:,} clients"


# --- what the arms do --------------------------------------------------------------------------------------------


def read_files(count: int, layers: int) -> Turn:
    """The bytes alone, off the disk or out of the system's cache."""
    folder, names = _updates(layers)

    def turn() -> Sample:
        total = sum(len((Path(folder.name) / names[index % DISTINCT]).read_bytes()) for index in range(count))
        return Sample(bytes=total)

    return _with_speed(turn)


def fedmentor_files(count: int, layers: int) -> Turn:
    """As ``rounds.aggregate`` does it: read, verify, check and join, out of an artifact store."""
    from fedmentor_core.aggregation.arriving import Source, arriving
    from fedmentor_core.aggregation.fedavg import RULE
    from fedmentor_core.storage.base import open_store

    folder, names = _updates(layers)
    store = open_store(Path(folder.name).as_uri())
    refs = [store.put(name, (Path(folder.name) / name).read_bytes()) for name in names]
    before = _state(layers, seed=0)

    def turn() -> Sample:
        assert folder  # lives as long as the arm
        sources = {
            f"client-{index:04d}": Source(1.0 / count, before, 1e6, partial(store.stream, refs[index % DISTINCT]))
            for index in range(count)
        }
        RULE.join_arriving(before, arriving(sources))
        return Sample(bytes=count * refs[0].n_bytes)

    return _with_speed(turn)


def fedmentor_memory(count: int, layers: int) -> Turn:
    """The same checks and the same sum over updates that are in memory, as those of a rounding codec once decoded."""
    from fedmentor_core.aggregation.arriving import Source, arriving
    from fedmentor_core.aggregation.fedavg import RULE

    before, states = _state(layers, seed=0), [_state(layers, seed) for seed in range(1, DISTINCT + 1)]

    def turn() -> Sample:
        sources = {
            f"client-{index:04d}": Source(
                1.0 / count, before, 1e6, lambda: iter(()), decode=lambda _, state=states[index % DISTINCT]: state
            )
            for index in range(count)
        }
        RULE.join_arriving(before, arriving(sources))
        return Sample(bytes=count * _adapter_bytes(layers))

    return _with_speed(turn)


def rival(rival: str, files: bool, count: int, layers: int) -> Turn:
    """A rival's own aggregation, by the function that its server calls."""
    if PEERS not in os.environ:
        raise SkipArmError(f"set {PEERS} to a Python with flwr and chorus-fl.")
    from safetensors.torch import load

    _one_thread()
    join = {"flower": _flower, "chorus": _chorus}[rival]()
    if not files:
        states = [_state(layers, seed) for seed in range(1, DISTINCT + 1)]
        wrapped = [join.wrap(states[index % DISTINCT]) for index in range(count)]

        def in_memory() -> Sample:
            join.add(wrapped)
            return Sample(bytes=count * _adapter_bytes(layers))

        return _with_speed(in_memory)
    folder, names = _updates(layers)

    def from_files() -> Sample:
        paths = [Path(folder.name) / names[index % DISTINCT] for index in range(count)]
        join.add([join.wrap(load(path.read_bytes())) for path in paths])
        return Sample(bytes=sum(path.stat().st_size for path in paths))

    return _with_speed(from_files)


class _flower:  # noqa: N801 - a rival's name
    """flwr: the function behind its FedAvg strategy."""

    def __init__(self) -> None:
        from flwr.app import ArrayRecord, MetricRecord, RecordDict
        from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

        self.wrap = lambda state: RecordDict(
            {"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": 1})}
        )
        self.add = lambda records: aggregate_arrayrecords(records, "num-examples")


class _chorus:  # noqa: N801 - a rival's name
    """chorus-fl: its strategy 'fedavg'."""

    def __init__(self) -> None:
        from chorus.server.aggregation import FedAvg

        self.wrap = lambda state: state
        self.add = FedAvg().aggregate


# --- the same updates for all ------------------------------------------------------------------------------------


def _updates(layers: int) -> tuple["tempfile.TemporaryDirectory[str]", list[str]]:
    """A folder with three updates as safetensors files, and their names."""
    from safetensors.torch import save_file

    _one_thread()
    folder = tempfile.TemporaryDirectory(prefix="fedmentor-bench-")
    names = [f"update-{seed}.safetensors" for seed in range(1, DISTINCT + 1)]
    for seed, name in enumerate(names, start=1):
        save_file(_state(layers, seed), Path(folder.name) / name)
    return folder, names


def _state(layers: int, seed: int) -> State:
    """B of every linear layer, as a noised update might be."""
    import torch

    _one_thread()
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{layer}.{module}.lora_B.weight": 1e-3 * torch.randn(width, RANK, generator=generator)
        for layer in range(layers)
        for module, width in WIDTHS.items()
    }


def _adapter_bytes(layers: int) -> int:
    return 4 * RANK * layers * sum(WIDTHS.values())


def _one_thread() -> None:
    """All arms alike, whatever the machine's other work."""
    import torch

    torch.set_num_threads(1)


def _with_speed(turn: Callable[[], Sample]) -> Turn:
    """The turn with its throughput beside it."""
    import time

    def timed() -> Sample:
        started = time.perf_counter()
        sample = turn()
        seconds = time.perf_counter() - started
        assert sample.bytes is not None
        return Sample(seconds, bytes=sample.bytes, figures={"mb_per_second": sample.bytes / seconds / 1e6})

    return timed
