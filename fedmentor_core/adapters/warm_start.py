"""Starting from an adapter that exists: a folder that the configuration pins, or the registry's champion.

Every client gets the same start, because the server makes it once and ships it. A start costs no privacy where it is
public or was itself released under privacy (post-processing); nothing here can check which, so the configuration's
author answers for a folder, and the ledgers for a champion.
"""

import hashlib
import math
from pathlib import Path

from fedmentor_core.adapters.base_delta import delta_tensors
from fedmentor_core.adapters.lora import WEIGHTS_FILE, State, factor_name, modules_of, read_adapter_folder
from fedmentor_core.adapters.low_rank import svd_of_product
from fedmentor_core.config import AdapterConfig
from fedmentor_core.errors import ConfigError


def read_pinned(config: AdapterConfig) -> tuple[AdapterConfig, State]:
    """The adapter in ``start_from``, once its digest is the pinned one.

    Raises:
        ConfigError: no such file, or other bytes.
        IntegrityError: it is no adapter in peft's layout.
    """
    assert config.start_from is not None
    folder = Path(config.start_from).expanduser()
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ConfigError(
            f"adapter.start_from {config.start_from!r} holds no {WEIGHTS_FILE}. Give a folder in peft's layout, or "
            "leave it out to start anew. Nothing was charged."
        )
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != config.start_sha256:
        raise ConfigError(
            f"adapter.start_from {config.start_from!r}: expected sha256 {config.start_sha256} of its {WEIGHTS_FILE}, "
            f"got {digest}. Restore the file, or correct adapter.start_sha256. Nothing was charged."
        )
    return read_adapter_folder(folder)


def fitted(
    start: State, theirs: AdapterConfig, config: AdapterConfig, own: State, *, corrects_base: bool, said: str
) -> State:
    """An existing adapter in the form that a study trains, computing exactly what it computed before.

    Most forms take the factors as they are. A core takes the singular value decomposition of their product: orthonormal
    B and A, and R in the middle. Where the rule may correct the base, an adapter of a larger rank is taken as its best
    factors of the study's rank, and the rest goes into the base.

    Args:
        start: its A and B.
        theirs: its configuration.
        config: the study's adapter.
        own: the study's tensors, frozen and trained, as they would start anew.
        corrects_base: whether the study's rule adds to the base.
        said: what it is and where it was named, for the message.

    Raises:
        ConfigError: other modules, another rank or scale, or other shapes.
    """
    larger = corrects_base and theirs.rank > config.rank
    problems = []
    if modules_of(own) != modules_of(start):
        problems.append(f"it adapts {len(start)} tensors of {sorted(_targets(start))}")
    elif any(_outer_shape(own, module) != _outer_shape(start, module) for module in modules_of(own)):
        problems.append("its matrices have other sizes")
    elif theirs.rank != config.rank and not larger:
        problems.append(f"its rank is {theirs.rank}")
    if not math.isclose(theirs.scale, config.scale, rel_tol=1e-9):
        problems.append(f"its scale alpha / rank is {theirs.scale:g}")
    if problems:
        raise ConfigError(
            f"{said} does not fit this study's adapter: {'; '.join(problems)}; the study adapts {len(own)} tensors of "
            f"{sorted(_targets(own))} with rank {config.rank} and scale {config.scale:g}. Set the adapter section back "
            "to its, or start anew. Nothing was charged."
        )
    if config.train == "core":
        return _around_cores(start, config.rank)
    return _best_and_rest(start, config) if larger else start


def _around_cores(start: State, rank: int) -> State:
    import torch

    made: State = {}
    for module in modules_of(start):
        u, s, vt = svd_of_product(start[factor_name(module, "B")], start[factor_name(module, "A")])
        made[factor_name(module, "B")] = u[:, :rank].float().contiguous()
        made[factor_name(module, "A")] = vt[:rank].float().contiguous()
        made[factor_name(module, "R")] = torch.diag(s[:rank]).float()
    return made


def _best_and_rest(start: State, config: AdapterConfig) -> State:
    made: State = {}
    for module in modules_of(start):
        u, s, vt = svd_of_product(start[factor_name(module, "B")], start[factor_name(module, "A")])
        root, rank = s.sqrt(), config.rank
        b, a = u * root, vt * root[:, None]
        made[factor_name(module, "B")] = b[:, :rank].float().contiguous()
        made[factor_name(module, "A")] = a[:rank].float().contiguous()
        made |= delta_tensors(module, config.scale * b[:, rank:], a[rank:])
    return made


def _outer_shape(state: State, module: str) -> tuple[int, int]:
    return state[factor_name(module, "B")].shape[0], state[factor_name(module, "A")].shape[1]


def _targets(state: State) -> set[str]:
    return {module.rsplit(".", 1)[-1] for module in modules_of(state)}
