"""Toxicity of an output, by ``detoxify.Detoxify``, from weights that cannot run code.

Detoxify's checkpoints are pickles, which are programs. The project's own scorer is therefore stored as
safetensors and JSON in the same layout (``config`` and ``state_dict``) and turned into the object that
Detoxify loads in memory. A ``.ckpt`` file is opened only when its sha256 is on a list, and with torch's
restricted reader first.

References:
    Hanu and Unitary team 2020, "Detoxify", https://github.com/unitaryai/detoxify
"""

import io
import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedmentor_core.errors import BackboneError
from fedmentor_core.evaluation._libraries import check_weights, is_blank, offline_hint, quiet, sha256_of
from fedmentor_core.evaluation.scorers_config import PUBLISHED_TOXICITY_MODELS, ToxicityConfig

WEIGHTS_FILE = "model.safetensors"
CHECKPOINT_FILE = "checkpoint.json"

KNOWN_CHECKPOINTS = {
    "original": "c1212f89ac23307ab33932ce29dc446a6e030fb3f384a500890bbe662b7b544a",
}
"""Full sha256 of published checkpoints. Of the others only the eight digits in the release's file name are
known to the project: those files are checked against the digits and read by torch's restricted reader alone,
which runs no code. Their full digest can be listed in ``trusted_sha256``."""

_SPARE_TOKENS = 8  # a window cut out of a text may take a few more tokens than it did inside it
_MOST_TOKENS = 512


@dataclass(frozen=True)
class ToxicityScorerIdentity:
    """What a report needs to name the scorer, without a path of this machine."""

    model: str
    architecture: str
    classes: tuple[str, ...]
    label: str
    window_tokens: int
    detoxify_version: str
    weights_sha256: str


class ToxicityScorer:
    """Scores texts in [0, 1], higher is more toxic. The model is loaded at the first call and kept.

    Guarantees:
        A text's score does not depend on the texts scored with it (up to float rounding). A text without a
        visible character scores 0. A text longer than the model's context is read to its end, in overlapping
        windows, and gets the highest of their scores: Detoxify alone would cut it off. Loading is shared by
        all scorers of the process that name the same model; calls from several threads are serialised.
    """

    def __init__(self, config: ToxicityConfig | None = None) -> None:
        self.config = config or ToxicityConfig()

    def score(self, texts: Sequence[str]) -> list[float]:
        """One toxicity per text, in order.

        Raises:
            BackboneError: The model cannot be loaded.
        """
        scores = [0.0] * len(texts)
        full = [i for i, text in enumerate(texts) if not is_blank(text)]
        if not full:
            return scores
        loaded = _load(self.config)
        with loaded.lock, quiet():
            windows = [(i, window) for i in full for window in _windows(texts[i], loaded)]
            windows.sort(key=lambda item: len(item[1]))  # like lengths together: less padding
            for start in range(0, len(windows), self.config.batch_size):
                batch = windows[start : start + self.config.batch_size]
                found = loaded.detoxify.predict([text for _, text in batch])[self.config.label]
                values = found if isinstance(found, list) else [found]  # Detoxify unwraps a batch of one
                for (i, _), value in zip(batch, values, strict=True):
                    # A score that is not a number must not look safe.
                    scores[i] = max(scores[i], float(value) if value == value else 1.0)
        return scores

    @property
    def identity(self) -> ToxicityScorerIdentity:
        """Name, architecture, classes, version and digest of the weights. Loads the model."""
        return _load(self.config).identity


