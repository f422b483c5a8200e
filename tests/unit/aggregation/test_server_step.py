"""The server's momentum and Adam against a slow reference, coordinate by coordinate, and across a resume."""

import math

import pytest
import torch

from fedmentor_core.adapters.lora import state_from_bytes, state_to_bytes
from fedmentor_core.aggregation.server import server_step
from fedmentor_core.config import AggregationConfig


def slow(settings: AggregationConfig, changes: list[float], theta: float) -> list[float]:
    """One coordinate, in plain Python, by the paper's algorithm."""
    m, v, found = 0.0, settings.server_adaptivity**2, []
    rate = settings.server_learning_rate or {"momentum": 1.0, "adam": 0.01}[settings.server]
    for change in changes:
        if settings.server == "momentum":
            m = settings.server_momentum * m + change
            theta += rate * m
        else:
            m = settings.server_momentum * m + (1 - settings.server_momentum) * change
            v = settings.server_beta2 * v + (1 - settings.server_beta2) * change**2
            theta += rate * m / (math.sqrt(v) + settings.server_adaptivity)
        found.append(theta)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        AggregationConfig(server="momentum"),
        AggregationConfig(server="momentum", server_learning_rate=0.3, server_momentum=0.5),
        AggregationConfig(server="adam"),
        AggregationConfig(server="adam", server_learning_rate=0.1, server_beta2=0.9, server_adaptivity=0.01),
    ],
)
def test_steps_are_those_of_the_reference_also_when_the_memory_comes_from_a_store(settings: AggregationConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    theta = {"x": torch.randn(3, 2, generator=generator, dtype=torch.float64)}
    changes = [torch.randn(3, 2, generator=generator, dtype=torch.float64) for _ in range(6)]
    start, memory, seen = theta["x"].clone(), {}, []
    for change in changes:
        theta, memory = server_step(settings, theta, {"x": theta["x"] + change}, memory)
        memory = state_from_bytes(state_to_bytes(memory))  # as a resumed run finds it
        seen.append(theta["x"])
    for i in range(3):
        for j in range(2):
            expected = slow(settings, [float(change[i, j]) for change in changes], float(start[i, j]))
            assert [float(one[i, j]) for one in seen] == pytest.approx(expected, rel=1e-9)


def test_without_momentum_at_rate_one_the_step_is_the_joined_adapter() -> None:
    settings = AggregationConfig(server="momentum", server_momentum=0.0)
    before, joined = {"x": torch.ones(4)}, {"x": torch.arange(4.0)}
    after, _ = server_step(settings, before, joined, {})
    assert torch.equal(after["x"], joined["x"])
    assert after["x"].dtype == torch.float32


def test_memory_of_a_factor_that_a_round_does_not_train_waits() -> None:
    settings = AggregationConfig(server="momentum")
    one = {"b": torch.zeros(2)}
    _, memory = server_step(settings, one, {"b": torch.ones(2)}, {})
    _, later = server_step(settings, {"a": torch.zeros(2)}, {"a": torch.ones(2)}, memory)
    assert torch.equal(later["momentum.b"], memory["momentum.b"])
    assert set(later) == {"momentum.a", "momentum.b"}
