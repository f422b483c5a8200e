"""LoRA adapters by peft: attach to a shared backbone, read, write, and store as safetensors with a JSON config.

An adapter's *state* is a flat mapping of tensor names to fp32 CPU tensors. Under FFA-LoRA (``train='b'``) A is
drawn once from the study's seed and frozen, so only the B tensors are trained, noised, sent and averaged
(Sun et al. 2024, arXiv 2403.12313).

Shapes: ``...lora_A.weight`` is (rank, d_in), ``...lora_B.weight`` is (d_out, rank).
"""

import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmentor_core.adapters.backbone import Backbone
from fedmentor_core.config import AdapterConfig
from fedmentor_core.errors import BackboneError, IntegrityError

State = dict[str, Any]
_LAYER = re.compile(r"\.layers\.(\d+)\.")
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_seeding = threading.Lock()


def attach(backbone: Backbone, config: AdapterConfig, seed: int) -> Any:
    """A peft model on a tree that shares the backbone's weights; A from ``seed``, B zero.

    The model is already on its device before hooks are attached (Opacus would otherwise follow stale parameters).

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
    for name, parameter in model.named_parameters():
        is_lora = "lora_" in name
        if is_lora:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(is_lora and (config.train == "both" or "lora_B" in name))
    return model


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
    """Stable tensor name: without peft's wrapping and adapter name."""
    return parameter_name.removeprefix("base_model.model.").replace(".default.", ".")


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

    Raises:
        IntegrityError: an unknown name or another shape.
    """
    import torch

    parameters = {short_name(name): p for name, p in model.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, tensor in state.items():
            if name not in parameters:
                raise IntegrityError(f"adapter tensor {name!r} does not belong to this backbone and adapter config.")
            if tuple(tensor.shape) != tuple(parameters[name].shape):
                raise IntegrityError(
                    f"adapter tensor {name!r} is {tuple(tensor.shape)}, expected {tuple(parameters[name].shape)}."
                )
            parameters[name].copy_(tensor)


def state_to_bytes(state: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    """Safetensors bytes; the same state gives the same bytes."""
    from safetensors.torch import save

    return save(dict(sorted(state.items())), metadata=dict(metadata or {}) or None)


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
    """Write an adapter in peft's own layout (loads with ``PeftModel.from_pretrained``)."""
    adapted = sorted({int(match[1]) for name in state if (match := _LAYER.search(name))})
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
