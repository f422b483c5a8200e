"""What a file must say of itself before anything in it is believed."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedmentor_core.adapters.lora import metadata_from_bytes, state_from_bytes, state_to_bytes
from fedmentor_core.errors import IntegrityError
from fedmentor_core.wire.codecs import find_codec
from fedmentor_core.wire.envelope import KEY, Envelope, decoded, encoded
from fedmentor_core.wire.update import Base, decode_update, encode_update, update_header

NAME = "layer.lora_B.weight"
SAID = {"run_id": "r", "round_index": "000001", "base_sha256": "b" * 64}
CODECS = ["bf16", "int8", "int7", "int6", "int4"]


def start(shape: tuple[int, ...] = (40, 4)) -> Base:
    return Base("b" * 64, {NAME: torch.randn(shape, generator=torch.Generator().manual_seed(1))})


def sent(name: str = "int8") -> bytes:
    after = {NAME: start().state[NAME] + 0.01 * torch.randn(40, 4, generator=torch.Generator().manual_seed(2))}
    return encode_update(after, find_codec(name), start(), SAID, seed=3)


def changed(data: bytes, **header: Any) -> bytes:
    """The same tensors under a changed wire header."""
    metadata = metadata_from_bytes(data)
    said = json.loads(metadata[KEY]) | header
    return state_to_bytes(state_from_bytes(data), metadata | {KEY: json.dumps(said)})


def with_tensors(data: bytes, change: Callable[[dict], dict]) -> bytes:
    return state_to_bytes(change(state_from_bytes(data)), metadata_from_bytes(data))


@pytest.mark.parametrize("name", CODECS)
def test_the_header_says_how_to_read_the_file(name):
    said = json.loads(metadata_from_bytes(sent(name))[KEY])
    dither = {"dither": "0000000000000003"} if name in ("int7", "int6") else {}
    assert said == {
        "version": 1, "codec": name, "block": find_codec(name).block, "dtype": "float32", "base": "b" * 64,
        "shapes": {NAME: [40, 4]}, **dither,
    }  # fmt: skip
    expected = update_header({NAME: (40, 4)}, find_codec(name), "b" * 64, SAID, seed=3)
    assert metadata_from_bytes(sent(name)) == expected


def test_fp32_is_a_plain_file_that_every_reader_of_safetensors_reads():
    state = start().state
    data = encode_update(state, find_codec("fp32"), start(), SAID, seed=3)
    assert data == state_to_bytes(state, SAID)
    assert metadata_from_bytes(data) == SAID
    assert torch.equal(decode_update(data, find_codec("fp32"), None)[NAME], state[NAME])


def test_what_stands_for_itself_is_no_change_and_the_reverse():
    codec, state = find_codec("int8"), start().state
    adapter = encoded(state, codec, seed=1, metadata={})
    assert decoded(adapter).keys() == state.keys()
    with pytest.raises(IntegrityError, match="another global adapter"):
        decode_update(adapter, codec, start())
    with pytest.raises(IntegrityError, match="a change of another adapter"):
        decoded(sent())


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("other", ["fp32", *CODECS])
def test_an_update_in_another_codec_than_agreed_is_refused(name, other):
    if name == other:
        return
    with pytest.raises(IntegrityError, match=rf"'{name}', expected '{other}' \(wire.upload\)"):
        decode_update(sent(name), find_codec(other), start())
    with pytest.raises(IntegrityError, match=rf"'fp32', expected '{name}'"):
        decode_update(state_to_bytes(start().state, SAID), find_codec(name), start())


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({"version": 2}, "wire format version 2; this installation reads version 1"),
        ({"version": None}, "version"),
        ({"block": 7}, "block size"),
        ({"dtype": "float64"}, "unknown form"),
        ({"base": "0" * 64}, "another global adapter"),
        ({"base": "../../else"}, "unknown form"),
        ({"base": None}, "another global adapter"),
        ({"shapes": {NAME: [4, 40]}}, "shapes that the round's global adapter has not"),
        ({"shapes": {NAME: [10**12, 10**12]}}, "shapes that the round's global adapter has not"),
        ({"shapes": {NAME: [-40, -4]}}, "unknown form"),
        ({"shapes": {"other": [40, 4]}}, "tensors or shapes"),
        ({"shapes": {}}, "lacks tensors, or holds unknown ones"),
        ({"shapes": [1]}, "unknown form"),
        ({"more": 1}, "unknown form"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["int8", "int6", "int4"])
def test_a_header_that_says_anything_else_is_refused(name, header, told):
    with pytest.raises(IntegrityError, match=told):
        decode_update(changed(sent(name), **header), find_codec(name), start())


@pytest.mark.parametrize(
    ("name", "dither", "told"),
    [
        ("int6", None, "'int6' has a dither"), ("int8", "0" * 16, "'int8' has no dither"),
        ("int6", "3", "unknown form"), ("int6", "x" * 16, "unknown form"), ("int6", 3, "unknown form"),
    ],
)  # fmt: skip
def test_a_dither_is_said_in_full_where_there_is_one_and_nowhere_else(name, dither, told):
    with pytest.raises(IntegrityError, match=told):
        decode_update(changed(sent(name), dither=dither), find_codec(name), start())


@pytest.mark.parametrize("text", ["", "[]", "7", "{", "[" * 100_000], ids=lambda text: text[:3])
def test_a_header_that_is_no_header_is_refused(text):
    data = state_to_bytes(state_from_bytes(sent()), SAID | {KEY: text})
    for read in (lambda: decode_update(data, find_codec("int8"), start()), lambda: decoded(data)):
        with pytest.raises(IntegrityError):
            read()


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {name: t for name, t in s.items() if not name.endswith("scales")},
        lambda s: {name: t for name, t in s.items() if name.endswith("scales")},
        lambda s: s | {"more": torch.zeros(1)},
        lambda s: {name: t[:-1].contiguous() for name, t in s.items()},
        lambda s: {name: t.float() for name, t in s.items()},
        lambda s: {name: t.half() if name.endswith("scales") else t for name, t in s.items()},
        lambda s: {},
    ],
    ids=["no scales", "no codes", "more tensors", "short", "another type", "another scale type", "nothing"],
)
@pytest.mark.parametrize("name", ["int8", "int6", "int4"])
def test_a_file_that_does_not_hold_what_its_header_says_is_refused(name, change):
    with pytest.raises(IntegrityError):
        decode_update(with_tensors(sent(name), change), find_codec(name), start())


def test_every_cut_is_refused():
    data = sent("int4")
    for end in range(0, len(data), 7):
        with pytest.raises(IntegrityError):
            decode_update(data[:end], find_codec("int4"), start())


def test_shapes_do_not_make_a_reader_allocate_what_the_file_does_not_hold():
    """A terabyte is refused by arithmetic: the stored codes are too few for it."""
    adapter = encoded(start().state, find_codec("int4"), seed=1, metadata={})
    with pytest.raises(IntegrityError, match="expected"):
        decoded(changed(adapter, shapes={NAME: [10**6, 10**6]}))


@pytest.mark.parametrize("codec", ["int6", "int4"])
def test_some_tensors_can_be_read_alone(codec):
    state = {name: torch.randn(8, 8, generator=torch.Generator().manual_seed(1)) for name in ("a", "b", "c")}
    data = encoded(state, find_codec(codec), seed=1, metadata={})
    envelope = Envelope.in_metadata(metadata_from_bytes(data))
    assert envelope is not None
    stored, read = state_from_bytes(data), []

    def reader(name: str) -> torch.Tensor:
        read.append(name)
        return stored[name]

    found = envelope.decode(stored.keys(), reader, ["b"])
    assert sorted(read) == ["b", "b.scales"]
    assert torch.equal(found["b"], decoded(data)["b"])
    with pytest.raises(IntegrityError, match="holds no tensor 'd'"):
        envelope.decode(stored.keys(), reader, ["d"])


def test_the_same_state_and_metadata_give_the_same_bytes():
    """safetensors alone writes several metadata entries in an order that changes from call to call."""
    state = {"a": torch.arange(3.0)}
    metadata = {key: f'"{key}" \\ é\n' for key in "dcba"}
    made = {state_to_bytes(state, metadata) for _ in range(30)}
    assert len(made) == 1
    assert metadata_from_bytes(made.pop()) == metadata
