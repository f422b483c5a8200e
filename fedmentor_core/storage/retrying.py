"""Trying again: exponential back-off with full jitter, until one total deadline."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


class TransientError(Exception):
    """A failure that may pass by itself. ``str(error)`` is a short reason without any server's own words."""


class GaveUpError(Exception):
    """The deadline passed. ``reason`` is the last failure's."""

    def __init__(self, reason: str, attempts: int, seconds: float) -> None:
        """What happened last, how often it was tried, and for how long."""
        super().__init__(reason)
        self.reason, self.attempts, self.seconds = reason, attempts, seconds


@dataclass
class Attempt:
    """One of the attempts at an operation. ``number`` counts from 0: above 0, an earlier one may have worked."""

    number: int
    ends_at: float
    clock: Callable[[], float]

    def check(self) -> None:
        """For long attempts, between two steps.

        Raises:
            TransientError: the deadline has passed.
        """
        if self.clock() > self.ends_at:
            raise TransientError("too slow")


@dataclass(frozen=True)
class Patience:
    """How long and how often to try. No attempt begins after ``deadline_seconds``.

    Waits before attempt k are uniform on (0, min(``longest_wait_seconds``, ``first_wait_seconds`` * 2**k)): clients
    that failed together do not come back together.
    """

    deadline_seconds: float
    first_wait_seconds: float = 0.1
    longest_wait_seconds: float = 10.0
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    uniform: Callable[[float, float], float] = field(default=random.uniform, repr=False)

    def run(self, operation: Callable[[Attempt], T]) -> T:
        """``operation``'s result, tried again after every TransientError.

        Raises:
            GaveUpError: the deadline passed.
            Exception: whatever else ``operation`` raises, at once.
        """
        started = self.clock()
        attempt = Attempt(0, started + self.deadline_seconds, self.clock)
        while True:
            try:
                return operation(attempt)
            except TransientError as error:
                longest = min(self.longest_wait_seconds, self.first_wait_seconds * 2.0 ** min(attempt.number, 60))
                wait = self.uniform(0.0, longest)
                attempt.number += 1
                if self.clock() + wait > attempt.ends_at:
                    raise GaveUpError(str(error), attempt.number, self.clock() - started) from error
                self.sleep(wait)
