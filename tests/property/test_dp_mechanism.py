"""What the DP engine promises whatever the gradients: sensitivity, noise of the right scale, secret randomness."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from fedmentor_core.privacy.engine import make_private_optimizer, private_step
from fedmentor_core.privacy.entropy import secret_generator
from fedmentor_core.training.sampler import pick_rows, poisson_batches

SHAPES = ((3, 2), (4,), (1, 5))


class Recorder(torch.optim.SGD):
    """Keeps the gradients that it would have stepped with."""

    def step(self, closure: Any = None) -> None:
        seen = torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]])
        self.seen = [*getattr(self, "seen", []), seen]


def private(
    shapes: Any, *, noise: float, clip: float = 1.0, expected: float = 1.0, seed: int | None = None
) -> tuple[Any, Recorder, list[torch.nn.Parameter]]:
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    recorder = Recorder(parameters, lr=1.0)
    optimizer = make_private_optimizer(
        recorder, noise_multiplier=noise, clip_norm=clip, expected_units=expected, device="cpu", noise_seed=seed
    )
    return optimizer, recorder, parameters


def clipped_sum(rows: torch.Tensor, unit_of_row: list[int], clip: float) -> torch.Tensor:
    """The step's gradient without noise, times its denominator; ``rows`` is (rows, all coordinates)."""
    optimizer, recorder, parameters = private(SHAPES, noise=0.0, clip=clip, expected=7.0)
    names = sorted(set(unit_of_row))
    if names:
        pieces = rows.split([p.numel() for p in parameters], dim=1)
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad_sample = piece.reshape(len(rows), *parameter.shape).clone()
        optimizer.fold(torch.tensor([names.index(unit) for unit in unit_of_row]), len(names))
    else:
        optimizer.fold_empty()
    optimizer.step()
    return recorder.seen[0] * 7.0


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    units=st.lists(st.integers(0, 4), min_size=1, max_size=10),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e3, 1e18, 1e30]),
    clip=st.floats(0.01, 10.0),
    poison=st.sampled_from([None, float("nan"), float("inf"), -float("inf")]),
)
def test_one_unit_moves_the_clipped_sum_by_at_most_the_clip_norm(
    seed: int, units: list[int], scale: float, clip: float, poison: float | None
) -> None:
    rows = torch.randn(len(units), 15, generator=torch.Generator().manual_seed(seed)) * scale
    if poison is not None:
        rows[0, seed % 15] = poison
    whole = clipped_sum(rows, units, clip)
    assert bool(whole.isfinite().all())
    for removed in set(units):
        kept = [i for i, unit in enumerate(units) if unit != removed]
        without = clipped_sum(rows[kept], [units[i] for i in kept], clip)
        assert float((whole - without).norm()) <= clip * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_unit_with_a_broken_gradient_counts_for_nothing(poison: float) -> None:
    rows = torch.randn(4, 15, generator=torch.Generator().manual_seed(0))
    rows[1, 3] = poison
    expected = clipped_sum(rows[[0]], [0], 0.5) + clipped_sum(rows[[3]], [2], 0.5)
    assert torch.allclose(clipped_sum(rows, [0, 1, 1, 2], 0.5), expected)


def test_rows_of_a_unit_are_clipped_as_one() -> None:
    rows = torch.ones(3, 15)
    assert float(clipped_sum(rows, [0, 0, 0], 1.0).norm()) == pytest.approx(1.0, abs=1e-5)
    assert float(clipped_sum(rows, [0, 1, 2], 1.0).norm()) == pytest.approx(3.0, abs=1e-5)


