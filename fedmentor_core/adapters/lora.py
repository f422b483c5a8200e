"""LoRA adapters by peft: attach to a shared backbone, read, write, and store as safetensors with a JSON config.

An adapter's *state* is a flat mapping of tensor names to fp32 CPU tensors. What of it clients train, noise and send:

* 'b', FFA-LoRA: B; A is drawn once from the study's seed and frozen (Sun et al. 2024, arXiv 2403.12313);
* 'both', FedIT: A and B;
* 'alternate', RoLoRA: B in even rounds, A in odd ones (Chen et al. 2024, arXiv 2409.02346);
* 'core', Fed-SB: an r x r matrix R between frozen orthonormal B and A, so the adapter adds s B R A (Singhal et al.
  2025, arXiv 2502.15436).

Shapes: ``...lora_A.weight`` is (rank, d_in), ``...lora_B.weight`` is (d_out, rank), ``...lora_R.weight`` is (rank,
rank). A state may also hold what was added to the base (``base_delta.py``).
"""

import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fedmentor_core.adapters.backbone import Backbone
from fedmentor_core.adapters.base_delta import apply_deltas, delta_factors, is_delta
from fedmentor_core.config import AdapterConfig
from fedmentor_core.errors import BackboneError, IntegrityError

State = dict[str, Any]
Factor = Literal["A", "B", "R"]
_FACTOR = re.compile(r"\.lora_([ABR])\.weight$")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PEFT_PREFIX = "base_model.model."
_seeding = threading.Lock()


def trained_factors(train: str, round_index: int) -> frozenset[str]:
    """Which factors a round trains: 'A', 'B' or 'R'."""
    if train == "alternate":
        return frozenset("A" if round_index % 2 else "B")
    return frozenset({"b": "B", "both": "AB", "core": "R"}[train])


def factor_of(name: str) -> str | None:
    """'A', 'B' or 'R' for a short tensor name; None for one that is no factor."""
    match = _FACTOR.search(name)
    return None if match is None else match[1]


def layer_of(name: str) -> int | None:
    """Index of the block that a module or tensor belongs to; None where it is in none."""
    match = _LAYER.search(name)
    return None if match is None else int(match[1])


def factor_name(module: str, factor: Factor) -> str:
    """The short tensor name of a module's factor."""
    return f"{module}.lora_{factor}.weight"


def modules_of(state: Mapping[str, Any]) -> list[str]:
    """Short names of the adapted modules, sorted."""
    return sorted({_FACTOR.sub("", name) for name in state if factor_of(name) is not None})


