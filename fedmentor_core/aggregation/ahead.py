"""One thread that reads ahead while another one works: never further than a fixed number of items."""

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
_LOOK_AGAIN_SECONDS = 0.1


@contextmanager
def read_ahead(items: Iterable[Item], limit: int) -> Iterator[Iterator[Item]]:
    """Iterate over ``items`` in a thread of its own while the block uses what is there already.

    Args:
        items: iterated by that thread alone; what it raises is raised where its next item would have come.
        limit: most items that wait. Two more exist: one that is just read and one that is just used.
    """
    waiting: queue.Queue[Item | _End] = queue.Queue(maxsize=limit)
    stop = threading.Event()

    def put(item: "Item | _End") -> bool:
        while not stop.is_set():
            try:
                waiting.put(item, timeout=_LOOK_AGAIN_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for item in items:
                if not put(item):
                    return
                del item  # not one more in memory while the next is read
            put(_End(None))
        except BaseException as error:
            put(_End(error))

    def taken() -> Iterator[Item]:
        while True:
            item = waiting.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
            del item  # nor while it is waited for

    thread = threading.Thread(target=read, name="read-ahead", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        stop.set()
        thread.join()


class _End:
    """After the last item, or in the place of the one that could not be read."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error
