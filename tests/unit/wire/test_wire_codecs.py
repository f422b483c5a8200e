"""Each codec on one tensor: how far what is read may be from what was meant, and what it refuses to read."""

import math
import typing
from functools import partial

import pytest
import torch

from fedmentor_core.config import WireConfig
from fedmentor_core.errors import IntegrityError
from fedmentor_core.wire.blocks import in_blocks, scales_of
from fedmentor_core.wire.codecs import SCALES, CodecName, find_codec
from fedmentor_core.wire.dither import Dither
from fedmentor_core.wire.packing import packed, packed_bytes, unpacked
from fedmentor_core.wire.rounding import coins, round_by_coin, to_bfloat16_by_coin

SHAPES = [(1,), (31,), (32,), (33,), (5, 7), (64, 16), (3, 129), (127,)]
STEPS = {"int8": 126.0, "int7": 124.9, "int6": 61.4, "int4": 6.9}  # in a block's largest magnitude: docs/wire.md
LARGEST = {"int8": 127, "int7": 63, "int6": 31, "int4": 7}
CODED = list(STEPS)
DITHERED = ["int7", "int6"]


def read_back(name: str, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return decoded(name, encoded(name, values, seed), values.shape, seed)


def encoded(name: str, values: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    return find_codec(name).encode(values, coins(seed), partial(Dither(seed).of, "a"))


def decoded(name: str, parts: dict[str, torch.Tensor], shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return find_codec(name).decode(parts, tuple(shape), partial(Dither(seed).of, "a"))


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


@pytest.mark.parametrize("name", CODED)
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


@pytest.mark.parametrize("name", ["bf16", *CODED])
def test_other_coins_round_otherwise_and_the_same_coins_the_same(name):
    values = randn(64, 16)
    assert torch.equal(read_back(name, values, 1), read_back(name, values, 1))
    assert not torch.equal(read_back(name, values, 1), read_back(name, values, 2))


@pytest.mark.parametrize("name", ["bf16", *CODED])
def test_zero_stays_zero(name):
    zero = torch.zeros(40, 16)
    assert torch.equal(read_back(name, zero), zero)


@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
def test_a_coin_leaves_what_is_on_the_grid(name):
    largest, block = LARGEST.get(name, 127), find_codec(name).block or 64
    grid = torch.arange(-largest, largest + 1.0).repeat(block).view(-1, block)  # multiples of 1
    grid[:, 0] = largest  # in each block
    for seed in range(20):
        assert torch.equal(read_back(name, grid, seed), grid)


@pytest.mark.parametrize("name", CODED)
def test_a_block_too_small_for_a_scale_is_zero(name):
    values = torch.full((64,), 1e-40)
    values[0] = -1e-44
    assert not bool(read_back(name, values).any())


@pytest.mark.parametrize("name", CODED)
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


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0, 3e38])
def test_a_scale_that_no_encoder_writes_is_refused(name, scale):
    parts = encoded(name, randn(64))
    parts[SCALES][-1] = scale
    with pytest.raises(IntegrityError, match="scale"):
        decoded(name, parts, (64,))


@pytest.mark.parametrize("name", CODED)
def test_a_code_that_no_encoder_writes_is_refused(name):
    """The least number of so many bits: its opposite is none of them."""
    parts, bits = encoded(name, randn(64)), int(name[3:])
    codes = parts[""] if bits == 8 else unpacked(parts[""], 64, bits)
    codes[5] = -LARGEST[name] - 1
    with pytest.raises(IntegrityError, match=f"{name}: a code is below -{LARGEST[name]}"):
        decoded(name, parts | {"": codes if bits == 8 else packed(codes, bits)}, (64,))


@pytest.mark.parametrize("name", ["int7", "int6", "int4"])
def test_bits_behind_the_last_code_must_be_zero(name):
    parts = encoded(name, randn(65))
    parts[""][-1] |= 0x80
    with pytest.raises(IntegrityError, match="behind the last of 65 codes"):
        decoded(name, parts, (65,))


def test_the_scale_holds_the_largest_number_and_wastes_little():
    blocks = in_blocks(randn(1000, seed=3) * torch.logspace(-30, 30, 1000), 8)
    scales = scales_of(blocks, 127)
    assert scales.dtype == torch.bfloat16
    needed = blocks.abs().amax(dim=1) / 127
    assert bool((scales.float() >= needed).all())
    assert bool((scales.float() <= needed * (1 + 1 / 128)).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 127, 128])
