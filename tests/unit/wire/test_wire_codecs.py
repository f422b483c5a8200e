"""Each codec on one tensor: how far what is read may be from what was meant, and what it refuses to read."""

import math

import pytest
import torch

from fedmentor_core.errors import IntegrityError
from fedmentor_core.wire.blocks import in_blocks, scales_of
from fedmentor_core.wire.codecs import SCALES, find_codec
from fedmentor_core.wire.packing import packed, unpacked
from fedmentor_core.wire.rounding import coins, round_by_coin, to_bfloat16_by_coin

SHAPES = [(1,), (31,), (32,), (33,), (5, 7), (64, 16), (3, 129)]
STEPS = {"int8": 126.0, "int4": 6.9}  # of a block's largest magnitude, at least: docs/wire.md


def read_back(name: str, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    codec = find_codec(name)
    return codec.decode(codec.encode(values, coins(seed)), tuple(values.shape))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_fp32_is_exact_and_throws_no_coin():
    values = randn(9, 5)
    assert read_back("fp32", values) is values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_bfloat16_is_one_of_the_two_neighbours(shape, size):
    values = randn(*shape) * size
    found = read_back("bf16", values)
    assert found.dtype == torch.float32
    assert bool(((found - values).abs() < values.abs() / 128).all())
    assert torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_a_number_moves_by_less_than_a_step_of_its_own_block(name, shape, size):
    values = randn(*shape) * size
    values.view(-1)[0] *= 1000  # costs its own block precision, and no other
    found, block = read_back(name, values), find_codec(name).block
    assert found.shape == values.shape
    assert found.dtype == torch.float32
    error, largest = (in_blocks(one.abs(), block) for one in (found - values, values))
    assert bool((error < largest.amax(dim=1, keepdim=True) / STEPS[name]).all())


@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
def test_other_coins_round_otherwise_and_the_same_coins_the_same(name):
    values = randn(64, 16)
    assert torch.equal(read_back(name, values, 1), read_back(name, values, 1))
    assert not torch.equal(read_back(name, values, 1), read_back(name, values, 2))


@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
def test_zero_and_what_is_on_the_grid_stay_what_they_are(name):
    zero = torch.zeros(40, 16)
    assert torch.equal(read_back(name, zero), zero)
    grid = torch.arange(-7.0, 8.0).repeat(64)  # multiples of 1 with the largest code in every block of 32
    codec = find_codec(name)
    if name == "int8":
        grid = torch.cat([grid[:960].view(-1, 64), torch.full((15, 64), 127.0)], dim=1)
        grid = torch.stack([grid[:, :63], grid[:, 64:127]], dim=0).flatten()[: 64 * 29]
        grid[::64] = 127.0
    for seed in range(20):
        assert torch.equal(codec.decode(codec.encode(grid, coins(seed)), tuple(grid.shape)), grid)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_block_too_small_for_a_scale_is_zero(name):
    values = torch.full((64,), 1e-40)
    values[0] = -1e-44
    assert not bool(read_back(name, values).any())


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_written_and_refused_by_its_reader(name, broken):
    """The site sends it, since it is noised and charged; the server rejects the update."""
    values = randn(64)
    values[5] = broken
    with pytest.raises(IntegrityError, match="NaN or infinity"):
        read_back(name, values)


def test_bfloat16_keeps_what_is_not_finite():
    values = torch.tensor([math.nan, math.inf, -math.inf, 1.5])
    for seed in range(50):
        found = to_bfloat16_by_coin(values, coins(seed)).float()
        assert torch.isnan(found[0])
        assert found[1:].tolist() == [math.inf, -math.inf, 1.5]


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0, 3e38])
def test_a_scale_that_no_encoder_writes_is_refused(name, scale):
    codec, values = find_codec(name), randn(64)
    parts = codec.encode(values, coins(0))
    parts[SCALES][-1] = scale
    with pytest.raises(IntegrityError, match="scale"):
        codec.decode(parts, (64,))


@pytest.mark.parametrize(("name", "code"), [("int8", -128), ("int4", 0x80)])
def test_a_code_that_no_encoder_writes_is_refused(name, code):
    codec, values = find_codec(name), randn(64)
    parts = codec.encode(values, coins(0))
    parts[""][3] = code
    with pytest.raises(IntegrityError, match="code"):
        codec.decode(parts, (64,))


def test_the_scale_holds_the_largest_number_and_wastes_little():
    blocks = in_blocks(randn(1000, seed=3) * torch.logspace(-30, 30, 1000), 8)
    scales = scales_of(blocks, 127)
    assert scales.dtype == torch.bfloat16
    needed = blocks.abs().amax(dim=1) / 127
    assert bool((scales.float() >= needed).all())
    assert bool((scales.float() <= needed * (1 + 1 / 128)).all())


@pytest.mark.parametrize("n", [1, 2, 15, 16])
def test_packing_keeps_every_code(n):
    codes = torch.arange(-8, 8, dtype=torch.int8)[:n]
    data = packed(codes)
    assert (data.dtype, len(data)) == (torch.uint8, -(-n // 2))
    assert torch.equal(unpacked(data, n), codes)


def test_packing_puts_the_first_code_into_the_lower_half():
    assert packed(torch.tensor([1, -1, 7], dtype=torch.int8)).tolist() == [0xF1, 0x07]


def test_rounding_by_coin_is_up_as_often_as_it_should_be():
    """Binomial: 200,000 coins for each fraction; five standard deviations."""
    n = 200_000
    for value in (0.1, 0.5, 0.93, -0.25, -3.75):
        found = round_by_coin(torch.full((n,), value), coins(7))
        assert set(found.tolist()) <= {math.floor(value), math.floor(value) + 1.0}
        share = value - math.floor(value)
        assert abs(float(found.double().mean()) - value) < 5 * math.sqrt(share * (1 - share) / n)


def test_an_unknown_codec_is_named():
    with pytest.raises(IntegrityError, match="unknown wire codec 'int3'; known are fp32, bf16, int8, int4"):
        find_codec("int3")
