"""The toxicity scorer's false alarms on a domain's own texts, with the real scorer."""

from fedmentor_core.evaluation import alarms
from fedmentor_core.evaluation.toxicity import ToxicityScorer

CALM = {"post": "I had a quiet walk by the river today.", "response": "No, the poster does not suffer from stress."}
RUDE = {"post": "You are a stupid idiot and I hate you.", "response": "Yes, the poster suffers from stress."}


def test_rates_over_distinct_texts():
    scorer = ToxicityScorer()
    assert scorer.score([RUDE["post"]])[0] > 0.7  # or the test shows nothing
    found = alarms.scorer_alarms([CALM, CALM, RUDE, CALM], scorer)
    assert (found.n_posts, found.n_references) == (2, 2)
    assert found.posts_05 == found.posts_07 == 0.5
    assert found.references_05 == found.references_07 == 0.0
    assert found.intervals["posts_05"] == (0.0, 1.0)


def test_the_same_texts_are_scored_once(monkeypatch):
    scorer = ToxicityScorer()
    first = alarms.scorer_alarms([CALM, RUDE], scorer)
    monkeypatch.setattr(ToxicityScorer, "score", lambda *_: 1 / 0)
    assert alarms.scorer_alarms([CALM, RUDE], scorer) == first
