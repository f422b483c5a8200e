"""The prediction of a step's memory: what it counts, against what is known about the shapes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedmentor_core.adapters.backbone import Backbone
from fedmentor_core.adapters.lora import attach
from fedmentor_core.config import AdapterConfig
from fedmentor_core.training.memory import PeakBytes, StepShape, predicted_peak_bytes

LAYERS, HIDDEN, RANK = 3, 32, 4


def on_meta() -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=128, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).requires_grad_(False)
    return attach(Backbone("random", None, "0" * 64, model, None, "meta"), AdapterConfig(rank=RANK), seed=0)


def test_bytes_are_counted_until_they_are_dropped() -> None:
    held = torch.zeros(1000)
    with PeakBytes(held) as followed:
        first = torch.ones(500) + 1  # two of 2,000 bytes at once
        assert followed.peak == 4000 + 4000
        view = first[:100]
        del first
        assert followed.now == 4000 + 2000, "a view keeps its storage"
        del view
        assert followed.now == 4000
    assert followed.peak == 8000


def test_weights_and_rows_gradients_are_in_the_prediction() -> None:
    weights = sum(parameter.numel() * parameter.element_size() for parameter in on_meta().parameters())
    trained = sum(parameter.numel() for parameter in on_meta().parameters() if parameter.requires_grad)
    one = StepShape(rows=64, tokens=2, target_tokens=1, bfloat16=False)
    held, private = predicted_peak_bytes(on_meta(), one)
    _, plain = predicted_peak_bytes(on_meta(), StepShape(64, 2, 1, private=False, bfloat16=False))
    assert weights <= held <= weights * 1.2, "beside the weights, only what rotary positions need"
    extra = private - plain
    assert 0.1 <= extra / (64 * trained * 4) <= 2.0, (
        "at two tokens a good part of the peak is gradients per row, gathered"
    )


@pytest.mark.parametrize("private", [True, False])
def test_memory_grows_with_rows_and_shrinks_with_checkpointing(private: bool) -> None:
    def growth(rows: int, **options: bool) -> int:
        held, peak = predicted_peak_bytes(on_meta(), StepShape(rows, 64, 8, private=private, bfloat16=False, **options))
        return peak - held

    assert growth(8) == pytest.approx(2 * growth(4), rel=0.1)
    assert growth(8, checkpointed=True) < 0.7 * growth(8)


def test_prediction_needs_no_memory_of_its_own() -> None:
    with torch.device("meta"):
        config = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=32)
        model = LlamaForCausalLM(config).requires_grad_(False)
    model = attach(Backbone("large", None, "0" * 64, model, None, "meta"), AdapterConfig(rank=16), seed=0)
    held, peak = predicted_peak_bytes(model, StepShape(rows=64, tokens=512, target_tokens=64))
    assert peak > held > 1e9
    assert all(isinstance(parameter, torch._subclasses.FakeTensor) for parameter in model.parameters())
