"""Utility by the real scorers: BERTScore on the embedded encoder, ROUGE-L."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from fedmentor_core.errors import BackboneError
from fedmentor_core.evaluation.scorers_config import BertScoreConfig
from fedmentor_core.evaluation.utility import UtilityScore, UtilityScorer, embedded_encoder_folder

REFERENCE = "Yes, the poster suffers from stress. Reasoning: they cannot sleep and worry about work every night."
PARAPHRASE = "Yes, the writer is stressed. Reasoning: worries about the job keep them awake at night."
OPPOSITE = "No, the poster does not suffer from stress. Reasoning: they describe a calm day in the garden."
UNRELATED = "The train to the coast leaves at seven and costs twelve pounds."


@pytest.fixture(scope="module")
def scorer() -> UtilityScorer:
    return UtilityScorer()


def test_better_text_scores_higher(scorer: UtilityScorer) -> None:
    same, close, opposite, unrelated = scorer.score([REFERENCE, PARAPHRASE, OPPOSITE, UNRELATED], [REFERENCE] * 4)
    assert same.bertscore_f1 == pytest.approx(1.0, abs=1e-5)
    assert same.rouge_l == pytest.approx(1.0)
    assert 1 > close.bertscore_f1 > opposite.bertscore_f1 > unrelated.bertscore_f1 > 0
    assert close.bertscore_f1 - unrelated.bertscore_f1 > 0.3  # the embedded encoder separates well
    assert same.rouge_l > close.rouge_l > unrelated.rouge_l


def test_rouge_l_by_hand(scorer: UtilityScorer) -> None:
    # Longest common subsequence "the cat mat": 3 of 4 and 3 of 5 words.
    (score,) = scorer.score(["the cat mat sat"], ["the black cat on mat"])
    assert score.rouge_l == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))


@pytest.mark.parametrize("blank", ["", "   ", "\n\t", "\u200b", "\u00a0 \x00"])
def test_blank_texts_score_zero(scorer: UtilityScorer, blank: str, capfd: pytest.CaptureFixture[str]) -> None:
    zero = UtilityScore(0.0, 0.0, 0.0, 0.0)
    scores = scorer.score([blank, REFERENCE, blank, PARAPHRASE], [REFERENCE, blank, blank, REFERENCE])
    assert scores[:3] == [zero, zero, zero]
    assert scores[3].bertscore_f1 > 0.5
    assert capfd.readouterr().err == ""


def test_raw_and_rescaled_are_both_told_and_the_configuration_chooses(scorer: UtilityScorer) -> None:
    baseline = scorer.identity.baseline_f1
    assert baseline is not None
    assert 0.3 < baseline < 0.6
    rescaling = UtilityScorer(BertScoreConfig(rescale_with_baseline=True))
    for text in (REFERENCE, PARAPHRASE, UNRELATED):
        (raw,), (rescaled,) = scorer.score([text], [REFERENCE]), rescaling.score([text], [REFERENCE])
        assert raw.bertscore_f1 == raw.bertscore_f1_raw == pytest.approx(rescaled.bertscore_f1_raw)
        assert rescaled.bertscore_f1 == rescaled.bertscore_f1_rescaled == pytest.approx(raw.bertscore_f1_rescaled)
        assert raw.bertscore_f1_rescaled == pytest.approx((raw.bertscore_f1 - baseline) / (1 - baseline))
    assert raw.bertscore_f1_rescaled == pytest.approx(0, abs=0.3)  # the last text is unrelated
    assert "rescaled" not in scorer.identity.bert_score_hash
    assert rescaling.identity.bert_score_hash == scorer.identity.rescaled_hash
    assert "-custom-rescaled" in str(scorer.identity.rescaled_hash)


def test_random_pairs_of_invented_sentences_lie_near_the_baseline(scorer: UtilityScorer) -> None:
    """Other text than the baseline was made of: unrelated sentences must come out around 0, equal ones at 1."""
    pairs = [
        ("The kettle is on the stove and the tea is almost ready.", "My brother sold his old car in spring."),
        ("We walked along the river until it was dark.", "The invoice must be paid within thirty days."),
        ("She plays the violin in a small orchestra.", "Rain is expected in the north tomorrow."),
        ("I forgot my umbrella on the bus.", "The museum shows paintings of the last century."),
        ("He learned to cook from his grandmother.", "The printer on the second floor has no paper."),
        ("The dog sleeps under the kitchen table.", "Tickets can be bought at the counter or online."),
    ]
    found = [one.bertscore_f1_rescaled for one in scorer.score([a for a, _ in pairs], [b for _, b in pairs])]
    assert abs(sum(value or 0.0 for value in found) / len(found)) < 0.15


def test_no_pairs_and_unequal_lengths(scorer: UtilityScorer) -> None:
    assert scorer.score([], []) == []
    with pytest.raises(ValueError, match="lengths"):
        scorer.score(["a"], [])


def test_scores_do_not_depend_on_the_batch(scorer: UtilityScorer) -> None:
    candidates = [PARAPHRASE, "No.", OPPOSITE, UNRELATED * 6, "", PARAPHRASE]
    together = scorer.score(candidates, [REFERENCE] * 6)
    small = UtilityScorer(BertScoreConfig(batch_size=2)).score(candidates, [REFERENCE] * 6)
    alone = [scorer.score([c], [REFERENCE])[0] for c in candidates]
    for other in (small, alone):
        for a, b in zip(together, other, strict=True):
            assert a.bertscore_f1 == pytest.approx(b.bertscore_f1, abs=1e-4)
            assert a.rouge_l == b.rouge_l


def test_long_and_odd_texts_are_scored(scorer: UtilityScorer) -> None:
    texts = [
        "calm words " * 2000,
        "?!?!",
        "😀",
        "\ud83d".encode("utf-16", "surrogatepass").decode("utf-16", "ignore") or "x",
    ]
    for score in scorer.score(texts, [REFERENCE] * len(texts)):
        assert 0.0 <= score.bertscore_f1 <= 1.0


def test_identity_names_the_scorer_and_no_path(scorer: UtilityScorer) -> None:
    identity = scorer.identity
    assert identity.model == "all-MiniLM-L6-v2"
    assert identity.num_layers == 5
    assert identity.bert_score_hash.startswith("all-MiniLM-L6-v2_L5_no-idf_version=")
    assert len(identity.weights_sha256) == 64
    assert "/" not in repr(identity)
    assert scorer.identity == UtilityScorer(BertScoreConfig(batch_size=3)).identity


def test_a_local_folder_scores_as_the_embedded_one(scorer: UtilityScorer, tmp_path: Path) -> None:
    # "t5" in the path makes bert-score take any encoder for a T5: the scorer hides it.
    folder = tmp_path / "t5-cache" / "encoder"
    folder.parent.mkdir()
    folder.symlink_to(embedded_encoder_folder(), target_is_directory=True)
    local = UtilityScorer(BertScoreConfig(model=str(folder), num_layers=5))
    (here,), (there,) = local.score([PARAPHRASE], [REFERENCE]), scorer.score([PARAPHRASE], [REFERENCE])
    assert (here.bertscore_f1, here.rouge_l) == (there.bertscore_f1, there.rouge_l)
    assert here.bertscore_f1_rescaled is None  # whose weights they are is not known, so neither is their baseline
    assert local.identity.weights_sha256 == scorer.identity.weights_sha256


def test_what_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"bertscore\.num_layers"):
        UtilityScorer(BertScoreConfig(model=str(tmp_path))).identity  # noqa: B018
    with pytest.raises(BackboneError, match=r"bertscore\.model.*'embedded'"):
        UtilityScorer(BertScoreConfig(model=str(tmp_path), num_layers=2)).score(["a"], ["b"])
    too_deep = BertScoreConfig(model=str(embedded_encoder_folder()), num_layers=9)
    with pytest.raises(BackboneError, match=r"bertscore\.num_layers.*got 9"):
        UtilityScorer(too_deep).score(["a"], ["b"])
    rescaled = BertScoreConfig(model=str(tmp_path), num_layers=2, rescale_with_baseline=True)
    with pytest.raises(BackboneError, match="baseline"):
        UtilityScorer(rescaled).score(["a"], ["b"])


def test_a_hub_encoder_that_is_not_there_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    scorer = UtilityScorer(BertScoreConfig(model="nobody/no-such-encoder", num_layers=4))
    with pytest.raises(BackboneError, match=r"'nobody/no-such-encoder'.*use 'embedded'"):
        scorer.score(["a"], ["b"])


@pytest.mark.parametrize(
    "bad",
    [
        {"num_layers": 0},
        {"num_layers": 7},
        {"batch_size": 0},
        {"device": "gpu"},
        {"layer": 3},
        {"model": ""},
    ],
)
def test_impossible_configs_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        BertScoreConfig.model_validate(bad)


def test_the_config_module_imports_no_model_library() -> None:
    code = (
        "import sys, fedmentor_core.evaluation.scorers_config, fedmentor_core.evaluation.utility, "
        "fedmentor_core.evaluation.toxicity, fedmentor_core.evaluation.labels\n"
        "print([m for m in ('torch', 'transformers', 'bert_score', 'detoxify', 'rouge_score') if m in "
        "sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
