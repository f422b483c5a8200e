"""Updates that are joined while they arrive: to the bit what the careful way gives, and nothing from one that is refused."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedmentor_core.aggregation.arriving as module
from fedmentor_core.adapters.lora import state_from_bytes, state_to_bytes
from fedmentor_core.aggregation.ahead import read_ahead
from fedmentor_core.aggregation.arriving import Source, arriving, tensors_in
from fedmentor_core.aggregation.base import StreamedRule, WeightedUpdate
from fedmentor_core.aggregation.fedavg import RULE, fedavg
from fedmentor_core.errors import FedMentorError, IntegrityError, UpdateRejectedError

SHAPES = {"a": (3, 5), "b": (40, 7), "c": (), "d": (0, 4)}


def state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def in_pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def source(data: bytes, weight: float = 1.0, size: int = 100, **other) -> Source:
    return Source(weight, state(0), other.pop("max_update_norm", 1e3), lambda: in_pieces(data, size), **other)


def joined(**sources: Source) -> dict[str, torch.Tensor]:
    return RULE.join_arriving(state(0), arriving(sources))


@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4),
    decodes=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_the_same_to_the_bit_as_the_mean_of_whole_updates(sizes, weights, decodes):
    weights = [weight / sum(weights[: len(sizes)]) for weight in weights[: len(sizes)]]
    states = [state(seed + 1) for seed in range(len(sizes))]
    careful = fedavg(state(0), [WeightedUpdate("", w, s) for w, s in zip(weights, states, strict=True)])
    decode = state_from_bytes if decodes else None
    quick = joined(
        **{
            f"client-{index}": source(state_to_bytes(one, {"format": "pt"}), weight, size, decode=decode)
            for index, (one, weight, size) in enumerate(zip(states, weights, sizes, strict=True))
        }
    )
    assert list(quick) == list(careful)
    assert all(torch.equal(quick[name], careful[name]) for name in careful)


@pytest.mark.filterwarnings("error")
def test_a_tensor_that_lies_in_one_piece_is_not_copied():
    data = state_to_bytes(state(1))
    start = np.frombuffer(data, dtype=np.uint8).ctypes.data
    whole = dict(tensors_in([data], state(0)))
    assert all(start < tensor.data_ptr() < start + len(data) for tensor in whole.values() if tensor.numel())
    assert all(torch.equal(whole[name], tensor) for name, tensor in state(1).items())


@pytest.mark.parametrize("size", [50, 200, 600])
def test_a_piece_is_given_back_before_the_next_one_is_asked_for(size, monkeypatch):
    monkeypatch.setattr(module, "read_ahead", lambda items, limit: nullcontext(iter(items)))  # no thread: exact counts
    alive = 0

    class Piece(bytes):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def pieces():
        nonlocal alive
        for piece in in_pieces(state_to_bytes(state(1)), size):
            assert alive == 0
            alive += 1
            yield Piece(piece)

    client = Source(0.5, state(0), 1e3, pieces)
    joined(one=client, two=client)
    assert alive == 0


def test_the_mean_leaves_the_updates_as_they_were():
    wide = {name: tensor.double() for name, tensor in state(1).items()}
    kept = {name: tensor.clone() for name, tensor in wide.items()}
    fedavg(wide, [WeightedUpdate("one", 0.5, wide), WeightedUpdate("two", 0.5, wide)])
    assert all(torch.equal(wide[name], kept[name]) for name in wide)


def test_fedavg_joins_what_arrives_and_rules_that_need_all_at_once_do_not():
    from fedmentor_core.aggregation import find_rule

    assert isinstance(RULE, StreamedRule)
    assert not isinstance(find_rule("median"), StreamedRule)


def header_of(data: bytes) -> tuple[dict, bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def with_header(header: object, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def spoilt() -> dict[str, bytes]:
    good = state_to_bytes(state(1))
    header, body = header_of(good)
    return {
        "empty": b"",
        "cut in the header": good[:20],
        "cut in a tensor": good[:-3],
        "longer": good + b"x",
        "no header": (2**63).to_bytes(8, "little") + good[8:],
        "not JSON": len(b"{{{{").to_bytes(8, "little") + b"{{{{" + body,
        "a list": with_header([1], body),
        "deep": with_header("x", body)[:8] + b"[" * 100_000,
        "no offsets": with_header({name: {"dtype": "F32", "shape": [1]} for name in header}, body),
        "overlapping": with_header({**header, "a": {**header["a"], "data_offsets": header["b"]["data_offsets"]}}, body),
        "backwards": with_header({"a": {**header["a"], "data_offsets": [0, -4]}}, body),
        "offsets that are no whole numbers": with_header({"a": {**header["a"], "data_offsets": [0, 60.0]}}, body),
        "huge": with_header({"a": {**header["a"], "shape": [2**40], "data_offsets": [0, 2**42]}}, body),
        "another length": with_header({"a": {**header["a"], "data_offsets": [0, 2**42]}}, body),
        "another type": with_header({**header, "a": {**header["a"], "dtype": "I64"}}, body),
        "another codec": with_header({**header, "__metadata__": {"wire": "{}"}}, body),
    }


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in spoilt().items()])
def test_what_is_no_such_file_is_refused_and_makes_no_room_for_itself(data):
    with pytest.raises(IntegrityError):
        list(tensors_in(in_pieces(data, 64), state(0)))


@pytest.mark.parametrize(
    ("update", "told"),
    [
        (state(1) | {"b": torch.full((40, 7), float("nan"))}, "NaN or infinity"),
        (state(1) | {"b": torch.full((40, 7), 2e3)}, "max_update_norm 1000"),
        ({name: tensor for name, tensor in state(1).items() if name != "b"}, "1 tensors missing"),
    ],
)
def test_an_update_that_must_not_enter_the_mean_ends_the_join(update, told):
    with pytest.raises(UpdateRejectedError, match=told):
        joined(one=source(state_to_bytes(state(1)), 0.5), two=source(state_to_bytes(update), 0.5))


def test_a_wrong_digest_that_only_the_last_piece_shows_ends_the_join():
    def pieces():
        yield state_to_bytes(state(1))[:-50]
        raise IntegrityError("wrong digest")

    spoilt_source = Source(0.5, state(0), 1e3, pieces)
    with pytest.raises(IntegrityError, match="wrong digest"):
        joined(one=source(state_to_bytes(state(1)), 0.5), two=spoilt_source)


def test_what_is_read_ahead_is_bounded_and_in_order():
    given_out = 0

    def numbers():
        nonlocal given_out
        for number in range(50):
            given_out += 1
            yield number

    taken = []
    with read_ahead(numbers(), limit=2) as items:
        for number in items:
            time.sleep(0.002)  # the reader is faster than we are
            assert given_out <= number + 1 + 2 + 2  # used, two that wait, and one on its way to them
            taken.append(number)
    assert taken == list(range(50))


def test_the_reading_thread_ends_with_the_block_even_where_nobody_reads_on():
    before = threading.active_count()
    with read_ahead(iter(range(10**9)), limit=1) as items:
        assert next(items) == 0
    assert threading.active_count() == before


def test_an_error_of_the_reading_thread_comes_where_its_item_would_have():
    def two_then_error():
        yield from (1, 2)
        raise FedMentorError("the store is gone")

    seen = []
    with pytest.raises(FedMentorError, match="the store is gone"), read_ahead(two_then_error(), limit=5) as items:
        seen.extend(iter(items.__next__, None))
    assert seen == [1, 2]
