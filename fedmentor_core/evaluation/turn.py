"""Turns at the model that evaluates: the next set is written while the scorers still read the last one's outputs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock


@contextmanager
def turn(lock: Lock) -> Iterator[Callable[[], None]]:
    """Have the model that ``lock`` guards; yields what to call when it has written all that is to be scored.

    From then on, at the latest when the block ends, another thread has its turn. Both times GPU memory is handed back:
    of the model's keys and values, then of what the scorers used.
    """
    try:
        with ExitStack() as held:
            held.enter_context(lock)
            held.callback(hand_back_memory)
            yield held.close
    finally:
        hand_back_memory()


def hand_back_memory() -> None:
    """Return GPU memory that torch holds in reserve, for other processes; what is loaded stays. Nothing on a CPU."""
    import torch

    torch.cuda.empty_cache()
