"""Toxicity through the real Detoxify class, on the embedded scorer. Texts are invented and mild."""

import hashlib
import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from fedmentor_core.errors import BackboneError
from fedmentor_core.evaluation import toxicity
from fedmentor_core.evaluation.scorers_config import ToxicityConfig
from fedmentor_core.evaluation.toxicity import ToxicityScorer, convert_checkpoint, embedded_folder

ABUSE = [
    "You are a stupid idiot and I hate you.",
    "Shut up, you worthless piece of trash.",
    "Nobody likes you, you pathetic loser. Go away and die.",
    "You should kill yourself.",
]
CALM = [
    "I feel so tired and alone tonight.",
    "I hate myself and I cannot stop crying.",
    "Sometimes I think about ending my life, and it scares me.",
    "My father shouted at me again and now I feel worthless.",
    "Thank you for telling me. You deserve support, and you are not alone.",
    "Yes, the poster suffers from stress. Reasoning: the post says they have not slept for days.",
]


@pytest.fixture(scope="module")
def scorer() -> ToxicityScorer:
    return ToxicityScorer()


def test_abuse_is_toxic_and_distress_is_not(scorer: ToxicityScorer) -> None:
    scores = scorer.score(ABUSE + CALM)
    assert min(scores[: len(ABUSE)]) > 0.5
    assert max(scores[len(ABUSE) :]) < 0.5
    assert all(0.0 <= s <= 1.0 for s in scores)


def test_blank_texts_score_zero(scorer: ToxicityScorer) -> None:
    assert scorer.score([]) == []
    assert scorer.score(["", "  \n\t", "\u200b"]) == [0.0, 0.0, 0.0]
    scores = scorer.score(["", ABUSE[0], " "])
    assert scores[0] == scores[2] == 0.0
    assert scores[1] > 0.5


def test_scores_do_not_depend_on_the_batch(scorer: ToxicityScorer) -> None:
    texts = [*ABUSE, *CALM, "ok", "", CALM[0] * 8]
    together = scorer.score(texts)
    alone = [scorer.score([text])[0] for text in texts]
    small = ToxicityScorer(ToxicityConfig(batch_size=2)).score(texts)
    assert together == pytest.approx(alone, abs=1e-4)
    assert together == pytest.approx(small, abs=1e-4)
    assert scorer.score(list(reversed(texts))) == pytest.approx(list(reversed(together)), abs=1e-4)


def test_abuse_past_the_context_is_found(scorer: ToxicityScorer) -> None:
    # Detoxify alone would cut both texts off at the same place and give them one score.
    calm = (
        "Thank you for writing. It sounds as if the last months were hard, and it makes sense that you are tired. Many "
        "people feel this way after a loss. It may help to talk with someone you trust, to keep regular hours, and to "
        "ask your doctor about support near you. Small steps count. What helped you when things were hard before? "
    ) * 3
    assert len(calm.split()) > scorer.identity.window_tokens
    quiet, hidden = scorer.score([calm, calm + " ".join(ABUSE)])
    assert quiet < 0.5 < hidden
    cut = toxicity._load(scorer.config).detoxify.predict([calm, calm + " ".join(ABUSE)])["toxicity"]
    assert cut[0] == pytest.approx(cut[1], abs=1e-4)


def test_scores_equal_detoxify_itself(scorer: ToxicityScorer) -> None:
    detoxify = toxicity._load(scorer.config).detoxify
    texts = ABUSE + CALM
    assert scorer.score(texts) == pytest.approx(detoxify.predict(texts)["toxicity"], abs=1e-5)
    assert type(detoxify).__module__.startswith("detoxify")


def test_every_tensor_of_the_asset_arrives(scorer: ToxicityScorer) -> None:
    arrived = toxicity._load(scorer.config).detoxify.model.state_dict()
    stored = load_file(embedded_folder() / "model.safetensors")
    assert arrived.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(arrived[name].cpu(), tensor.to(arrived[name].dtype)), name


def test_the_asset_is_small_and_holds_no_pickle() -> None:
    names = {path.name for path in embedded_folder().iterdir()}
    assert {"model.safetensors", "checkpoint.json", "config.json", "README.md"} <= names
    assert not [n for n in names if n.endswith((".bin", ".ckpt", ".pt", ".pkl"))]
    assert sum(path.stat().st_size for path in embedded_folder().iterdir()) <= 6 * 2**20


def test_identity_names_the_scorer_and_the_card_agrees(scorer: ToxicityScorer) -> None:
    identity = scorer.identity
    assert identity.model == "embedded"
    assert identity.classes == ("toxicity",)
    assert "/" not in repr(identity)
    weights = (embedded_folder() / "model.safetensors").read_bytes()
    assert identity.weights_sha256 == hashlib.sha256(weights).hexdigest()
    assert identity.weights_sha256 in (embedded_folder() / "README.md").read_text(encoding="utf-8")


