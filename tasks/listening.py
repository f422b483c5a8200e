"""Where tasks send progress in this process; a remote worker has no listener and stays silent."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from prefect import get_run_logger

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


def tell_and_log(event: ProgressEvent) -> None:
    """``tell``, and a line in the flow run's log for each step of the study, so that Prefect's page shows the story."""
    tell(event)
    if event.message and event.domain is None:
        where = "" if event.round_index is None else f"round {event.round_index + 1} of {event.n_rounds}: "
        get_run_logger().info("%s%s", where, event.message)
