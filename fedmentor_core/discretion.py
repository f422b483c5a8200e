"""What may be told of a failure, a warning or a library's log line at a site: where and of what kind, never its text.

A library's message may quote the data it failed on, and so may what it warns of or logs. Orchestrators store exception
texts, tracebacks and logs, and write them to places that a site does not own. So at every border of the program a
foreign text is replaced by the kind and the place of what happened; only our own errors keep their message, which by
rule names files, columns, rows and counts (``errors.py``).
"""

import functools
import logging
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from fedmentor_core.errors import FedMentorError

P = ParamSpec("P")
R = TypeVar("R")

OPEN_LOGGERS = ("fedmentor", "prefect", "mlflow", "alembic", "httpx", "httpcore", "urllib3", "botocore", "uvicorn")
"""Loggers (and what is below them) whose lines may be read: they are given nothing but what may leave a site.

Every other library's line is withheld, such as a tokenizer's that quotes the text it found too long.
"""

_log = logging.getLogger("fedmentor.discretion")
_lock = threading.Lock()
_users = 0
_restore: Callable[[], None] = lambda: None  # noqa: E731


class WithheldError(FedMentorError):
    """A failure as it may leave a site: only the kind of the exception."""


def failure_reason(error: BaseException) -> str:
    """What may be told about a failure at a site: our own messages, else only the kind (texts may quote data)."""
    return str(error) if isinstance(error, FedMentorError) else f"failed with {type(error).__name__}"


def places_of(error: BaseException) -> str:
    """Where ``error`` was raised: a traceback of files, lines and functions, without texts, values or causes."""
    frames = traceback.extract_tb(error.__traceback__, limit=-20)
    return "\n".join(f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames)


def tellable(error: Exception) -> FedMentorError:
    """``error`` as it may be stored and shown anywhere.

    Our own errors keep class and message and lose their causes, notes and traceback, through which a library's text
    would come along; anything else becomes a ``WithheldError``.
    """
    if not isinstance(error, FedMentorError):
        return WithheldError(failure_reason(error))
    error.__cause__ = error.__context__ = None
    error.__dict__.pop("__notes__", None)
    return error.with_traceback(None)


def discreet(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate what an orchestrator calls, so that it hears only what may be told.

    Guarantees:
        An exception leaves ``function`` as ``tellable``; while it runs, ``texts_withheld`` holds. Where it was raised
        goes to the log, without its text.
    """

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        with texts_withheld():
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if not isinstance(error, FedMentorError):
                    name = getattr(function, "__name__", "step")
                    _log.error("%s %s; its text is withheld\n%s", name, failure_reason(error), places_of(error))
                told = tellable(error)
        raise told  # outside the handler: the original must not come along as context

    return guarded


@contextmanager
def texts_withheld() -> Iterator[None]:
    """While the block runs, libraries' log lines and warnings carry kind and place, but no text. Nests; thread-safe.

    It works on the record, before any handler sees it: libraries bring handlers of their own.
    """
    global _users, _restore
    with _lock:
        if _users == 0:
            _restore = _withhold()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _restore()


def _withhold() -> Callable[[], None]:
    """Install both replacements; returns what takes them away again."""
    make_record, format_warning = logging.getLogRecordFactory(), warnings.formatwarning

    def withheld_record(
        name: str, level: int, path: str, line: int, msg: Any, args: Any, exc_info: Any, *rest: Any, **more: Any
    ) -> logging.LogRecord:
        if _is_open(name):
            return make_record(name, level, path, line, msg, args, exc_info, *rest, **more)
        return make_record(name, level, path, line, f"text withheld, logged at {path}:{line}", (), None)

    def withheld_warning(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        return f"{filename}:{lineno}: {category.__name__}, text withheld\n"

    def restore() -> None:
        # who replaced ours meanwhile has a reason to
        if logging.getLogRecordFactory() is withheld_record:
            logging.setLogRecordFactory(make_record)
        if warnings.formatwarning is withheld_warning:
            warnings.formatwarning = format_warning

    logging.setLogRecordFactory(withheld_record)
    warnings.formatwarning = withheld_warning
    return restore


def _is_open(logger: str) -> bool:
    if logger == "py.warnings":  # carries what ``withheld_warning`` made
        return True
    return any(logger == name or logger.startswith(f"{name}.") for name in OPEN_LOGGERS)
