"""Perplexity of references: against a token-by-token computation on a real small model."""

import math

import pytest
import torch

from fedmentor_core.adapters.backbone import load_backbone
from fedmentor_core.config import BackboneConfig
from fedmentor_core.data.encode import encode_for_training
from fedmentor_core.evaluation.perplexity import log_losses, perplexity

ROWS = [
    {"unit_id": "a", "post": "I sleep badly.", "question": "Is it stress?", "response": "Yes, it is stress."},
    {"unit_id": "b", "post": "The garden is calm and green. " * 4, "question": "Is it stress?", "response": "No."},
    {
        "unit_id": "a",
        "post": "I sleep badly.",
        "question": "Is it sadness?",
        "response": "No, it does not say so at all.",
    },
]


def test_equals_a_computation_token_by_token_whatever_the_batch(tiny_backbone_folder):
    backbone = load_backbone(BackboneConfig(name=str(tiny_backbone_folder), max_length=160))
    targets = encode_for_training(backbone.tokenizer, ROWS, max_length=160, max_target_tokens=40)
    expected = []
    for ids, labels in zip(targets.input_ids, targets.labels, strict=True):
        with torch.inference_mode():
            logits = backbone.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        places = [place for place, label in enumerate(labels) if label != -100]
        expected.append(-sum(float(logits[place - 1, ids[place]]) for place in places))
    for batch_size in (1, 2, 8):
        losses, counts = log_losses(backbone.model, backbone.tokenizer, targets, batch_size=batch_size, device="cpu")
        assert losses == pytest.approx(expected, rel=1e-4)
        assert counts == [sum(label != -100 for label in labels) for labels in targets.labels]
    # a model with random weights is about as surprised as one that guesses among its 600 tokens
    assert 300 < perplexity(losses, counts) < 1200


def test_by_hand_and_without_a_finite_value():
    assert perplexity([math.log(4), 3 * math.log(2)], [1, 3]) == pytest.approx(4**0.25 * 2**0.75)
    assert perplexity([0.0], [5]) == 1.0
    assert perplexity([], []) is None
    assert perplexity([1e9], [1]) is None
    assert perplexity([math.nan], [1]) is None
