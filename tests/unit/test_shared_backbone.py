"""The frozen backbone is loaded once and shared: a client's model copies no weight of it."""

import torch

from fedmentor_core.adapters.backbone import load_backbone
from fedmentor_core.adapters.lora import (
    adapter_state,
    attach,
    load_adapter_folder,
    load_state,
    resolved_targets,
    save_adapter_folder,
    trainable_parameters,
)
from fedmentor_core.config import AdapterConfig, BackboneConfig


def backbone(folder):
    return load_backbone(BackboneConfig(name=str(folder)))


def test_loaded_once_and_shared(tiny_backbone_folder):
    first = backbone(tiny_backbone_folder)
    assert backbone(tiny_backbone_folder) is first
    one = attach(first, AdapterConfig(rank=4), seed=1)
    two = attach(first, AdapterConfig(rank=4), seed=1)
    base = {id(p) for p in first.model.parameters()}
    for model in (one, two):
        assert {id(p) for name, p in model.named_parameters() if "lora_" not in name} == base
    assert not {id(p) for p in trainable_parameters(one).values()} & {id(p) for p in trainable_parameters(two).values()}


def test_only_b_is_trained_by_default_and_a_comes_from_the_seed(tiny_backbone_folder):
    shared = backbone(tiny_backbone_folder)
    one, again, other = (attach(shared, AdapterConfig(rank=4), seed=seed) for seed in (1, 1, 2))
    assert all("lora_B" in name for name in trainable_parameters(one))
    both = attach(shared, AdapterConfig(rank=4, train="both"), seed=1)
    assert len(trainable_parameters(both)) == 2 * len(trainable_parameters(one))
    full_one, full_again, full_other = (adapter_state(model, trainable_only=False) for model in (one, again, other))
    assert all(torch.equal(full_one[name], full_again[name]) for name in full_one)
    assert any(not torch.equal(full_one[name], full_other[name]) for name in full_one if "lora_A" in name)


def test_an_adapter_folder_loads_here_and_in_peft_with_equal_logits(tiny_backbone_folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    shared = backbone(tiny_backbone_folder)
    config = AdapterConfig(rank=4)
    model = attach(shared, config, seed=1)
    state = {
        name: torch.randn_like(tensor) * 0.05 for name, tensor in adapter_state(model, trainable_only=False).items()
    }
    load_state(model, state)
    save_adapter_folder(tmp_path / "adapter", state, config, resolved_targets(model))
    ours = load_adapter_folder(shared, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_backbone_folder), tmp_path / "adapter")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        assert torch.allclose(ours(input_ids=ids).logits, expected, atol=1e-5)
        assert torch.allclose(theirs.eval()(input_ids=ids).logits, expected, atol=1e-4)
