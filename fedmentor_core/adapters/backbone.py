"""Loading the frozen backbone once per process, and sharing its weights between simulated clients."""

import copy
import threading
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedmentor_core.config import BackboneConfig
from fedmentor_core.errors import BackboneError
from fedmentor_core.hashing import canonical_sha256

_lock = threading.Lock()
_loaded: dict[str, "Backbone"] = {}


@dataclass(frozen=True)
class Backbone:
    """A frozen causal language model and its tokenizer.

    Attributes:
        name: as configured.
        revision: hub commit, where there is one.
        sha256: digest over the weight files, or over the weights in memory for a hub model without files at hand.
        model: ``transformers`` model in eval mode; every parameter has ``requires_grad=False``.
        tokenizer: its tokenizer, with a padding token.
        device: where the weights are.
    """

    name: str
    revision: str | None
    sha256: str
    model: Any
    tokenizer: Any
    device: str

    @property
    def n_parameters(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def share(self) -> Any:
        """A copy of the module tree whose parameters and buffers ARE the backbone's: no weight is copied.

        Each simulated client wraps its own tree, so adapters, hooks and per-sample gradients never meet.
        """
        memo: dict[int, Any] = {id(tensor): tensor for tensor in self.model.parameters()}
        memo |= {id(tensor): tensor for tensor in self.model.buffers()}
        return copy.deepcopy(self.model, memo)


def embedded_backbone_folder() -> Path:
    """Folder of the backbone that ships with the package."""
    return Path(str(files("fedmentor_core"))) / "assets" / "backbone"


def load_backbone(config: BackboneConfig) -> Backbone:
    """Load, verify, freeze; at most once per process and configuration.

    Raises:
        BackboneError: not found (offline, misspelt), or its digest is not the pinned one.
    """
    key = canonical_sha256(config.model_dump(mode="json", exclude={"max_length"}))
    with _lock:
        if key not in _loaded:
            _loaded[key] = _load(config)
        return _loaded[key]


def resolve_device(device: str) -> str:
    """'auto' becomes 'cuda' where there is a GPU, else 'cpu'.

    Raises:
        BackboneError: 'cuda' was asked for and there is none.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise BackboneError("backbone.device is 'cuda' but torch sees no GPU; use 'auto' or 'cpu'.")
    return device


def weights_sha256(folder: Path) -> str:
    """Digest of a folder's weight files: of the file itself when there is one, else of their list of digests."""
    import hashlib

    digests = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as handle:
            digests[path.name] = hashlib.file_digest(handle, "sha256").hexdigest()
    if len(digests) == 1:
        return next(iter(digests.values()))
    return canonical_sha256(digests)


def pinned_sha256(config: BackboneConfig, folder: Path | None) -> str:
    """Digest of the backbone's weights, in ``folder`` or in the hub's cache.

    Raises:
        BackboneError: it is not the one that the configuration pins.
    """
    digest = weights_sha256(folder) if folder else _hub_digest(config)
    if config.sha256 is not None and digest != config.sha256:
        raise BackboneError(
            f"backbone {config.name!r}: expected weights sha256 {config.sha256}, got {digest}. "
            "Correct backbone.sha256 or restore the weights."
        )
    return digest


def _load(config: BackboneConfig) -> Backbone:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = resolve_device(config.device)
    folder = folder_of(config)
    source = str(folder) if folder else config.name
    options: dict[str, Any] = {} if folder else {"revision": config.revision}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, config.dtype), use_safetensors=True, **options
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackboneError(
            f"backbone {config.name!r} was not found or cannot be loaded: {first} Allowed: 'embedded', a local folder "
            "in Hugging Face form with safetensors weights, or a hub id with the network up (or the model in the "
            "local hub cache)."
        ) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    digest = pinned_sha256(config, folder)
    frozen: Any = model
    frozen.requires_grad_(False)
    frozen.eval()
    frozen.to(device)
    return Backbone(
        name=config.name, revision=config.revision, sha256=digest, model=model, tokenizer=tokenizer, device=device
    )


def folder_of(config: BackboneConfig) -> Path | None:
    """Where the backbone is on disk; None: its name is a hub id.

    Raises:
        BackboneError: the folder does not exist, or is no model.
    """
    if config.name == "embedded":
        return embedded_backbone_folder()
    path = Path(config.name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BackboneError(
                f"backbone folder {config.name!r} holds no config.json. Give a model folder in Hugging Face form "
                "(config.json, safetensors weights, tokenizer files)."
            )
        return path
    if config.name.startswith((".", "/", "~")) or config.name.count("/") > 1:
        raise BackboneError(
            f"backbone folder {config.name!r} does not exist. Give 'embedded', an existing folder or a hub id."
        )
    return None


def _hub_digest(config: BackboneConfig) -> str:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(config.name, revision=config.revision, allow_patterns=["*.safetensors"])
    return weights_sha256(Path(folder))
