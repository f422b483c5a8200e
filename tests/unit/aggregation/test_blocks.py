"""Sums in blocks: to the bit what torch's own sums over whole tensors are, and norms within the stated bound."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmentor_core.aggregation import blocks

BLOCK = 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK", BLOCK)
    monkeypatch.setattr(blocks, "_of_thread", blocks.threading.local())


def numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


SHAPES = [(), (0, 3), (1,), (3, 5), (4, 4), (17,), (4, 4, 2), (7, 13)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_sum_is_to_the_bit_that_of_whole_tensors(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    in_blocks, whole = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    for seed, weight in enumerate((0.3, 0.1, 0.6)):
        tensor = numbers(shape, seed, dtype)
        blocks.add(in_blocks, tensor, weight)
        whole.add_(tensor, alpha=weight)
    assert torch.equal(in_blocks, whole)


@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 1000),
    scale=st.floats(1e-12, 1e12),
    far=st.floats(0.0, 1e4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
@settings(max_examples=100, deadline=None)
def test_a_distance_is_within_its_bound(shape, seed, scale, far, dtype) -> None:
    one = (numbers(shape, seed) * scale + far * scale).to(dtype)
    other = (numbers(shape, seed + 1) * scale).to(dtype)
    exact = math.sqrt(math.fsum(((one.double() - other.double()) ** 2).flatten().tolist()))
    assert math.sqrt(blocks.squared_distance(one, other)) == pytest.approx(exact, rel=1.01 * 2**-24, abs=0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, BLOCK - 1, BLOCK, 40])
def test_one_number_that_is_not_finite_shows_in_the_sum(bad: float, at: int) -> None:
    tensor = torch.zeros(41)
    tensor[at] = bad
    assert not math.isfinite(blocks.squared_distance(tensor, torch.zeros(41)))


def test_a_difference_beyond_fp32_is_infinite_and_never_small() -> None:
    assert blocks.squared_distance(torch.tensor([3e38]), torch.tensor([-3e38])) == math.inf


def test_tensors_that_do_not_lie_in_order_are_read_in_theirs() -> None:
    turned, straight = numbers((5, 3), 1).T, numbers((3, 5), 2)
    total = torch.zeros(3, 5, dtype=torch.float64)
    blocks.add(total, turned, 0.5)
    assert torch.equal(total, 0.5 * turned.double())
    assert blocks.squared_distance(turned, straight) == blocks.squared_distance(turned.contiguous(), straight)


def test_threads_do_not_share_scratch_memory() -> None:
    pairs = [(numbers((4, 4), seed), numbers((4, 4), seed + 100)) for seed in range(40)]
    alone = [blocks.squared_distance(*pair) for pair in pairs]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda pair: blocks.squared_distance(*pair), pairs)) == alone
