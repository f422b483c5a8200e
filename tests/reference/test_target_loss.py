"""Losses in one buffer are torch's cross entropy: values and gradients, at any size and spread of logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from fedmentor_core.training.target_loss import target_losses


def both(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = []
    for losses_of in (target_losses, lambda x, t: cross_entropy(x, t, reduction="none")):
        leaf = logits.clone().requires_grad_()
        losses = losses_of(leaf * 1.0, targets)
        (losses * weights).sum().backward()
        found.append((losses.detach(), leaf.grad))
    return found


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(0, 150),
    vocabulary=st.integers(1, 300),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients_are_those_of_cross_entropy(n, vocabulary, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn((n, vocabulary), generator=generator)
    targets = torch.randint(0, vocabulary, (n,), generator=generator)
    weights = torch.rand(n, generator=generator)
    (losses, gradient), (expected_losses, expected_gradient) = both(logits, targets, weights)
    assert torch.allclose(losses, expected_losses, rtol=1e-6, atol=1e-6)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_the_gradient_takes_the_memory_of_the_logits():
    source = torch.randn(130, 17, requires_grad=True)
    logits = source * 1.0
    seen = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    target_losses(logits, torch.zeros(130, dtype=torch.long)).sum().backward()
    assert seen == [logits.data_ptr()]


def test_a_second_backward_pass_is_refused_and_not_wrong():
    losses = target_losses(torch.randn(3, 5, requires_grad=True) * 1.0, torch.tensor([0, 1, 2]))
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        losses.sum().backward()