def attach(backbone: Backbone, config: AdapterConfig, seed: int, round_index: int = 0) -> Any:
    """A peft model on a tree that shares the backbone's weights; A from ``seed``, B zero, and ready for a round.

    Around a core, A and B are orthonormal from ``seed`` and R is zero. The model is already on its device before hooks
    are attached (Opacus would otherwise follow stale parameters).

    Raises:
        BackboneError: a target module that matches nothing.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    tree = backbone.share()
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft takes any number
        target_modules=_targets(tree, config),
        layers_to_transform=_layers(tree, config),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with _seeding, torch.random.fork_rng(devices=[]):  # torch's global generator is one for all threads
        torch.manual_seed(seed)
        model = get_peft_model(tree, lora)
        if config.train == "core":
            _insert_cores(model)
    trained = trained_factors(config.train, round_index)
    for name, parameter in model.named_parameters():
        factor = factor_of(short_name(name))
        if factor is not None:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(factor in trained)
    return model


def _insert_cores(model: Any) -> None:
    """Put a zero R between each A and B, and make those orthonormal, so that no direction weighs more than another."""
    import torch

    for layer in _adapted_layers(model).values():
        inner, outer = layer.lora_A["default"], layer.lora_B["default"]
        rank, device = outer.in_features, outer.weight.device
        inner.weight.data = torch.linalg.qr(torch.randn(inner.in_features, rank)).Q.T.contiguous().to(device)
        outer.weight.data = torch.linalg.qr(torch.randn(outer.out_features, rank)).Q.contiguous().to(device)
        core = torch.nn.Linear(rank, rank, bias=False, device=device)
        torch.nn.init.zeros_(core.weight)
        layer.lora_B["default"] = torch.nn.Sequential()
        layer.lora_B["default"].add_module("core", core)
        layer.lora_B["default"].add_module("outer", outer)


def _adapted_layers(model: Any) -> dict[str, Any]:
    """The layers that peft put in, by short module name."""
    return {
        name.removeprefix(_PEFT_PREFIX): module for name, module in model.named_modules() if hasattr(module, "lora_B")
    }


def main_directions(model: Any, seed: int) -> State:
    """A and B around a core along the largest singular values of each frozen weight matrix (as in LoRA-XS).

    The weights are public, so these factors are.

    Returns:
        Orthonormal A and B by short name, by randomised decomposition seeded with ``seed``.
    """
    import torch

    found: State = {}
    with _seeding, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module, layer in sorted(_adapted_layers(model).items()):
            weight = layer.base_layer.weight.detach().float().cpu()
            rank = layer.lora_A["default"].out_features
            u, _, v = torch.svd_lowrank(weight, q=min(rank + 8, *weight.shape), niter=4)
            found[factor_name(module, "B")] = u[:, :rank].contiguous()
            found[factor_name(module, "A")] = v[:, :rank].T.contiguous()
    return found


def _targets(tree: Any, config: AdapterConfig) -> str | list[str]:
    """What peft should adapt; 'all-linear' by name where only some layers are adapted, as peft asks."""
    import torch

    if config.target_modules != "all-linear":
        names = list(config.target_modules)
        _check_targets(tree, names)
        return names
    if config.last_layers is None:
        return "all-linear"
    head = tree.get_output_embeddings()
    linear = (
        name for name, module in tree.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    )
    return sorted({name.rsplit(".", 1)[-1] for name in linear})


def _layers(tree: Any, config: AdapterConfig) -> list[int] | None:
    """Indices of the adapted layers; None for all.

    Raises:
        BackboneError: more layers than the backbone has.
    """
    if config.last_layers is None:
        return None
    n_layers = int(tree.config.num_hidden_layers)
    if config.last_layers > n_layers:
        raise BackboneError(
            f"adapter.last_layers is {config.last_layers} but the backbone has {n_layers} layers. "
            "Lower it, or leave it out for all."
        )
    return list(range(n_layers - config.last_layers, n_layers))


def _check_targets(tree: Any, targets: list[str]) -> None:
    import torch

    linear = {name.rsplit(".", 1)[-1] for name, module in tree.named_modules() if isinstance(module, torch.nn.Linear)}
    missing = [target for target in targets if target.rsplit(".", 1)[-1] not in linear]
    if missing:
        raise BackboneError(
            f"adapter.target_modules {missing} match no linear module of the backbone; it has {sorted(linear)}. "
            "Name some of those, or use 'all-linear'."
        )
    head = tree.get_output_embeddings()
    head_names = {name.rsplit(".", 1)[-1] for name, module in tree.named_modules() if module is head}
    adapted_head = sorted(head_names.intersection(target.rsplit(".", 1)[-1] for target in targets))
    if adapted_head:
        raise BackboneError(
            f"adapter.target_modules names the output head {adapted_head}, which is computed at target tokens only and "
            "so has no gradient per row. Leave it out."
        )


def short_name(parameter_name: str) -> str:
    """Stable tensor name: without peft's wrapping and adapter name, and the core as a factor R of its own."""
    name = parameter_name.removeprefix(_PEFT_PREFIX).replace(".default.", ".")
    return name.replace(".lora_B.core.", ".lora_R.").replace(".lora_B.outer.", ".lora_B.")


