"""Client-level DP: sensitivity of a clipped update, the noise's scale, the filter's arithmetic, the warning."""

import math

import dp_accounting
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from fedmentor_core.privacy.accountant import calibrate_at_order, epsilon_rdp
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.mechanism import charged_events
from fedmentor_core.privacy.output import (
    SENSITIVITY_PER_CLIP,
    clip_update,
    hopeless_at_client_level,
    noise_norm,
    perturb_update,
)
from fedmentor_core.records import PrivacySpend

SHAPES = {"a": (3, 4), "b": (7,)}


def state(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in SHAPES.items()}


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].double().flatten() for name in SHAPES])


@settings(max_examples=80, deadline=None)
@given(
    seeds=st.tuples(st.integers(0, 2**31), st.integers(0, 2**31)),
    scales=st.tuples(*[st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e6, 1e30])] * 2),
    clip=st.floats(1e-3, 10.0),
    poison=st.sampled_from([None, float("nan"), float("inf")]),
)
def test_replacing_a_clients_data_moves_the_clipped_update_by_at_most_twice_the_clip_norm(
    seeds: tuple[int, int], scales: tuple[float, float], clip: float, poison: float | None
) -> None:
    before = state(1)
    one, other = (state(seed, scale) for seed, scale in zip(seeds, scales, strict=True))
    if poison is not None:
        one["a"][0, 0] = poison
    left, right = (flat(clip_update(before, after, clip)) for after in (one, other))
    assert bool(left.isfinite().all())
    for clipped in (left, right):
        assert float(clipped.norm()) <= clip * (1 + 1e-9)
    assert float((left - right).norm()) <= SENSITIVITY_PER_CLIP * clip * (1 + 1e-9)


def test_a_small_update_passes_unchanged() -> None:
    before, after = state(1), {name: tensor + 1e-3 for name, tensor in state(1).items()}
    clipped = clip_update(before, after, 1.0)
    assert torch.allclose(flat(clipped), flat(after) - flat(before))


def test_clip_is_over_all_tensors_jointly() -> None:
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    one = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    assert float(flat(clip_update(zero, one, 2.0)).norm()) == pytest.approx(2.0)


@pytest.mark.parametrize(("sigma", "clip"), [(1.0, 1.0), (3.7, 0.05)])
def test_noise_is_gaussian_of_exactly_the_promised_scale(sigma: float, clip: float) -> None:
    before = {"a": torch.zeros(200, 100, dtype=torch.float64)}
    released = perturb_update(before, before, noise_multiplier=sigma, clip_norm=clip)
    sample = (released["a"].flatten() / (sigma * 2 * clip)).numpy()
    assert kstest(sample, "norm").pvalue > 1e-4
    for wrong in (0.9, 1.1):
        assert kstest(sample * wrong, "norm").pvalue < 1e-6


def test_noise_is_new_each_time_and_seeded_only_when_asked() -> None:
    before, after = state(1), state(2)

    def released(seed: int | None) -> torch.Tensor:
        return flat(perturb_update(before, after, noise_multiplier=1.0, clip_norm=1.0, noise_seed=seed))

    assert not torch.equal(released(None), released(None))
    assert torch.equal(released(7), released(7))
    assert not torch.equal(released(7), released(8))


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan])
def test_no_noise_is_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match="noise_multiplier"):
        perturb_update(state(1), state(2), noise_multiplier=sigma, clip_norm=1.0)


def test_a_round_is_one_event_without_amplification() -> None:
    assert charged_events("client", 0.02, 50) == (1.0, 1)
    assert charged_events("unit", 0.02, 50) == (0.02, 50)


@pytest.mark.parametrize(("sigma", "rounds", "golden"), [(10.0, 10, 1.3085), (4.0, 1, 1.0126)])
def test_epsilon_equals_the_published_values_and_is_never_below_pld(sigma: float, rounds: int, golden: float) -> None:
    ours = epsilon_rdp([PrivacySpend(noise_multiplier=sigma, sample_rate=1.0, steps=rounds)], 1e-5)
    assert ours == pytest.approx(golden, abs=1e-3)
    accountant = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)
    accountant.compose(dp_accounting.GaussianDpEvent(sigma), rounds)
    assert ours >= accountant.get_epsilon(1e-5)


@pytest.mark.parametrize(
    ("epsilon", "rounds", "least"),
    [(0.5, 1, 7.03), (1.0, 10, 11.8), (4.0, 10, 3.42), (8.0, 20, 2.69)],
)
def test_calibrated_noise_is_near_the_tight_value_and_never_below(epsilon: float, rounds: int, least: float) -> None:
    account = PrivacyAccount.open(epsilon, 1e-5, 1.0, rounds)
    sigma = calibrate_at_order(account.rdp_budget, account.rdp_order, 1.0, rounds)
    assert least * 0.995 <= sigma <= least * 1.25


def test_warning_gives_the_arithmetic_and_only_where_it_is_hopeless() -> None:
    told = hopeless_at_client_level(1.9, 1.0, 921_600, 3)
    assert told is not None
    assert "2 x noise multiplier 1.9 x clip norm 1 x sqrt(921,600 parameters)" in told
    assert f"{noise_norm(1.9, 1.0, 921_600) / math.sqrt(3):.3g} times more noise than signal" in told
    assert hopeless_at_client_level(0.5, 1.0, 100, 10_000) is None
