"""Where tasks send progress in this process; a remote worker has no listener and stays silent."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fedmentor_core.errors import FedMentorError
from fedmentor_core.progress import Listener, ProgressEvent, silent

_listener: Listener = silent
_stop = threading.Event()


class InterruptedByUserError(FedMentorError):
    """The user pressed ctrl-C; the running client stops at its next step."""


def stop_at_next_step() -> None:
    """Make every task of this process stop at its next report of progress."""
    _stop.set()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Send progress to ``listener`` while the block runs."""
    global _listener
    previous, _listener = _listener, listener
    _stop.clear()
    try:
        yield
    finally:
        _listener = previous


def tell(event: ProgressEvent) -> None:
    """Report progress.

    Raises:
        InterruptedByUserError: after ``stop_at_next_step``.
    """
    if _stop.is_set():
        raise InterruptedByUserError("interrupted. Run the same command again to resume.")
    _listener(event)
