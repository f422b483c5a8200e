"""FedProx: its gradient, and that the mechanism under it is the same as without."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedmentor_core.adapters.backbone import load_backbone
from fedmentor_core.adapters.lora import attach, trainable_parameters
from fedmentor_core.audit.meter import StepMeter
from fedmentor_core.config import AdapterConfig, BackboneConfig, TrainingConfig
from fedmentor_core.training.client import LocalRound, TrainingSet, _pull_back, train_locally

MU = 0.7
ROUND = LocalRound(sample_rate=0.5, steps=3, noise_multiplier=0.8, clip_norm=0.5, order_seed=1, noise_seed=2)


def test_what_is_added_is_the_gradient_of_the_proximal_term() -> None:
    generator = torch.Generator().manual_seed(0)
    anchor = torch.randn(4, 3, generator=generator)
    parameter = torch.nn.Parameter(torch.randn(4, 3, generator=generator))
    (expected,) = torch.autograd.grad(MU / 2 * (parameter - anchor).square().sum(), parameter)
    parameter.grad = torch.ones_like(parameter)
    _pull_back([anchor], MU, torch.optim.SGD([parameter], lr=1.0))
    assert torch.allclose(parameter.grad, 1 + expected, atol=1e-6)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    _pull_back([torch.zeros(2)], MU, torch.optim.SGD([parameter], lr=1.0))
    assert parameter.grad is None


@pytest.fixture(scope="module")
def backbone(tiny_backbone_folder: Any) -> Any:
    return load_backbone(BackboneConfig(name=str(tiny_backbone_folder), max_length=160, device="cpu"))


@pytest.fixture(scope="module")
def data() -> TrainingSet:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(2, 600, (12,), generator=generator).tolist() for _ in range(8)]
    labels = [[-100] * 6 + row[6:] for row in rows]
    return TrainingSet(input_ids=rows, labels=labels, rows_of_unit=[[i] for i in range(8)], pad_id=0)


def trained(backbone: Any, data: TrainingSet, plan: LocalRound) -> tuple[dict[str, torch.Tensor], StepMeter, Any]:
    model = attach(backbone, AdapterConfig(rank=4, alpha=8.0), seed=5)
    before = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    with StepMeter(keep=True) as meter:
        state = train_locally(model, data, TrainingConfig(autocast="none"), plan, device="cpu")
    return state, meter, before


def distance(state: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([(state[name] - before[name]).flatten() for name in before]).norm())


@pytest.mark.parametrize("noise", [0.8, None])
def test_the_pull_keeps_the_adapter_near_the_global_one(backbone: Any, data: TrainingSet, noise: float | None) -> None:
    plan = replace(ROUND, noise_multiplier=noise, steps=6)
    free, _, before = trained(backbone, data, plan)
    pulled, _, _ = trained(backbone, data, replace(plan, prox_mu=1000.0))
    assert distance(pulled, before) < 0.8 * distance(free, before)


def test_without_a_pull_nothing_changes(backbone: Any, data: TrainingSet) -> None:
    one, _, _ = trained(backbone, data, ROUND)
    other, _, _ = trained(backbone, data, replace(ROUND, prox_mu=0.0))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_mechanism_is_the_same_with_it(backbone: Any, data: TrainingSet) -> None:
    """Noise at full size, and what was clipped and noised carries nothing of the pull.

    Units have no target, so their gradients are zero and what the optimizer is given is the noise alone, N(0,
    (sigma C / q N)^2): with the same seed it must be the same to the last bit under any mu, although the parameters
    that the pull depends on move apart from the first step on.
    """
    silent = TrainingSet(
        input_ids=data.input_ids, labels=[[-100] * 12] * 8, rows_of_unit=data.rows_of_unit, pad_id=data.pad_id
    )
    state, without, _ = trained(backbone, silent, ROUND)
    pulled, with_pull, _ = trained(backbone, silent, replace(ROUND, prox_mu=50.0))
    assert not all(torch.equal(state[name], pulled[name]) for name in state)
    assert len(without.gradients) == len(with_pull.gradients) == ROUND.steps
    for one, other in zip(without.gradients, with_pull.gradients, strict=True):
        assert torch.equal(one, other)
    std = 0.8 * ROUND.clip_norm / (ROUND.sample_rate * silent.n_units)
    assert float(torch.cat(with_pull.gradients).std()) == pytest.approx(std, rel=0.05)


def test_the_optimizer_steps_with_noise_plus_pull(backbone: Any, data: TrainingSet) -> None:
    """What reaches Adam is the released gradient plus mu (theta - theta_global), seen after the hook."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    model = attach(backbone, AdapterConfig(rank=4, alpha=8.0), seed=5)
    anchors = [p.detach().clone() for p in trainable_parameters(model).values()]
    original = getattr(torch.optim.AdamW.step, "__wrapped__", torch.optim.AdamW.step)  # without torch's own hooks

    class Watching(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            parameters = [p for group in self.param_groups for p in group["params"]]
            moved = torch.cat([(p.detach() - a).flatten() for p, a in zip(parameters, anchors, strict=True)])
            seen.append((torch.cat([p.grad.flatten() for p in parameters]), moved))
            return original(self, closure)

    with pytest.MonkeyPatch.context() as patch, StepMeter(keep=True) as meter:
        patch.setattr(torch.optim, "AdamW", Watching)
        train_locally(model, data, TrainingConfig(autocast="none"), replace(ROUND, prox_mu=MU), device="cpu")
    assert len(seen) == ROUND.steps
    for released, (stepped, moved) in zip(meter.gradients, seen, strict=True):
        assert torch.allclose(stepped, released + MU * moved, atol=1e-6)
    assert float(seen[-1][1].norm()) > 0
