"""The untrained model is evaluated without its adapter, which is zero: faster, and the same to the bit."""

import math

import pytest
import torch

from fedmentor_core.adapters.lora import changes_nothing, load_state
from fedmentor_core.config_io import validate_config
from fedmentor_core.evaluation.generate import generate
from fedmentor_core.evaluation.perplexity import log_losses
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import Workspace

ZERO, ONE = torch.zeros(2, 2), torch.ones(2, 2)
HALF = torch.tensor([[0.0, 0.0], [0.0, 1e-30]])


@pytest.mark.parametrize(
    ("state", "nothing"),
    [
        ({"x.lora_A.weight": ONE, "x.lora_B.weight": ZERO}, True),
        ({"x.lora_A.weight": ZERO, "x.lora_B.weight": ONE}, True),
        ({"x.lora_A.weight": ONE, "x.lora_B.weight": ONE, "x.lora_R.weight": ZERO}, True),
        ({"x.lora_A.weight": ONE, "x.lora_B.weight": HALF}, False),
        ({"x.lora_A.weight": ONE, "x.lora_B.weight": ZERO * math.nan}, False),
        ({"x.lora_A.weight": ONE, "x.lora_B.weight": ZERO, "y.lora_A.weight": ONE, "y.lora_B.weight": ONE}, False),
        ({"x.lora_A.weight": ONE, "x.lora_B.weight": ZERO, "x.base_delta.weight": ONE}, False),
        ({"x.lora_A.weight": ONE}, False),  # its other factor is elsewhere
        ({}, False),
    ],
)
def test_what_changes_nothing(state, nothing):
    assert changes_nothing(state) is nothing


def test_an_adapter_that_changes_nothing_is_evaluated_without_it_to_the_bit(tiny_study, tmp_path):
    """The answers and the likelihoods, over both forms of batches."""
    workspace = Workspace(open_study(validate_config(tiny_study), tmp_path / "out"))
    untrained, data = workspace.untrained_adapter, workspace.evaluation_set("one", "gate")
    attached = workspace.new_adapter_model()
    load_state(attached, workspace.full_adapter_state(untrained))
    attached.eval()
    alone = workspace.evaluation_model_with(untrained)
    assert not any("lora" in name for name, _ in alone.named_parameters())
    tokenizer, size = workspace.backbone.tokenizer, {"batch_size": 3, "device": "cpu"}
    for width in (None, max(map(len, data.prompts)) + 3):
        texts = [generate(m, tokenizer, data.prompts, max_new_tokens=6, width=width, **size) for m in (alone, attached)]
        assert texts[0] == texts[1]
    assert log_losses(alone, tokenizer, data.targets, **size) == log_losses(attached, tokenizer, data.targets, **size)

    changed = {name: tensor + 0.01 for name, tensor in workspace.get_adapter(untrained).items()}
    trained = workspace.evaluation_model_with(workspace.put_adapter(changed))
    assert any("lora" in name for name, _ in trained.named_parameters())
    assert log_losses(trained, tokenizer, data.targets, **size) != log_losses(alone, tokenizer, data.targets, **size)
    assert workspace.evaluation_model_with(untrained) is alone