def write_checkpoint_folder(
    folder: Path,
    model: Any,
    tokenizer: Any,
    *,
    classes: Sequence[str],
    dtype: str = "float32",
    notes: Mapping[str, Any] | None = None,
) -> str:
    """Write a Hugging Face classifier as the folder that ``ToxicityConfig.model`` can name.

    Args:
        folder: Created when missing; files of an earlier scorer are replaced.
        model: A ``...ForSequenceClassification`` model with one output per class.
        tokenizer: Its tokenizer.
        classes: Detoxify's class names in output order; must hold ``toxic`` or ``toxicity``.
        dtype: Torch dtype of floating tensors on disk.
        notes: Facts about the training, kept in ``checkpoint.json`` under ``training``.

    Returns:
        The sha256 of the weights file.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: (tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor).detach().contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    checkpoint: dict[str, Any] = {
        "arch": {
            "args": {
                "model_name": type(model).__name__,
                "model_type": ".",
                "num_classes": len(classes),
                "tokenizer_name": type(tokenizer).__name__,
            }
        },
        "dataset": {"args": {"classes": list(classes)}},
    }
    if notes is not None:
        checkpoint["training"] = dict(notes)
    (folder / CHECKPOINT_FILE).write_text(json.dumps(checkpoint, indent=2) + "\n", encoding="utf-8")
    return sha256_of(folder / WEIGHTS_FILE)


def convert_checkpoint(
    checkpoint: Path, tokenizer_folder: Path, out: Path, *, trusted_sha256: Sequence[str] = ()
) -> str:
    """Turn a ``.ckpt`` of Detoxify into safetensors and JSON, so that no pickle is needed again.

    Args:
        checkpoint: The ``.ckpt``; its digest must be known or listed.
        tokenizer_folder: The encoder's ``config.json`` and tokenizer files, in Hugging Face form.
        out: The folder to write.
        trusted_sha256: Further digests that may be opened.

    Returns:
        The sha256 of the weights file written.

    Raises:
        BackboneError: Unknown digest, or not a Detoxify checkpoint.
    """
    from safetensors.torch import save_file

    config, state, _ = _read_listed_ckpt(checkpoint, trusted_sha256)
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().clone().contiguous() for k, v in state.items()}, out / WEIGHTS_FILE)
    text = json.dumps(_at_folder(config, Path(".")), indent=2, sort_keys=True)
    (out / CHECKPOINT_FILE).write_text(text + "\n", encoding="utf-8")
    for source in sorted(tokenizer_folder.iterdir()):
        if source.suffix in {".json", ".txt", ".model"} and source.name != CHECKPOINT_FILE:
            shutil.copyfile(source, out / source.name)
    return sha256_of(out / WEIGHTS_FILE)


# --- loading ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loaded:
    detoxify: Any
    identity: ToxicityScorerIdentity
    window_tokens: int
    lock: threading.Lock


_cache: dict[ToxicityConfig, _Loaded] = {}
_cache_lock = threading.Lock()


def embedded_folder() -> Path:
    """Where the project's own scorer lies in the installed package."""
    return Path(str(files("fedmentor_core"))) / "assets" / "toxicity"


def _load(config: ToxicityConfig) -> _Loaded:
    # Threshold and batch size do not change the model.
    key = config.model_copy(update={"batch_size": 1, "safe_threshold": 0.5})
    with _cache_lock:
        if key not in _cache:
            _cache[key] = _load_uncached(config)
        return _cache[key]


def _load_uncached(config: ToxicityConfig) -> _Loaded:
    import torch

    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if config.folder is None and config.model in PUBLISHED_TOXICITY_MODELS:
        name = config.model
        detoxify, digest = _load_published(config, device)
    else:
        if config.folder is not None:
            folder, name = Path(config.folder), config.model
        elif config.model == "embedded":
            folder, name = embedded_folder(), config.model
        else:
            folder, name = Path(config.model), Path(config.model).resolve().name
        checkpoint, state, digest = _read_folder(folder, config)
        detoxify = _build(checkpoint, state, device, name, folder)
    check_weights("toxicity", name, digest, config.sha256)
    if config.label not in detoxify.class_names:
        raise BackboneError(
            f"toxicity.label: the checkpoint {name!r} has no class {config.label!r}; got classes "
            f"{', '.join(detoxify.class_names)}; use a checkpoint that has it"
        )
    window_tokens = _context(detoxify)
    detoxify.tokenizer.model_max_length = window_tokens
    detoxify.model.eval()
    identity = ToxicityScorerIdentity(
        model=name,
        architecture=type(detoxify.model).__name__,
        classes=tuple(detoxify.class_names),
        label=config.label,
        window_tokens=window_tokens,
        detoxify_version=version("detoxify"),
        weights_sha256=digest,
    )
    return _Loaded(detoxify, identity, window_tokens, threading.Lock())


