"""Updates on disk while they are joined, so that one tensor of every client can be read without the rest.

A rule that must see all clients' values of a coordinate together would otherwise hold every update in memory. Each file
is fetched once, verified on its way, and removed when the round's join is over.
"""

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Fetch = Callable[[Path], None]
ReadSome = Callable[[str, Collection[str]], Mapping[str, Any]]


@contextmanager
def spooled(fetch_by_client: Mapping[str, Fetch]) -> Iterator[ReadSome]:
    """A reader of single tensors of clients' updates.

    Args:
        fetch_by_client: writes a client's verified safetensors file to a path; called when it is first read.
    """
    from safetensors import safe_open

    with tempfile.TemporaryDirectory(prefix="fedmentor-join-") as folder:
        paths: dict[str, Path] = {}

        def read_some(client: str, names: Collection[str]) -> Mapping[str, Any]:
            if client not in paths:
                path = Path(folder) / f"{len(paths)}.safetensors"
                fetch_by_client[client](path)
                paths[client] = path
            with safe_open(paths[client], "pt") as opened:
                return {name: opened.get_tensor(name) for name in names}

        yield read_some
