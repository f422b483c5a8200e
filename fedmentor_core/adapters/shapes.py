"""Names and shapes of an adapter's tensors: of one that is loaded, or from a backbone's files alone, without torch.

A plan needs how many numbers travel and what they are called, not what they are. A safetensors file begins with the
shape of every tensor in it, so for a backbone on disk of a known family nothing has to be loaded. For any other (a hub
name, another architecture, a quantised model, a file that says something unexpected) ``shapes_from_files`` knows
nothing, and its caller loads the model, which also says what is wrong with it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmentor_core.adapters.backbone import folder_of, pinned_sha256
from fedmentor_core.adapters.lora import Factor, factor_name, factor_of, layer_of, trained_factors
from fedmentor_core.config import AdapterConfig, BackboneConfig
from fedmentor_core.wire.codecs import Shape

_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3"})
"""Model types whose matrices are all linear layers, but for the embedding and the output head."""
_NOT_ADAPTED = frozenset({"model.embed_tokens", "lm_head"})
_TYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class AdapterShapes:
    """What a study's global adapter consists of.

    Attributes:
        trained: shape of each tensor that some round trains, by short name.
        frozen: shape of each that none does.
        targets: last names of the adapted linear modules.
        backbone_sha256: digest of the backbone's weights.
    """

    trained: Mapping[str, Shape]
    frozen: Mapping[str, Shape]
    targets: tuple[str, ...]
    backbone_sha256: str


def cut_shapes(shapes: Mapping[str, Shape], rank: int) -> dict[str, Shape]:
    """Shapes of what ``lora.cut_to_rank`` leaves of tensors with these shapes."""
    cut: dict[str, Shape] = {}
    for name, shape in shapes.items():
        match factor_of(name):
            case "A":
                cut[name] = (min(rank, shape[0]), *shape[1:])
            case "B":
                cut[name] = (shape[0], min(rank, shape[1]))
            case _:
                cut[name] = shape
    return cut


def trained_shapes(shapes: Mapping[str, Shape], config: AdapterConfig, round_index: int) -> dict[str, Shape]:
    """Shapes of what ``lora.trained_part`` gives: what a client with this adapter trains in a round."""
    trained = trained_factors(config.train, round_index)
    return {name: shape for name, shape in cut_shapes(shapes, config.rank).items() if factor_of(name) in trained}


def shapes_from_files(backbone: BackboneConfig, adapter: AdapterConfig) -> AdapterShapes | None:
    """The shapes that attaching ``adapter`` to the loaded backbone would give; None: its files do not tell.

    Raises:
        BackboneError: the folder does not exist, is no model, or its weights are not the pinned ones.
    """
    folder = folder_of(backbone)
    linear = None if folder is None else _linear_layers(folder)
    chosen = None if linear is None else _chosen(linear, adapter)
    if folder is None or not chosen or _beyond_core(chosen.values(), adapter):
        return None
    rank = adapter.rank
    factors: dict[Factor, Any] = {"A": lambda out, into: (rank, into), "B": lambda out, into: (out, rank)}
    if adapter.train == "core":
        factors["R"] = lambda out, into: (rank, rank)
    shapes: dict[str, Shape] = {
        factor_name(module, factor): shape_of(*shape)
        for module, shape in chosen.items()
        for factor, shape_of in factors.items()
    }
    changing = trained_factors(adapter.train, 0) | trained_factors(adapter.train, 1)
    return AdapterShapes(
        trained={name: shape for name, shape in sorted(shapes.items()) if factor_of(name) in changing},
        frozen={name: shape for name, shape in sorted(shapes.items()) if factor_of(name) not in changing},
        targets=tuple(sorted({module.rsplit(".", 1)[-1] for module in chosen})),
        backbone_sha256=pinned_sha256(backbone, folder),
    )


def _linear_layers(folder: Path) -> dict[str, Shape] | None:
    """(d_out, d_in) of every linear layer inside the blocks of a model of a known family."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = {name: shape for path in folder.glob("*.safetensors") for name, shape in _header(path).items()}
        known = (
            config["model_type"] in _FAMILIES
            and "quantization_config" not in config
            and all(name.endswith("ForCausalLM") for name in config["architectures"])
        )
        n_layers = int(config["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    matrices: dict[str, Shape] = {
        name.removesuffix(".weight"): shape for name, shape in tensors.items() if len(shape) == 2
    }
    linear: dict[str, Shape] = {name: shape for name, shape in matrices.items() if name not in _NOT_ADAPTED}
    indices = {layer_of(name) for name in linear}
    return linear if known and linear and indices == set(range(n_layers)) else None


def _header(path: Path) -> dict[str, Shape]:
    """Shape of each tensor in a safetensors file.

    Raises:
        ValueError: a torn file, or a type that no plain model has.
    """
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(min(length, path.stat().st_size)))
    header.pop("__metadata__", None)
    end = 8 + length + max(one["data_offsets"][1] for one in header.values())
    if end != path.stat().st_size or not {one["dtype"] for one in header.values()} <= _TYPES:
        raise ValueError("torn, or quantised")
    return {name: tuple(one["shape"]) for name, one in header.items()}


def _chosen(linear: Mapping[str, Shape], adapter: AdapterConfig) -> dict[str, Shape] | None:
    """The layers that peft adapts; None where it would refuse."""
    targets = adapter.target_modules
    names = {name.rsplit(".", 1)[-1] for name in linear}
    if targets != "all-linear" and not all(target.rsplit(".", 1)[-1] in names for target in targets):
        return None
    n_layers = 1 + max(layer_of(name) or 0 for name in linear)
    first = 0 if adapter.last_layers is None else n_layers - adapter.last_layers
    if first < 0:
        return None
    return {
        name: shape
        for name, shape in linear.items()
        if (layer_of(name) or 0) >= first
        and (targets == "all-linear" or any(f".{name}".endswith(f".{target}") for target in targets))
    }


def _beyond_core(shapes: Iterable[Shape], adapter: AdapterConfig) -> bool:
    """Whether the orthonormal factors around a core would have fewer directions than its rank."""
    return adapter.train == "core" and any(min(shape) < adapter.rank for shape in shapes)
