"""How long it takes to let a model answer a gate set and to score its answers, against doing it the plain way.

Arms of ``generation`` say how much of what they write is the same: ``same_texts`` is the share of answers equal to those
of our sorted batches. Text is invented or random words; nothing is read from a corpus.
"""

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from harness import Arm, Plan, Ratio, Sample, Scale, Turn, benchmark

MAX_NEW_TOKENS = 48
MAX_LENGTH = 160
WORDS = ("rest", "sleep", "worry", "friend", "garden", "yes", "no", "because", "work", "night", "calm", "help", "talk")


@benchmark("generation", title="a gate set answered by the embedded backbone with an adapter", minutes=3.0)
def generation(scale: Scale) -> Plan:
    """Ours, against ``model.generate`` on one prompt after another, and on batches as the prompts come."""
    settings = {"n_rows": 16 if scale.quick else 64}
    return Plan(
        arms=[
            Arm("ours: sorted batches", sorted_batches, settings),
            Arm("ours: one shape (private set)", one_shape, settings),
            Arm("batches as they come", unsorted_batches, settings),
            Arm("plain loop, one prompt at a time", one_at_a_time, settings),
        ],
        ratios=[
            Ratio("plain loop over ours", of="plain loop, one prompt at a time", to="ours: sorted batches"),
            Ratio("unsorted batches over ours", of="batches as they come", to="ours: sorted batches"),
            Ratio("one shape over ours", of="ours: one shape (private set)", to="ours: sorted batches"),
        ],
        turns=1 if scale.quick else 3,
        warm_up=0,  # the set was answered once, to compare with, before an arm takes its first turn
    )


@benchmark("untrained", title="the untrained model on a gate set: answers and likelihoods", minutes=1.5)
def untrained(scale: Scale) -> Plan:
    """An adapter that changes nothing is evaluated without it."""
    settings = {"n_rows": 16 if scale.quick else 48}
    return Plan(
        arms=[
            Arm("backbone alone (ours)", answer_and_score_references, {**settings, "attached": False}),
            Arm("backbone with a zero adapter", answer_and_score_references, {**settings, "attached": True}),
        ],
        ratios=[
            Ratio("with the adapter over ours", of="backbone with a zero adapter", to="backbone alone (ours)"),
        ],
        turns=1 if scale.quick else 3,
        warm_up=0 if scale.quick else 1,
    )


@benchmark("scoring", title="BERTScore and ROUGE-L of a gate set's outputs, round after round", minutes=1.5)
def scoring(scale: Scale) -> Plan:
    """Answers of about 30 tokens against references of about 100, as the explanations of dreaddit are long."""
    settings = {"n_rows": 16 if scale.quick else 96}
    return Plan(
        arms=[
            Arm("ours: references kept", references_kept, settings),
            Arm("ours: first round", references_anew, settings),
            Arm("bert-score's own score", library_score, settings),
        ],
        ratios=[
            Ratio("bert-score over references kept", of="bert-score's own score", to="ours: references kept"),
            Ratio("bert-score over ours, first round", of="bert-score's own score", to="ours: first round"),
        ],
        turns=1 if scale.quick else 5,
        warm_up=1,  # loads the encoder, and fills what is kept
    )


# --- generation -------------------------------------------------------------------------------------------------------


def sorted_batches(n_rows: int) -> Turn:
    """As a public set is answered."""
    return _generation(n_rows, lambda model, tokenizer, prompts: _ours(model, tokenizer, prompts, None))


def one_shape(n_rows: int) -> Turn:
    """As a private set is answered: what is written for a row must follow from that row alone."""
    width = MAX_LENGTH - MAX_NEW_TOKENS
    return _generation(n_rows, lambda model, tokenizer, prompts: _ours(model, tokenizer, prompts, width))


def unsorted_batches(n_rows: int) -> Turn:
    """Batches of the same size, padded to the longest of 32 prompts as they come."""

    def answer(model: Any, tokenizer: Any, prompts: Sequence[list[int]]) -> list[str]:
        batches = [prompts[start : start + 32] for start in range(0, len(prompts), 32)]
        return [text for batch in batches for text in _plain(model, tokenizer, batch)]

    return _generation(n_rows, answer)


def one_at_a_time(n_rows: int) -> Turn:
    """What most scripts do."""
    return _generation(
        n_rows, lambda model, tokenizer, prompts: [_plain(model, tokenizer, [one])[0] for one in prompts]
    )


