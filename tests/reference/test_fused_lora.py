"""A fused LoRA layer is peft's: what comes out, and every gradient."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer

from fedmentor_core.adapters.fused import fuse, fused, unfuse

ROWS, TOKENS, WIDTH, RANK = 3, 5, 8, 4


class Two(torch.nn.Module):
    """A layer with a bias, and one without, at the end of a frozen embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, WIDTH)
        self.first = torch.nn.Linear(WIDTH, 6, bias=True)
        self.second = torch.nn.Linear(6, 7, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(self.embedding(ids))))


def adapted(train: tuple[str, ...] = ("A", "B"), **options: Any) -> Any:
    torch.manual_seed(3)
    config = {"r": RANK, "lora_alpha": 6.0, "target_modules": ["first", "second"], "lora_dropout": 0.0} | options
    model = get_peft_model(Two(), LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
        parameter.requires_grad_(any(f"lora_{factor}" in name for factor in train))
    return model


def step(model: Any, *, bfloat16: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What comes out for fixed tokens, and the gradients of its weighed squares."""
    ids = torch.arange(ROWS * TOKENS).reshape(ROWS, TOKENS) % 11
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        out = model(ids)
    (out.float().square() * torch.linspace(0.1, 1, 7)).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize("train", [("B",), ("A",), ("A", "B")], ids="".join)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_output_and_gradients_are_peft_s(train, bfloat16):
    model = adapted(train)
    expected, expected_gradients = step(model, bfloat16=bfloat16)
    with fused(model):
        assert all("forward" in vars(layer) for layer in layers(model))
        found, gradients = step(model, bfloat16=bfloat16)
    assert not any("forward" in vars(layer) for layer in layers(model))
    assert found.dtype == expected.dtype
    tolerance = {"rtol": 0.05, "atol": 0.2} if bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    assert torch.allclose(found, expected, **tolerance)
    assert gradients.keys() == expected_gradients.keys()
    assert len(gradients) == 2 * len(train)
    for name, gradient in gradients.items():
        other = expected_gradients[name]
        assert gradient.dtype == other.dtype == torch.float32
        assert (gradient - other).norm() <= (0.03 if bfloat16 else 1e-6) * other.norm()


@pytest.mark.parametrize("bfloat16", [False, True])
def test_gradients_per_row_are_those_of_each_row_alone(bfloat16):
    model = adapted()
    ids = torch.randint(0, 11, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    alone = []
    for row in ids:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            out = model(row[None])
        out.float().square().sum().backward()
        alone.append({name: p.grad for name, p in trained.items()})
    model.zero_grad(set_to_none=True)
    for parameter in trained.values():
        parameter.grad_sample = None
    changed = fuse(model, per_row=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        out = model(ids)
    out.float().square().sum().backward()
    unfuse(changed)
    for name, parameter in trained.items():
        assert parameter.grad is None
        assert parameter.grad_sample.shape == (ROWS, *parameter.shape)
        for found, expected in zip(parameter.grad_sample, alone, strict=True):
            assert (found - expected[name]).norm() <= (0.03 if bfloat16 else 1e-5) * expected[name].norm()


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_a_layer_of_another_kind_stays_peft_s(options):
    assert fuse(adapted(**options), per_row=False) == []


def test_a_base_in_other_precision_without_autocast_goes_peft_s_way():
    model = adapted()
    for layer in layers(model):
        layer.base_layer.to(torch.bfloat16)
    model.get_base_model().embedding.to(torch.bfloat16)
    expected, expected_gradients = step(model)
    with fused(model):
        found, gradients = step(model)
    assert torch.equal(found, expected)
    assert all(torch.equal(gradients[name], other) for name, other in expected_gradients.items())


def test_what_is_switched_off_is_not_fused():
    model = adapted()
    with model.disable_adapter():
        assert fuse(model, per_row=False) == []
    changed = fuse(model, per_row=False)
    assert changed == layers(model)
    assert fuse(model, per_row=False) == [], "once is enough"
    unfuse(changed)