def noise_sample(noise: float, clip: float, expected: float, n: int = 40_000) -> torch.Tensor:
    """The noise of one empty step, in units of its promised standard deviation."""
    optimizer, recorder, _ = private([(n // 100, 100)], noise=noise, clip=clip, expected=expected)
    private_step(optimizer, [], losses_of=None)
    return recorder.seen[0] * expected / (noise * clip)


@pytest.mark.parametrize(("noise", "clip", "expected"), [(1.0, 1.0, 1.0), (0.7, 0.05, 64.0)])
def test_noise_is_gaussian_of_exactly_the_promised_scale(noise: float, clip: float, expected: float) -> None:
    sample = noise_sample(noise, clip, expected).numpy()
    assert kstest(sample, "norm").pvalue > 1e-4
    for wrong in (0.9, 1.1):
        assert kstest(sample * wrong, "norm").pvalue < 1e-6
        assert kstest(sample, "norm", args=(0, wrong)).pvalue < 1e-6


def test_each_number_of_noise_is_the_sum_of_four_draws() -> None:
    """A single draw in fp32 betrays in its low bits what it was added to (Holohan and Braghin 2021)."""
    generator = torch.Generator().manual_seed(3)
    torch.normal(0.0, 1.0, (1, 1), generator=generator)  # Opacus throws the first number away
    draws = torch.stack([torch.normal(0.0, 1.0, (15,), generator=generator) for _ in range(4)])
    assert torch.allclose(one_step(3), draws.sum(dim=0) / 2, rtol=1e-5, atol=1e-6)


def test_tensors_of_an_adapter_share_no_noise() -> None:
    optimizer, recorder, _ = private([(100, 100), (100, 100)], noise=1.0)
    private_step(optimizer, [], losses_of=None)
    both = recorder.seen[0].reshape(2, -1)
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.06  # six standard deviations
    assert torch.allclose(both.std(dim=1), torch.ones(2), rtol=0.05)


def test_empty_batch_adds_noise_and_is_a_step() -> None:
    optimizer, recorder, parameters = private(SHAPES, noise=1.0)
    for _ in range(3):
        private_step(optimizer, [], losses_of=None)
    assert len(recorder.seen) == 3
    assert all(float(seen.abs().min()) > 0 for seen in recorder.seen)
    assert not torch.equal(recorder.seen[0], recorder.seen[1])
    assert all(p.grad is None for p in parameters)


def test_noise_is_added_once_after_the_last_microbatch() -> None:
    optimizer, recorder, parameters = private([(200, 100)], noise=1.0)
    weight = parameters[0]

    def losses_of(rows: torch.Tensor) -> torch.Tensor:
        weight.grad_sample = torch.zeros(len(rows), *weight.shape)
        return (rows * 0).requires_grad_()

    batch = torch.zeros(2)
    private_step(optimizer, [(batch, torch.tensor([0, 1]), 2)] * 5, losses_of=losses_of)
    assert len(recorder.seen) == 1
    assert float(recorder.seen[0].std()) == pytest.approx(1.0, rel=0.03)


def one_step(seed: int | None) -> torch.Tensor:
    optimizer, recorder, _ = private(SHAPES, noise=1.0, seed=seed)
    private_step(optimizer, [], losses_of=None)
    return recorder.seen[0]


def test_noise_never_comes_from_the_global_seed() -> None:
    torch.manual_seed(0)
    first = one_step(None)
    torch.manual_seed(0)
    assert not torch.equal(first, one_step(None))


def test_seeded_noise_is_reproducible() -> None:
    assert torch.equal(one_step(3), one_step(3))
    assert not torch.equal(one_step(3), one_step(4))


@pytest.mark.parametrize("seed", [None, 3])
def test_noise_leaves_the_global_generator_alone(seed: int | None) -> None:
    before = torch.get_rng_state()
    one_step(seed)
    list(poisson_batches(50, 0.3, 3, seed))
    assert torch.equal(before, torch.get_rng_state())


def test_data_order_of_a_seeded_run_depends_on_its_seed_alone() -> None:
    torch.manual_seed(0)
    plain = list(poisson_batches(200, 0.1, 4, 9))
    order = []
    torch.manual_seed(1)
    for batch in poisson_batches(200, 0.1, 4, 9):
        one_step(None)
        torch.rand(3)
        order.append(batch)
    assert order == plain
    assert list(poisson_batches(200, 0.1, 4, 10)) != plain


def test_sample_of_a_private_run_is_secret() -> None:
    torch.manual_seed(0)
    first = list(poisson_batches(200, 0.1, 2, None))
    torch.manual_seed(0)
    assert list(poisson_batches(200, 0.1, 2, None)) != first


def test_secret_state_is_not_one_of_the_few_that_a_seed_can_make() -> None:
    """torch's CPU generator takes 32 bits of a seed: 2^32 streams of noise could be tried one by one."""
    same_low_bits = [torch.Generator().manual_seed(7 + (high << 32)) for high in (0, 1)]
    assert torch.equal(*(torch.rand(5, generator=generator) for generator in same_low_bits))  # the trap is real

    def follows_a_seed(generator: torch.Generator) -> bool:
        words = generator.get_state()[24 : 24 + 8 * 624].view(torch.int64).tolist()
        return all(
            words[i] == (1812433253 * (words[i - 1] ^ (words[i - 1] >> 30)) + i) & 0xFFFFFFFF for i in range(1, 624)
        )

    assert follows_a_seed(torch.Generator().manual_seed(7))
    assert not follows_a_seed(secret_generator())
    assert kstest(torch.rand(40_000, generator=secret_generator()).numpy(), "uniform").pvalue > 1e-4


def test_every_unit_is_sampled_alone_at_the_rate() -> None:
    n_units, rate, steps = 300, 0.05, 400
    counts = torch.zeros(n_units)
    sizes = []
    for batch in poisson_batches(n_units, rate, steps, 5):
        counts[batch] += 1
        sizes.append(float(len(batch)))
    mean, variance = n_units * rate, n_units * rate * (1 - rate)
    assert sum(sizes) / steps == pytest.approx(mean, abs=5 * (variance / steps) ** 0.5)
    assert float(torch.tensor(sizes).var()) == pytest.approx(variance, rel=0.35)
    assert float(counts.var()) == pytest.approx(steps * rate * (1 - rate), rel=0.4)
    assert [] in list(poisson_batches(5, 0.01, 50, 1))  # empty batches are batches
    assert list(poisson_batches(4, 1.0, 1, None)) == [[0, 1, 2, 3]]


def test_every_row_of_a_unit_is_equally_likely() -> None:
    rows_of_unit = [[0, 1, 2]]
    generator = torch.Generator().manual_seed(0)
    drawn = [pick_rows([0], rows_of_unit, "one", generator)[0][1] for _ in range(900)]
    assert all(abs(drawn.count(row) - 300) < 75 for row in rows_of_unit[0])
    assert pick_rows([0], rows_of_unit, "all", generator) == [(0, 0), (0, 1), (0, 2)]