def test_packing_keeps_every_code(n, bits):
    codes = torch.arange(n).sub(n // 2).remainder(2**bits).sub(2 ** (bits - 1)).to(torch.int8)
    data = packed(codes, bits)
    assert (data.dtype, len(data)) == (torch.uint8, math.ceil(n * bits / 8)) == (torch.uint8, packed_bytes(n, bits))
    assert torch.equal(unpacked(data, n, bits), codes)


def test_packing_begins_with_the_least_bits_of_the_first_byte():
    """Written down, so that files of one version are read by the next."""
    codes = torch.tensor([1, -1, 7, -7, 2], dtype=torch.int8)
    assert packed(codes, 4).tolist() == [0xF1, 0x97, 0x02]
    bits = "".join(format(code & 0x3F, "06b")[::-1] for code in codes.tolist())  # least bit first
    assert packed(codes, 6).tolist() == [int(bits[at : at + 8][::-1], 2) for at in range(0, 30, 8)]


def test_rounding_by_coin_is_up_as_often_as_it_should_be():
    """Binomial: 200,000 coins for each fraction; five standard deviations."""
    n = 200_000
    for value in (0.1, 0.5, 0.93, -0.25, -3.75):
        found = round_by_coin(torch.full((n,), value), coins(7))
        assert set(found.tolist()) <= {math.floor(value), math.floor(value) + 1.0}
        share = value - math.floor(value)
        assert abs(float(found.double().mean()) - value) < 5 * math.sqrt(share * (1 - share) / n)


def test_the_dither_is_the_same_on_every_machine():
    """Written down: a reader that drew otherwise would read other numbers than were meant."""
    drawn = Dither(0x0123456789ABCDEF).of("layer.weight", 6)
    assert (drawn * 2**17).tolist() == [56469, -27897, -38347, 20167, -57193, -3045]
    assert torch.equal(Dither(0x0123456789ABCDEF).of("layer.weight", 1000)[:6], drawn)
    assert not torch.equal(Dither(0x0123456789ABCDEF).of("layer.bias", 6), drawn)
    assert not torch.equal(Dither(0x0123456789ABCDEE).of("layer.weight", 6), drawn)


def test_the_dither_is_uniform_and_never_a_half():
    drawn = Dither(1).of("a", 200_000)
    assert (drawn.dtype, len(drawn)) == (torch.float32, 200_000)
    assert -0.5 < float(drawn.min()) < -0.4999
    assert 0.4999 < float(drawn.max()) < 0.5
    counts = torch.histc(drawn, 20, -0.5, 0.5)
    assert bool(((counts - 10_000).abs() < 5 * 10_000**0.5).all())


@pytest.mark.parametrize("name", DITHERED)
def test_the_error_of_a_dithered_codec_is_uniform_whatever_the_numbers(name):
    """Half the variance of a coin's: 1/12 of a squared step. Also where all numbers are one, or on the grid."""
    largest = LARGEST[name]
    for value in (0.0, 1.0, 0.5, 0.31):
        values = torch.full((200, find_codec(name).block), value)
        values[:, 0] = largest  # the step is 1
        error = (read_back(name, values) - values)[:, 1:].double()
        assert float(error.abs().max()) <= 0.5 + 1e-6
        assert abs(float(error.mean())) < 5 * (1 / 12 / error.numel()) ** 0.5
        assert float(error.var()) == pytest.approx(1 / 12, rel=0.05)


@pytest.mark.parametrize("name", DITHERED)
def test_what_is_read_is_exact_until_it_is_multiplied(name):
    """Code less dither needs no rounding in fp32, and times the scale one, so every machine reads the same."""
    values = randn(40, 128)
    parts, n = encoded(name, values), values.numel()
    codes = unpacked(parts[""], n, int(name[3:])).double() - Dither(0).of("a", n).double()
    assert torch.equal(codes, codes.float().double())
    meant = codes.view(-1, find_codec(name).block) * parts[SCALES].double()[:, None]
    assert torch.equal(decoded(name, parts, values.shape), meant.float().view(values.shape))


def test_an_unknown_codec_is_named():
    with pytest.raises(IntegrityError, match="unknown wire codec 'int3'; known are fp32, bf16, int8, int7, int6, int4"):
        find_codec("int3")


def test_a_configuration_may_name_every_codec_and_no_other():
    for direction in ("upload", "download"):
        for name in typing.get_args(CodecName):
            assert getattr(WireConfig.model_validate({direction: name}), direction) == find_codec(name).name
        with pytest.raises(ValueError, match="int6"):
            WireConfig.model_validate({direction: "int3"})