def _read_folder(folder: Path, config: ToxicityConfig) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Detoxify's ``config``, its ``state_dict`` in fp32, and the digest of the weights file."""
    if not folder.is_dir():
        raise BackboneError(
            f"toxicity.model: no such scorer; got {config.model!r}; allowed 'embedded', "
            f"{', '.join(repr(n) for n in PUBLISHED_TOXICITY_MODELS)}, or an existing local folder"
        )
    if (folder / WEIGHTS_FILE).is_file() and (folder / CHECKPOINT_FILE).is_file():
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(folder / WEIGHTS_FILE)
            checkpoint = json.loads((folder / CHECKPOINT_FILE).read_text(encoding="utf-8"))
        except (SafetensorError, ValueError) as error:
            raise BackboneError(
                f"toxicity.model: {folder.name}/{WEIGHTS_FILE} or {CHECKPOINT_FILE} cannot be read "
                f"({offline_hint(error)}); the file is torn or of another format; write the folder again"
            ) from error
        state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        return _checked_layout(checkpoint, folder.name), state, sha256_of(folder / WEIGHTS_FILE)
    pickles = sorted(folder.glob("*.ckpt"))
    if len(pickles) != 1:
        raise BackboneError(
            f"toxicity.model: folder {folder.name!r} holds no scorer; got {len(pickles)} .ckpt files and no "
            f"{WEIGHTS_FILE} with {CHECKPOINT_FILE}; allowed that pair, or exactly one .ckpt, beside the "
            "tokenizer files"
        )
    return _read_listed_ckpt(pickles[0], config.trusted_sha256)