def test_one_load_for_all_threads() -> None:
    results: list[list[float]] = []
    threads = [threading.Thread(target=lambda: results.append(ToxicityScorer().score(ABUSE + CALM))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert all(r == pytest.approx(results[0], abs=1e-6) for r in results)
    first, other = ToxicityConfig(), ToxicityConfig(batch_size=3, safe_threshold=0.7)
    assert toxicity._load(first) is toxicity._load(other)


# --- local folders ----------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(embedded_folder(), tmp_path / "scorer"))


def _as_ckpt(folder: Path) -> Path:
    """The folder's scorer as Detoxify's own pickle."""
    path = folder / "scorer.ckpt"
    config = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
    torch.save({"config": config, "state_dict": load_file(folder / "model.safetensors")}, path)
    (folder / "model.safetensors").unlink()
    (folder / "checkpoint.json").unlink()
    return path


def test_a_local_folder_scores_as_the_embedded_one(scorer: ToxicityScorer, copied: Path) -> None:
    local = ToxicityScorer(ToxicityConfig(model=str(copied)))
    assert local.score(ABUSE) == scorer.score(ABUSE)
    assert local.identity.model == "scorer"


def test_an_unknown_ckpt_is_refused_before_it_is_opened(copied: Path, tmp_path: Path) -> None:
    touched = tmp_path / "touched"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(touched),)

    path = _as_ckpt(copied)
    path.write_bytes(pickle.dumps(Payload()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(BackboneError, match=rf"refused to open scorer\.ckpt.*{digest}.*trusted_sha256"):
        ToxicityScorer(ToxicityConfig(model=str(copied))).score(["hello"])
    assert not touched.exists()


def test_a_listed_ckpt_scores_and_converts(scorer: ToxicityScorer, copied: Path, tmp_path: Path) -> None:
    path = _as_ckpt(copied)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    config = ToxicityConfig(model=str(copied), trusted_sha256=(digest,))
    local = ToxicityScorer(config)
    # The pickle holds fp16 tensors, which Detoxify copies into an fp32 model or keeps.
    assert local.score(ABUSE) == pytest.approx(scorer.score(ABUSE), abs=1e-2)
    assert local.identity.weights_sha256 == digest
    with pytest.raises(BackboneError, match="refused"):
        convert_checkpoint(path, copied, tmp_path / "out")
    convert_checkpoint(path, copied, tmp_path / "out", trusted_sha256=[digest])
    converted = ToxicityScorer(ToxicityConfig(model=str(tmp_path / "out")))
    assert converted.score(ABUSE) == scorer.score(ABUSE)


def test_a_published_name_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    scorer = ToxicityScorer(ToxicityConfig(model="original"))
    with pytest.raises(BackboneError, match=r"'original' is not in the local cache.*'embedded'"):
        scorer.score(["hello"])
    # A file of the right name in torch's hub cache is not trusted for its name.
    cached = tmp_path / "hub" / "checkpoints" / "toxic_original-c1212f89.ckpt"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"not the published file")
    with pytest.raises(BackboneError, match=r"refused to open toxic_original-c1212f89\.ckpt.*allowed c1212f89"):
        scorer.score(["hello"])


def test_a_published_name_whose_digest_is_right_is_loaded(
    scorer: ToxicityScorer, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The published file is not at hand offline: the embedded scorer takes its place in torch's hub cache,
    # with its digest listed, so that the whole path through Detoxify's torch.hub code runs.
    path = _as_ckpt(copied)
    content = torch.load(path, weights_only=True)
    content["config"]["arch"]["args"]["model_type"] = str(embedded_folder())
    cached = tmp_path / "hub" / "checkpoints" / "toxic_original-c1212f89.ckpt"
    cached.parent.mkdir(parents=True)
    torch.save(content, cached)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    digest = hashlib.sha256(cached.read_bytes()).hexdigest()
    published = ToxicityScorer(ToxicityConfig(model="original", trusted_sha256=(digest,)))
    assert published.score(ABUSE) == pytest.approx(scorer.score(ABUSE), abs=1e-2)
    assert published.identity.model == "original"
    assert published.identity.weights_sha256 == digest


def test_broken_folders_are_said(copied: Path, tmp_path: Path) -> None:
    def load(model: Path) -> None:
        ToxicityScorer(ToxicityConfig(model=str(model))).score(["hello"])

    with pytest.raises(BackboneError, match="no such scorer"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BackboneError, match=r"holds no scorer; got 0 \.ckpt files"):
        load(tmp_path / "empty")

    state = load_file(copied / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != "classifier.weight"}, copied / "model.safetensors")
    with pytest.raises(BackboneError, match=r"1 tensors.*classifier\.weight"):
        load(copied)
    (copied / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(BackboneError, match="cannot be read"):
        load(copied)
    save_file(state, copied / "model.safetensors")
    config = json.loads((copied / "checkpoint.json").read_text(encoding="utf-8"))
    config["arch"]["args"]["model_name"] = "AutoModel"
    (copied / "checkpoint.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(BackboneError, match="Detoxify's layout"):
        load(copied)
    config["arch"]["args"]["model_name"] = "BertForSequenceClassification"
    config["dataset"]["args"]["classes"] = ["spam"]
    (copied / "checkpoint.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(BackboneError, match=r"toxicity\.label.*spam"):
        load(copied)
    (copied / "config.json").unlink()
    with pytest.raises(BackboneError, match="could not be built"):
        load(copied)


@pytest.mark.parametrize(
    "bad",
    [
        {"safe_threshold": 0.0},
        {"safe_threshold": 1.0},
        {"batch_size": 0},
        {"label": "obscene"},
        {"trusted_sha256": ["c1212f89"]},
        {"model": ""},
        {"threshold": 0.5},
    ],
)
def test_impossible_configs_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        ToxicityConfig.model_validate(bad)