def trainable_parameters(model: Any) -> dict[str, Any]:
    """The trained tensors by short name, in a fixed order."""
    named = {short_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    return dict(sorted(named.items()))


def adapter_state(model: Any, *, trainable_only: bool) -> State:
    """Copy the adapter's tensors (fp32, CPU)."""
    return {
        short_name(name): parameter.detach().to("cpu", copy=True).float().contiguous()
        for name, parameter in sorted(model.named_parameters())
        if "lora_" in name and (parameter.requires_grad or not trainable_only)
    }


def load_state(model: Any, state: Mapping[str, Any]) -> None:
    """Write ``state`` into the model's adapter in place; names and shapes must match existing tensors.

    What was added to the base is from now on what ``state`` says, which is nothing where it says nothing.

    Raises:
        IntegrityError: an unknown name or another shape.
    """
    import torch

    parameters = {short_name(name): p for name, p in model.named_parameters() if "lora_" in name}
    apply_deltas({name: layer.base_layer for name, layer in _adapted_layers(model).items()}, state)
    with torch.no_grad():
        for name, tensor in state.items():
            if is_delta(name):
                continue
            if name not in parameters:
                raise IntegrityError(f"adapter tensor {name!r} does not belong to this backbone and adapter config.")
            if tuple(tensor.shape) != tuple(parameters[name].shape):
                raise IntegrityError(
                    f"adapter tensor {name!r} is {tuple(tensor.shape)}, expected {tuple(parameters[name].shape)}."
                )
            parameters[name].copy_(tensor)


def changes_nothing(state: Mapping[str, Any]) -> bool:
    """Whether a model computes as its backbone does with this whole adapter: of each product one factor is zero."""
    without_effect = {_FACTOR.sub("", name) for name, one in state.items() if factor_of(name) and not one.any()}
    return without_effect == set(modules_of(state)) != set() and not any(map(is_delta, state))


def trained_part(state: Mapping[str, Any], config: AdapterConfig, round_index: int) -> State:
    """What a client with this adapter trains of the global adapter in a round: its factors, at its rank."""
    trained = trained_factors(config.train, round_index)
    return {name: tensor for name, tensor in cut_to_rank(state, config.rank).items() if factor_of(name) in trained}


def cut_to_rank(state: Mapping[str, Any], rank: int) -> State:
    """The first ``rank`` directions of every factor; tensors of that rank or a lower one stay the objects they are.

    Of an adapter that the rule 'svd' made these are its best approximation of that rank.
    """
    cut: State = {}
    for name, tensor in state.items():
        factor = factor_of(name)
        if factor == "A" and tensor.shape[0] > rank:
            tensor = tensor[:rank].contiguous()
        elif factor == "B" and tensor.shape[1] > rank:
            tensor = tensor[:, :rank].contiguous()
        cut[name] = tensor
    return cut


def plain_lora(state: Mapping[str, Any], config: AdapterConfig) -> tuple[State, AdapterConfig]:
    """The same function of the input as A and B alone: what anybody who knows LoRA can load on the untouched backbone.

    A core is multiplied into B. What was added to the base becomes further directions of A and B, so the rank grows to
    that of the module that needs most; the others are filled up with zeros. The scale alpha / rank stays.

    Args:
        state: frozen and trained tensors, and what was added to the base.
        config: the adapter that they belong to.

    Returns:
        A and B of every module, fp32, and the configuration that they load with; both as given where that is all.
    """
    import torch

    if all(factor_of(name) in ("A", "B") for name in state):
        return dict(state), config
    pairs: dict[str, tuple[Any, Any]] = {}
    for module in modules_of(state):
        b, a = state[factor_name(module, "B")].double(), state[factor_name(module, "A")].double()
        core = state.get(factor_name(module, "R"))
        b = b if core is None else b @ core.double()
        added = delta_factors(state, module)
        if added is not None:
            b, a = torch.cat([b, added[0].double() / config.scale], dim=1), torch.cat([a, added[1].double()])
        pairs[module] = _thin(b, a)
    rank = max(len(a) for _, a in pairs.values())
    plain: State = {}
    for module, (b, a) in pairs.items():
        missing = rank - len(a)
        plain[factor_name(module, "B")] = torch.nn.functional.pad(b, (0, missing)).float().contiguous()
        plain[factor_name(module, "A")] = torch.nn.functional.pad(a, (0, 0, 0, missing)).float().contiguous()
    alpha = config.alpha if rank == config.rank else config.scale * rank
    return plain, config.model_copy(update={"rank": rank, "alpha": alpha, "train": "both"})


def _thin(b: Any, a: Any) -> tuple[Any, Any]:
    """Factors of the same product with no more directions than a matrix of its shape can have."""
    import torch

    if b.shape[1] <= min(b.shape[0], a.shape[1]):
        return b, a
    if a.shape[1] <= b.shape[0]:
        return b @ a, torch.eye(a.shape[1], dtype=b.dtype)
    return torch.eye(b.shape[0], dtype=b.dtype), b @ a


def state_to_bytes(state: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    """Safetensors bytes; the same state and metadata give the same bytes."""
    from safetensors.torch import save

    data = save(dict(sorted(state.items())), metadata=dict(metadata or {}) or None)
    return data if len(metadata or {}) < 2 else _with_sorted_metadata(data)


def _with_sorted_metadata(data: bytes) -> bytes:
    """The same file with its metadata in order: safetensors writes several entries in one that changes each time."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return b"".join((data[:8], text.ljust(end - 8), memoryview(data)[end:]))


def state_from_bytes(data: bytes) -> State:
    """Read safetensors bytes.

    Raises:
        IntegrityError: not a safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except SafetensorError:
        raise IntegrityError(f"adapter file of {len(data)} bytes is not valid safetensors.") from None


def metadata_from_bytes(data: bytes) -> dict[str, str]:
    """What safetensors bytes say about themselves in their header.

    Raises:
        IntegrityError: not a safetensors file.
    """
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return {str(name): str(value) for name, value in header.get("__metadata__", {}).items()}
    except (ValueError, AttributeError):
        raise IntegrityError(f"not a safetensors file ({len(data)} bytes): torn or tampered.") from None


def resolved_targets(model: Any) -> tuple[str, ...]:
    """Names of the adapted linear modules."""
    return tuple(sorted({name.split(".")[-3] for name in adapter_state(model, trainable_only=False)}))


def save_adapter_folder(
    folder: Path, state: Mapping[str, Any], config: AdapterConfig, targets: tuple[str, ...]
) -> None:
    """Write an adapter in peft's own layout (loads with ``PeftModel.from_pretrained``), as ``plain_lora`` gives it."""
    state, config = plain_lora(state, config)
    adapted = sorted({layer for name in state if (layer := layer_of(name)) is not None})
    layers = adapted if config.last_layers is not None else None
    folder.mkdir(parents=True, exist_ok=True)
    wrapped = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
    (folder / WEIGHTS_FILE).write_bytes(state_to_bytes(wrapped, {"format": "pt"}))
    (folder / CONFIG_FILE).write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": config.rank,
                "lora_alpha": config.alpha,
                "lora_dropout": 0.0,
                "bias": "none",
                "target_modules": list(targets),
                "layers_to_transform": layers,
                "inference_mode": True,
                "base_model_name_or_path": None,
            },
            indent=2,
            sort_keys=True,
        ),
        encoding="utf-8",
    )


def load_adapter_folder(backbone: Backbone, folder: Path) -> Any:
    """A model ready to generate, from a folder written by ``save_adapter_folder``.

    Raises:
        IntegrityError: the weights are torn or do not fit the backbone.
    """
    config, state = read_adapter_folder(folder)
    model = attach(backbone, config, seed=0)
    load_state(model, state)
    model.eval()
    return model


def read_adapter_folder(folder: Path) -> tuple[AdapterConfig, State]:
    """Settings and all tensors (frozen and trained, by short name) of a folder written by ``save_adapter_folder``.

    Raises:
        IntegrityError: the files are torn or not ours.
    """
    try:
        raw = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        config = AdapterConfig(
            rank=raw["r"],
            alpha=raw["lora_alpha"],
            target_modules=tuple(raw["target_modules"]),
            last_layers=len(raw["layers_to_transform"]) if raw.get("layers_to_transform") else None,
            train="both",
        )
        data = (folder / WEIGHTS_FILE).read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"adapter folder {folder} cannot be read ({type(error).__name__}).") from None
    return config, {short_name(name): tensor for name, tensor in state_from_bytes(data).items()}