def _read_listed_ckpt(path: Path, trusted: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Read a pickle whose digest is on the list; the bytes that were hashed are the bytes that are read."""
    import hashlib

    raw = path.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    listed = {*KNOWN_CHECKPOINTS.values(), *trusted}
    if digest not in listed:
        raise BackboneError(
            f"toxicity.model: refused to open {path.name}: a .ckpt is a pickle and can run code; got sha256 "
            f"{digest}; allowed are the {len(listed)} digests known or listed in toxicity.trusted_sha256; if "
            "you trust this file as you trust code, add its digest there, or convert it to safetensors where "
            "you trust it"
        )
    checkpoint, state = _unpickle(raw, path.name, listed=True)
    return checkpoint, state, digest


def _unpickle(raw: bytes, name: str, *, listed: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    import pickle

    import torch

    try:
        try:
            content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            if not listed:
                raise
            content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=False)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise BackboneError(
            f"toxicity.model: {name} cannot be read safely ({offline_hint(error)}); it holds more than "
            "tensors and plain values, or is torn; to open it all the same, list its sha256 in "
            "toxicity.trusted_sha256"
        ) from error
    if not isinstance(content, dict) or not {"config", "state_dict"} <= content.keys():
        raise BackboneError(
            f"toxicity.model: {name} is not a Detoxify checkpoint; got no 'config' and 'state_dict'; use a "
            "file written by Detoxify, or a folder written by "
            "fedmentor_core.evaluation.toxicity.write_checkpoint_folder"
        )
    return _checked_layout(content["config"], name), dict(content["state_dict"])


def _checked_layout(checkpoint: Any, name: str) -> dict[str, Any]:
    try:
        arguments = checkpoint["arch"]["args"]
        missing = {"model_name", "model_type", "num_classes", "tokenizer_name"} - arguments.keys()
        classes = checkpoint["dataset"]["args"]["classes"]
        fits = not missing and len(classes) == arguments["num_classes"]
    except (KeyError, TypeError, AttributeError):
        fits = False
    # These two names are looked up in the transformers module.
    fits = fits and str(arguments["model_name"]).endswith("ForSequenceClassification")
    fits = fits and "Tokenizer" in str(arguments["tokenizer_name"])
    if not fits:
        raise BackboneError(
            f"toxicity.model: the config of {name} does not have Detoxify's layout; it needs arch.args "
            "(model_name, model_type, num_classes, tokenizer_name) and dataset.args.classes, one class per "
            "output"
        )
    return dict(checkpoint)


def _at_folder(checkpoint: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The config with its encoder looked up in ``folder``: Detoxify would ask the hub for it by name."""
    arguments = {**checkpoint["arch"]["args"], "model_type": str(folder)}
    return {**checkpoint, "arch": {**checkpoint["arch"], "args": arguments}}


def _build(checkpoint: dict[str, Any], state: dict[str, Any], device: str, name: str, folder: Path | None) -> Any:
    """A ``Detoxify`` object from a config and tensors; nothing but what is given here is unpickled."""
    import torch

    with quiet():
        from detoxify import Detoxify
    buffer = io.BytesIO()
    config = checkpoint if folder is None else _at_folder(checkpoint, folder)
    torch.save({"config": config, "state_dict": state}, buffer)
    buffer.seek(0)
    try:
        with quiet():
            detoxify = Detoxify(
                checkpoint=buffer,
                device=device,
                huggingface_config_path=None if folder is None else str(folder),
            )
    except (OSError, ValueError, AttributeError, RuntimeError) as error:
        raise BackboneError(
            f"toxicity.model: the scorer {name!r} could not be built ({offline_hint(error)}); a folder must "
            "hold its own config.json and tokenizer files, and a published checkpoint needs its encoder's "
            "from the hub or the local cache; use 'embedded' to work without a network"
        ) from error
    # from_pretrained fills what is missing with random numbers; a scorer must not be partly random.
    arrived = detoxify.model.state_dict()
    wrong = [
        key
        for key, tensor in arrived.items()
        if "position_ids" not in key and (key not in state or not torch.equal(tensor.cpu(), state[key].cpu()))
    ]
    if wrong:
        raise BackboneError(
            f"toxicity.model: the weights of {name!r} do not fit its config.json; got {len(wrong)} tensors "
            f"that are missing or of another shape, first {wrong[0]!r}; use the files that belong together"
        )
    return detoxify


def _load_published(config: ToxicityConfig, device: str) -> tuple[Any, str]:
    """A published checkpoint by Detoxify's own torch.hub path, opened only once its digest is checked."""
    import torch

    with quiet():
        from detoxify import Detoxify
        from detoxify.detoxify import MODEL_URLS

    url = MODEL_URLS[config.model]
    file_name = url.rsplit("/", 1)[1]
    digits = file_name.removesuffix(".ckpt").rsplit("-", 1)[1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    advice = (
        f"put {file_name} into torch's hub cache (TORCH_HOME), allow access to the network, or use "
        "toxicity.model 'embedded' or a local folder"
    )
    if not path.is_file():
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
            raise BackboneError(
                f"toxicity.model: the checkpoint {config.model!r} is not in the local cache and "
                f"HF_HUB_OFFLINE forbids to fetch it; {advice}"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digits, progress=False)
        except (OSError, RuntimeError) as error:
            raise BackboneError(
                f"toxicity.model: the checkpoint {config.model!r} is not in the local cache and could not be "
                f"fetched ({offline_hint(error)}); {advice}"
            ) from error
    digest = sha256_of(path)
    expected = KNOWN_CHECKPOINTS.get(config.model)
    if digest not in config.trusted_sha256 and (digest != expected if expected else not digest.startswith(digits)):
        raise BackboneError(
            f"toxicity.model: refused to open {file_name} in torch's hub cache: it is not the published "
            f"file; got sha256 {digest}; allowed {expected or digits + '...'}; delete it and let it be "
            "fetched again"
        )
    if digest in {expected, *config.trusted_sha256}:
        try:
            with quiet():
                return Detoxify(config.model, device=device), digest
        except (OSError, ValueError, AttributeError, RuntimeError) as error:
            raise BackboneError(
                f"toxicity.model: the checkpoint {config.model!r} could not be built "
                f"({offline_hint(error)}); its encoder's config and tokenizer come from the hub or its local "
                "cache; fetch them once, or use 'embedded'"
            ) from error
    checkpoint, state = _unpickle(path.read_bytes(), file_name, listed=False)
    return _build(checkpoint, state, device, config.model, None), digest


# --- windows ----------------------------------------------------------------------------------------------


def _context(detoxify: Any) -> int:
    positions = getattr(detoxify.model.config, "max_position_embeddings", None) or _MOST_TOKENS
    if detoxify.model.config.model_type in {"roberta", "xlm-roberta"}:
        positions -= 2  # position ids start after the padding id
    return int(min(detoxify.tokenizer.model_max_length, positions))


def _windows(text: str, loaded: _Loaded) -> list[str]:
    """The text, or overlapping pieces of it that fit the model's context."""
    tokenizer = loaded.detoxify.tokenizer
    size = loaded.window_tokens - tokenizer.num_special_tokens_to_add() - _SPARE_TOKENS
    if len(text) <= size or not tokenizer.is_fast:
        return [text]
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(offsets) <= size + _SPARE_TOKENS:
        return [text]
    step = size - size // 4
    starts = range(0, max(1, len(offsets) - size // 4), step)
    return [text[offsets[s][0] : offsets[min(s + size, len(offsets)) - 1][1]] for s in starts]
