"""Ctrl-C and TERM where a command starts processes that outlive it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruptions:
    """Raises ``KeyboardInterrupt`` on ctrl-C and TERM, but never inside ``held``: there it waits for the end.

    Without that, a process could be started and never written down.
    """

    def __init__(self) -> None:
        """Nothing is caught before ``with``."""
        self._held = 0
        self._pending = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {one: signal.signal(one, self._on_signal) for one in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for one, handler in self._previous.items():
            signal.signal(one, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold back interruptions until the end of the block."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self._pending and not self._held:
            self._pending = False
            raise KeyboardInterrupt

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if not self._held:
            raise KeyboardInterrupt
        self._pending = True
