"""Small helpers that the scorers share: quiet loading, digests, blank texts, causes of a failed load."""

import contextlib
import hashlib
import logging
import threading
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedmentor_core.errors import BackboneError


class _Hush:
    """Silences the model libraries while at least one thread asks for it; the last to leave restores."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._restore = contextlib.ExitStack()

    def enter(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._silence()

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._restore.close()

    def _silence(self) -> None:
        import transformers.utils.logging

        library: Any = transformers.utils.logging
        self._restore.callback(library.set_verbosity, library.get_verbosity())
        if library.is_progress_bar_enabled():
            self._restore.callback(library.enable_progress_bar)
        hub = logging.getLogger("huggingface_hub")
        self._restore.callback(hub.setLevel, hub.level)
        self._restore.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        library.set_verbosity_error()
        library.disable_progress_bar()
        hub.setLevel(logging.ERROR)


_hush = _Hush()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars, load reports and warnings of the model libraries; errors still raise."""
    _hush.enter()
    try:
        yield
    finally:
        _hush.leave()


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_weights(section: str, name: str, found: str, wanted: str | None) -> None:
    """Refuse a scorer whose weights are not the ones that were asked for: its scores could not be compared.

    Raises:
        BackboneError: another digest.
    """
    if wanted is not None and found != wanted:
        raise BackboneError(
            f"{section}.sha256: the weights of {name!r} have another digest; got {found}; allowed {wanted}; get that "
            "file, or correct the digest"
        )


def offline_hint(error: BaseException) -> str:
    """A short cause for a failed load: the first line of the library's message, at most 160 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else "no message"
    return f"{type(error).__name__}: {first[:160]}"


def is_blank(text: str) -> bool:
    """Whether a text has no visible character: models crash on such a text, or score their own padding."""
    return all(unicodedata.category(character)[0] in "ZC" for character in text)
