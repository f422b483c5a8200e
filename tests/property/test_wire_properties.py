"""For any tensors: what is read is close and on average right, and its file has the size that was foretold."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmentor_core.adapters.lora import metadata_from_bytes, state_to_bytes
from fedmentor_core.errors import FedMentorError
from fedmentor_core.wire.blocks import in_blocks
from fedmentor_core.wire.codecs import find_codec
from fedmentor_core.wire.envelope import decoded, encoded, encoded_bytes, shapes_of
from fedmentor_core.wire.packing import packed, unpacked
from fedmentor_core.wire.sizes import file_bytes
from fedmentor_core.wire.update import Base, decode_update, encode_update, update_bytes

STEPS = {"int8": 126.0, "int7": 124.9, "int6": 61.4, "int4": 6.9}
CODECS = ("fp32", "bf16", *STEPS)
State = dict[str, torch.Tensor]
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def states(draw: Any) -> State:
    """Tensors of any rank and size, with sizes from tiny to large inside one tensor, and some zeros."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    state = {}
    for index in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
        sizes = 10.0 ** torch.randint(-20, 20, shape, generator=generator).float()
        kept = torch.rand(shape, generator=generator) > draw(st.sampled_from([0.0, 0.5, 1.0]))
        state[f"layer.{index}.weight"] = torch.randn(shape, generator=generator) * sizes * kept
    return state


def within_a_step(name: str, found: torch.Tensor, meant: torch.Tensor) -> bool:
    error = (found.double() - meant.double()).abs()
    if name == "fp32":
        return not bool(error.any())
    if name == "bf16":
        return bool((error <= meant.double().abs() / 128).all())
    block = find_codec(name).block or 1
    largest = in_blocks(meant.abs(), block).amax(dim=1, keepdim=True).double()
    return bool((in_blocks(error.float(), block) <= largest / STEPS[name]).all())


@quick
@given(states(), st.sampled_from(CODECS), st.integers(0, 2**60), st.dictionaries(st.text(max_size=5), st.text()))
def test_a_file_reads_as_what_was_meant_and_has_the_size_that_was_foretold(state, name, seed, said):
    metadata = {f"said {key}": value for key, value in said.items()}
    codec = find_codec(name)
    data = encoded(state, codec, seed=seed, metadata=metadata)
    assert len(data) == encoded_bytes(shapes_of(state), codec, metadata=metadata)
    assert data == encoded(state, codec, seed=seed, metadata=metadata)
    assert metadata.items() <= metadata_from_bytes(data).items()
    found = decoded(data)
    assert found.keys() == state.keys()
    assert all(within_a_step(name, found[one], state[one]) for one in state)


@quick
@given(states(), st.sampled_from(CODECS), st.integers(0, 2**60))
def test_an_update_reads_as_what_was_meant_to_a_step_of_its_change(change, name, seed):
    generator = torch.Generator().manual_seed(seed)
    start = {one: torch.randn(tensor.shape, generator=generator) for one, tensor in change.items()}
    after = {one: start[one] + tensor for one, tensor in change.items()}
    codec, base = find_codec(name), Base("a" * 64, start)
    data = encode_update(after, codec, base, {"run_id": "r"}, seed)
    assert len(data) == update_bytes(shapes_of(after), codec, {"run_id": "r"})
    found = decode_update(data, codec, base)
    for one, tensor in found.items():
        if name == "fp32":
            assert torch.equal(tensor, after[one])
        else:  # what is added to the base is rounded once more, to fp32
            moved = after[one] - start[one]
            added = tensor.double() - start[one].double()
            slack = 1.2e-7 * (tensor.double().abs() + start[one].double().abs())
            step = moved.abs() / 128 if name == "bf16" else moved.abs().max() / STEPS[name]
            assert bool(((added - moved.double()).abs() <= step.double() + slack).all())


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(CODECS[1:]), st.integers(0, 2**32))
def test_the_mean_of_many_roundings_is_what_was_meant(name, seed):
    """Each error has mean zero and at most half a step standard deviation: six of those of the mean, for 192 numbers.

    Under a dither ``STEPS`` is half a step, and the standard deviation 0.58 of it.
    """
    values = torch.randn(192, generator=torch.Generator().manual_seed(seed))
    codec, n = find_codec(name), 400
    read = (decoded(encoded({"a": values}, codec, seed=seed + k, metadata={}))["a"] for k in range(n))
    mean = sum(one.double() for one in read) / n
    if name == "bf16":
        step = values.double().abs() / 128
    else:
        block = codec.block or 1
        largest = in_blocks(values.abs(), block).amax(dim=1).double()
        step = (largest / STEPS[name]).repeat_interleave(block)[:192]
    deviation = step * (0.58 if codec.dithered else 0.5)
    assert bool(((mean - values.double()).abs() <= 6 * deviation / n**0.5).all())


@quick
@given(st.integers(2, 7), st.data())
def test_packing_is_undone(bits, data):
    codes = data.draw(st.lists(st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), min_size=1, max_size=70))
    assert unpacked(packed(torch.tensor(codes, dtype=torch.int8), bits), len(codes), bits).tolist() == codes


@quick
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.tuples(st.sampled_from(["F64", "F32", "BF16", "I8", "U8"]), st.lists(st.integers(1, 30), max_size=3)),
        max_size=6,
    ),
    st.dictionaries(st.text(max_size=6), st.text(max_size=30), max_size=3),
)
def test_the_size_of_a_safetensors_file_is_known_before_it_is_written(tensors, metadata):
    types = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8, "U8": torch.uint8}
    tensors.pop("__metadata__", None)
    state = {name: torch.zeros(shape, dtype=types[kind]) for name, (kind, shape) in tensors.items()}
    layout = {name: (kind, tuple(shape)) for name, (kind, shape) in tensors.items()}
    data = state_to_bytes(state, metadata)
    assert file_bytes(layout, metadata) == len(data)
    assert data == state_to_bytes(state, metadata)


@settings(max_examples=200, deadline=None)
@given(st.data())
@pytest.mark.parametrize("name", CODECS)
def test_bytes_changed_on_their_way_are_read_or_refused_and_nothing_else(name, data):
    """Whatever arrives: tensors of the right shapes, or an error of ours."""
    codec, generator = find_codec(name), torch.Generator().manual_seed(1)
    start = {"a.weight": torch.randn(9, 5, generator=generator), "b.weight": torch.randn(7, generator=generator)}
    after = {key: tensor + 0.1 for key, tensor in start.items()}
    base = Base("a" * 64, start)
    good = encode_update(after, codec, base, {"run_id": "r"}, 1)
    position = data.draw(st.integers(0, len(good) - 1))
    cut = data.draw(st.booleans())
    bad = good[:position] if cut else good[:position] + data.draw(st.binary(max_size=4)) + good[position + 1 :]
    try:
        found = decode_update(bad, codec, base)
    except FedMentorError:
        return
    if name != "fp32":  # what fp32 holds is judged where it is added up
        assert {key: tensor.shape for key, tensor in found.items()} == {k: t.shape for k, t in start.items()}