def _generation(n_rows: int, answer: Callable[[Any, Any, Sequence[list[int]]], list[str]]) -> Turn:
    model, tokenizer, prompts, _ = _gate_set(n_rows)
    expected = _ours(model, tokenizer, prompts, None)

    def turn() -> Sample:
        started = time.perf_counter()
        texts = answer(model, tokenizer, prompts)
        seconds = time.perf_counter() - started
        same = sum(one == other for one, other in zip(texts, expected, strict=True))
        return Sample(seconds=seconds, figures={"same_texts": same / n_rows, "rows_per_second": n_rows / seconds})

    return turn


def _ours(model: Any, tokenizer: Any, prompts: Sequence[list[int]], width: int | None) -> list[str]:
    from fedmentor_core.evaluation.generate import generate

    return generate(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=32, width=width)


def _plain(model: Any, tokenizer: Any, prompts: Sequence[list[int]]) -> list[str]:
    import torch

    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    with torch.inference_mode():
        found = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    width = batch["input_ids"].shape[1]
    return [text.strip() for text in tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)]


# --- the untrained model ----------------------------------------------------------------------------------------------


def answer_and_score_references(n_rows: int, attached: bool) -> Turn:
    """Generation and perplexity."""
    from fedmentor_core.evaluation.perplexity import log_losses

    model, tokenizer, prompts, targets = _gate_set(n_rows, trained=False)
    if not attached:
        model = model.unload()

    def turn() -> None:
        _ours(model, tokenizer, prompts, None)
        log_losses(model, tokenizer, targets, batch_size=32, device="cpu")

    return turn


def _gate_set(n_rows: int, *, trained: bool = True) -> tuple[Any, Any, list[list[int]], Any]:
    """The embedded backbone with a rank-8 adapter, and prompts with their references; the same in every process."""
    import torch

    from fedmentor_core.adapters.backbone import load_backbone
    from fedmentor_core.adapters.lora import attach
    from fedmentor_core.config import AdapterConfig, BackboneConfig
    from fedmentor_core.data import invented
    from fedmentor_core.data.encode import encode_for_training, encode_prompts

    torch.set_num_threads(1)  # two threads beside another busy process wait for each other most of the time
    backbone = load_backbone(BackboneConfig(device="cpu"))
    model = attach(backbone, AdapterConfig(rank=8, alpha=16), seed=1)
    model.eval()
    if trained:
        dice = torch.Generator().manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.002 * torch.randn(parameter.shape, generator=dice)
    rows = list(invented.generate("crisis_notes", n_rows, 3))[:n_rows]
    targets = encode_for_training(backbone.tokenizer, rows, MAX_LENGTH, 56)
    return (
        model,
        backbone.tokenizer,
        encode_prompts(backbone.tokenizer, rows, MAX_LENGTH, MAX_NEW_TOKENS).input_ids,
        targets,
    )


# --- scoring ----------------------------------------------------------------------------------------------------------


def references_kept(n_rows: int) -> Turn:
    """As every round but the first is scored."""
    return _scoring(n_rows, keep=True)


def references_anew(n_rows: int) -> Turn:
    """As the first round is scored: for each turn the references are others."""
    return _scoring(n_rows, keep=False)


def library_score(n_rows: int) -> Turn:
    """Both texts of every pair encoded each time."""
    from bert_score import BERTScorer
    from rouge_score.rouge_scorer import RougeScorer

    from fedmentor_core.evaluation._libraries import quiet
    from fedmentor_core.evaluation.utility import embedded_encoder_folder

    with quiet():
        bert = BERTScorer(model_type=str(embedded_encoder_folder()), num_layers=5, lang="en", device="cpu")
    bert._tokenizer.model_max_length = 512
    rouge = RougeScorer(["rougeL"], use_stemmer=False)
    rounds = _rounds(n_rows)

    def turn() -> None:
        answers, references = next(rounds), _texts(n_rows, 100, seed=0)
        bert.score(answers, references, batch_size=16)
        for answer, reference in zip(answers, references, strict=True):
            rouge.score(reference, answer)

    return turn


def _scoring(n_rows: int, *, keep: bool) -> Turn:
    from fedmentor_core.evaluation.scorers_config import BertScoreConfig
    from fedmentor_core.evaluation.utility import UtilityScorer

    scorer = UtilityScorer(BertScoreConfig(device="cpu"))
    rounds = _rounds(n_rows)
    sets = iter(range(1, 10_000))

    def turn() -> None:
        scorer.score(next(rounds), _texts(n_rows, 100, seed=0 if keep else next(sets)))

    return turn


def _rounds(n_rows: int) -> Any:
    return (_texts(n_rows, 30, seed=10_000 + index) for index in range(10_000))


def _texts(n_rows: int, n_words: int, *, seed: int) -> list[str]:
    dice = random.Random(seed)
    return [" ".join(dice.choices(WORDS, k=dice.randint(n_words * 2 // 3, n_words * 4 // 3))) for _ in range(n_rows)]
