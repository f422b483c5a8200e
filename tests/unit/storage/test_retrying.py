"""Back-off, jitter and the deadline, with a clock of our own."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmentor_core.storage.retrying import Attempt, GaveUpError, Patience, TransientError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.waits: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


def patience(clock: Clock, deadline: float, jitter: float = 1.0) -> Patience:
    return Patience(deadline, 0.1, 2.0, clock=lambda: clock.now, sleep=clock.sleep, uniform=lambda a, b: b * jitter)


def test_waits_grow_to_a_limit() -> None:
    clock = Clock()

    def seventh_time(attempt: Attempt) -> str:
        if attempt.number < 7:
            raise TransientError("busy")
        return "done"

    assert patience(clock, 60).run(seventh_time) == "done"
    assert clock.waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0])


@given(st.floats(0.01, 100), st.floats(0, 1), st.floats(0, 5))
def test_no_attempt_begins_after_the_deadline(deadline: float, jitter: float, work: float) -> None:
    clock, began = Clock(), []

    def fail(attempt: Attempt) -> None:
        began.append(clock.now)
        clock.now += work + 0.01
        raise TransientError("busy")

    with pytest.raises(GaveUpError) as caught:
        patience(clock, deadline, jitter).run(fail)
    assert all(at <= 100.0 + deadline + 1e-9 for at in began)
    assert caught.value.attempts == len(began) >= 1
    assert caught.value.reason == "busy"


def test_other_errors_are_not_tried_again() -> None:
    calls = []

    def wrong(attempt: Attempt) -> None:
        calls.append(attempt.number)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        patience(Clock(), 60).run(wrong)
    assert calls == [0]


def test_long_attempt_sees_the_deadline() -> None:
    clock = Clock()

    def drip(attempt: Attempt) -> None:
        while True:
            clock.now += 1
            attempt.check()

    with pytest.raises(GaveUpError, match="too slow"):
        patience(clock, 5).run(drip)
    assert clock.now < 110


def test_jitter_spreads_clients() -> None:
    waits = set()
    for seed in range(20):
        clock, drawn = Clock(), random.Random(seed)
        once = Patience(1.0, clock=lambda clock=clock: clock.now, sleep=clock.sleep, uniform=drawn.uniform)

        def fail(attempt: Attempt) -> None:
            if attempt.number == 0:
                raise TransientError("busy")

        once.run(fail)
        waits.add(clock.waits[0])
    assert len(waits) == 20
