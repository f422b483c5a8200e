"""Measure the embedded encoder's BERTScore baseline: the mean F1 of random pairs of sentences, layer by layer.

bert-score publishes baselines for well-known encoders, made by scoring random pairs of sentences ("Rescaling BERTScore
with Baselines", in the package's repository); this makes ours in the same way. ``(raw - baseline) / (1 - baseline)``
is then 0 for unrelated sentences and 1 for equal ones.

    python infra/assets/build_bertscore_baseline.py --data-root ../shared/data

Sentences come from public counselling answers that no domain owns. No text is printed or stored: only means.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path

import pandas as pd

_REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(_REPOSITORY))

_OUT = _REPOSITORY / "fedmentor_core" / "assets" / "bertscore" / "baseline.json"
_SOURCE = "counsel_chat.csv"
_COLUMN = "answerText"
_WORDS = range(5, 41)


def sentences_of(table: pd.DataFrame) -> list[str]:
    """Distinct sentences of 5 to 40 words, without markup, in order."""
    text = table[_COLUMN].dropna().map(lambda one: re.sub(r"\s+", " ", re.sub(r"<[^>]+>|&\w+;", " ", one)))
    found = (sentence.strip() for one in text for sentence in re.split(r"(?<=[.!?])\s+", one))
    return list(dict.fromkeys(sentence for sentence in found if len(sentence.split()) in _WORDS))


def main() -> None:
    """Score the pairs and write the baseline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=_OUT)
    given = parser.parse_args()

    from bert_score import BERTScorer

    from fedmentor_core.evaluation.utility import UtilityScorer, embedded_encoder_folder

    sentences = sentences_of(pd.read_csv(given.data_root / "public" / _SOURCE))
    dice = random.Random(given.seed)
    pairs = [tuple(dice.sample(sentences, 2)) for _ in range(given.pairs)]
    pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))  # like lengths together: less padding
    scorer = BERTScorer(
        model_type=str(embedded_encoder_folder()), num_layers=6, all_layers=True, lang="en", device="cpu", batch_size=64
    )
    _, _, f1 = scorer.score([one for one, _ in pairs], [other for _, other in pairs])  # (layers + 1, pairs)
    identity = UtilityScorer().identity
    record = {
        "encoder": identity.model,
        "weights_sha256": identity.weights_sha256,
        "f1_by_layer": [round(float(value), 6) for value in f1.double().mean(dim=1)],
        "standard_error_by_layer": [round(float(value), 6) for value in f1.double().std(dim=1) / given.pairs**0.5],
        "n_pairs": given.pairs,
        "n_sentences": len(sentences),
        "seed": given.seed,
        "source": f"public/{_SOURCE}, column {_COLUMN}: random pairs of sentences of 5 to 40 words",
        "bert_score_version": identity.bert_score_version,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
