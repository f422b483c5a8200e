"""BERTScore F1 with references kept encoded: a gate set's are the same in every round, and mostly the longer half.

The encoder, how it reads a text and the greedy matching are bert-score's own. Three things differ from its ``score``,
and none of them beyond float rounding: references are encoded in batches of their own, so that what is kept is what
would be computed anew; batches are made in one fixed order, where bert-score's order of equally long texts follows
Python's hash seed; and a pair is matched by itself, without padding.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedmentor_core.evaluation._libraries import is_blank
from fedmentor_core.hashing import canonical_sha256

MOST_BYTES_KEPT = 256 * 2**20


@dataclass(frozen=True, slots=True)
class EncodedText:
    """One text as the encoder sees it.

    Attributes:
        states: (tokens, width), of the compared layer, on the CPU.
        weights: (tokens,): 0 for the special tokens at both ends, else 1.
    """

    states: Any
    weights: Any

    @property
    def n_bytes(self) -> int:
        """Memory that it takes."""
        return int(self.states.nbytes + self.weights.nbytes)


class BertScore:
    """F1 of candidates against references, by a loaded encoder. Not thread-safe: the caller holds a lock.

    Guarantees:
        Scores are the same, to the bit, whether the references were kept or not. No text is kept, only encodings, in
        memory, at most ``most_bytes`` of them; the set used longest ago goes first.
    """

    def __init__(self, scorer: Any, most_bytes: int = MOST_BYTES_KEPT) -> None:
        """``scorer``: a ``bert_score.BERTScorer``."""
        self._scorer = scorer
        self._most_bytes = most_bytes
        self._kept: OrderedDict[str, dict[int, EncodedText]] = OrderedDict()

    def f1(
        self, candidates: Sequence[str], references: Sequence[str], places: Sequence[int], batch_size: int
    ) -> list[float]:
        """F1 of the pairs at ``places``.

        Args:
            candidates: one per reference.
            references: of the whole set. All of them are encoded, so that what is kept is the same whichever
                candidates are empty; but for blank ones, which no pair may name.
            places: which pairs to score.
            batch_size: texts per encoder pass.
        """
        against = self._references(references, batch_size)
        encoded = self._encode([candidates[place] for place in places], batch_size)
        return [_f1(candidate, against[place]) for candidate, place in zip(encoded, places, strict=True)]

    def _references(self, references: Sequence[str], batch_size: int) -> dict[int, EncodedText]:
        key = canonical_sha256([batch_size, list(references)])
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        readable = [place for place, text in enumerate(references) if not is_blank(text)]
        encoded = self._encode([references[place] for place in readable], batch_size)
        found = self._kept[key] = dict(zip(readable, encoded, strict=True))
        while sum(map(_n_bytes, self._kept.values())) > self._most_bytes:
            self._kept.popitem(last=False)
        return found

    def _encode(self, texts: Sequence[str], batch_size: int) -> list[EncodedText]:
        from bert_score.utils import get_bert_embedding

        bert, tokenizer = self._scorer._model, self._scorer._tokenizer
        weights: defaultdict[int, float] = defaultdict(lambda: 1.0)
        weights |= {tokenizer.sep_token_id: 0.0, tokenizer.cls_token_id: 0.0}
        order = sorted(set(texts), key=lambda text: (len(text), text))  # like lengths together: less padding
        found: dict[str, EncodedText] = {}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            states, mask, weight = get_bert_embedding(batch, bert, tokenizer, weights, device=self._scorer.device)
            lengths, states, weight = mask.sum(dim=1).tolist(), states.cpu(), weight.cpu()
            for row, (text, length) in enumerate(zip(batch, lengths, strict=True)):
                found[text] = EncodedText(states[row, :length].clone(), weight[row, :length].clone())
        return [found[text] for text in texts]


def _f1(candidate: EncodedText, reference: EncodedText) -> float:
    import torch
    from bert_score.utils import greedy_cos_idf

    def side(text: EncodedText) -> tuple[Any, Any, Any]:  # copies: the matching normalises in place
        return text.states[None].clone(), torch.ones(1, len(text.weights)), text.weights[None].clone()

    with torch.no_grad():
        _, _, f1 = greedy_cos_idf(*side(reference), *side(candidate))
    return float(f1.item())


def _n_bytes(encoded: dict[int, EncodedText]) -> int:
    return sum({id(one): one.n_bytes for one in encoded.values()}.values())
