"""Kept references: scores equal bert-score's own, and do not depend on what was scored before."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmentor_core.evaluation import utility
from fedmentor_core.evaluation.bertscore import BertScore
from fedmentor_core.evaluation.scorers_config import BertScoreConfig
from fedmentor_core.evaluation.utility import UtilityScorer, embedded_encoder_folder

REFERENCES = [
    "Yes, the poster suffers from stress. Reasoning: they cannot sleep and worry about work every night.",
    "No.",
    "",
    "No, the poster does not suffer from stress. Reasoning: they describe a calm day in the garden.",
    "No.",
]
OUTPUTS = [
    "Yes, the writer is stressed. Reasoning: worries about the job keep them awake at night.",
    "No, not at all.",
    "Yes.",
    "The train to the coast leaves at seven.",
    "No.",
]
READABLE = [0, 1, 3, 4]


@pytest.fixture(scope="module")
def encoder():
    """bert-score's own scorer on the embedded encoder."""
    from bert_score import BERTScorer

    return BERTScorer(model_type=str(embedded_encoder_folder()), num_layers=5, lang="en", device="cpu")


def test_equals_bert_score_s_own_score(encoder):
    expected = encoder.score([OUTPUTS[i] for i in READABLE], [REFERENCES[i] for i in READABLE])[2].tolist()
    for batch_size in (1, 2, 16):
        found = BertScore(encoder).f1(OUTPUTS, REFERENCES, READABLE, batch_size)
        assert found == pytest.approx(expected, abs=2e-6)


def test_equals_bert_score_where_a_text_is_longer_than_the_context(encoder):
    long = ["calm words " * 2000, "No."]
    encoder._tokenizer.model_max_length = 512
    expected = encoder.score(long, REFERENCES[:2])[2].tolist()
    assert BertScore(encoder).f1(long, REFERENCES[:2], [0, 1], 2) == pytest.approx(expected, abs=2e-6)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scored=st.lists(
        st.tuples(st.permutations(OUTPUTS), st.sets(st.sampled_from(READABLE), min_size=1)), min_size=2, max_size=4
    )
)
def test_kept_references_score_as_new_ones_to_the_bit(encoder, scored):
    """Whatever was scored before, and whichever candidates were empty then."""
    kept = BertScore(encoder)
    for outputs, places in scored:
        new = BertScore(encoder)
        assert kept.f1(outputs, REFERENCES, sorted(places), 2) == new.f1(outputs, REFERENCES, sorted(places), 2)


def test_references_are_encoded_once_and_outputs_each_time(encoder, monkeypatch):
    seen: list[str] = []
    encode = BertScore._encode
    monkeypatch.setattr(
        BertScore, "_encode", lambda self, texts, size: seen.extend(sorted(set(texts))) or encode(self, texts, size)
    )
    score = BertScore(encoder)
    first = score.f1(OUTPUTS, REFERENCES, READABLE, 2)
    assert set(seen) == {*(OUTPUTS[i] for i in READABLE), *(REFERENCES[i] for i in READABLE)}
    seen.clear()
    assert score.f1(OUTPUTS, REFERENCES, READABLE, 2) == first
    assert seen == sorted({OUTPUTS[i] for i in READABLE})
    seen.clear()
    score.f1(OUTPUTS, [*REFERENCES[:-1], "Yes."], READABLE, 2)  # another set
    assert "Yes." in seen
    seen.clear()
    score.f1(OUTPUTS, REFERENCES, READABLE, 3)  # other batches round otherwise, so they are another set too
    assert REFERENCES[0] in seen


def test_what_is_kept_is_bounded_and_holds_no_text(encoder):
    one_set = 300 * 384 * 4  # generous: some 60 tokens of 384 numbers
    score = BertScore(encoder, most_bytes=one_set)
    for index in range(8):
        score.f1(OUTPUTS, [*REFERENCES[:-1], f"Set {index}. " * 20], READABLE, 2)
    tensors = [text for kept in score._kept.values() for text in kept.values()]
    assert 0 < sum(text.n_bytes for text in tensors) <= one_set
    assert not any(text in repr(list(score._kept)) for text in REFERENCES if text)
    nothing = BertScore(encoder, most_bytes=0)
    assert nothing.f1(OUTPUTS, REFERENCES, READABLE, 2) == score.f1(OUTPUTS, REFERENCES, READABLE, 2)
    assert not nothing._kept


def test_empty_outputs_in_one_round_leave_the_next_round_s_scores_alone(monkeypatch):
    """Through the scorer, against an encoder that is loaded anew: the whole set is kept, whatever round 0 needed."""
    scorer = UtilityScorer(BertScoreConfig(batch_size=2))
    references = [*REFERENCES, "This set is scored nowhere else."]
    outputs = [*OUTPUTS, "No."]
    scorer.score(["", "", "x", "", "", "No."], references)
    after = scorer.score(outputs, references)
    monkeypatch.setattr(utility, "_cache", {})
    assert scorer.score(outputs, references) == after
