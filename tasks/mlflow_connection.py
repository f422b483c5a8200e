"""A connection to MLflow: which addresses can be one, how long a server may keep a study waiting, and what went wrong.

A server that does not answer is something else than one that refuses. The first comes back, so a study goes on and its
tracking catches up; the second needs a person, so it is an error. ``no_answer`` tells them apart.
"""

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from fedmentor_core.errors import ConfigError, FedMentorError

if TYPE_CHECKING:
    from mlflow import MlflowClient

PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds; MLflow's own default is 120
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # MLflow's 7 take minutes to give up
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
"""How long one request may take unless the environment says otherwise: about a minute to a server that swallows it, a
few seconds to one that is not there."""

_NOT_NOW = (408, 429)
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "DO_NOT_TRACK": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",  # a uv.lock in the working folder is none of ours
}


class TrackingError(FedMentorError):
    """MLflow does not answer, where nothing can be done without it."""


def mlflow_client(tracking_uri: str, *, must_exist: bool = False) -> "MlflowClient":
    """Return a client for ``tracking_uri``, with MLflow's telemetry and start-up chatter switched off.

    Args:
        tracking_uri: ``sqlite:////absolute/file.db``, another database URI, or an ``http(s)://`` server.
        must_exist: Refuse a sqlite file that is not there, rather than creating an empty database.

    Raises:
        ConfigError: the URI cannot be a tracking store.
    """
    _check_uri(tracking_uri, must_exist=must_exist)
    for name, value in (PATIENCE | _SETTINGS).items():
        os.environ.setdefault(name, value)
    for logger in ("alembic", "mlflow.store", "mlflow.tracking", "mlflow.models", "mlflow.pyfunc"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    from mlflow import MlflowClient

    try:
        return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)  # opens a database at once
    except Exception as error:
        raise unusable(tracking_uri, error) from error


def unusable(tracking_uri: str, error: BaseException) -> ConfigError:
    """The error for a tracking store that refused."""
    return ConfigError(
        f"MLflow at {redact(tracking_uri)} cannot be used: {first_line(error)}. "
        "Check the tracking URI, or run with --set tracking.enabled=false."
    )


def no_answer(error: BaseException | None) -> bool:
    """Whether ``error``, or what caused it, says that MLflow was not reached or could not cope just now."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError

    while error is not None:
        if isinstance(error, MlflowException):
            status = error.get_http_status_code()
            return status >= 500 or status in _NOT_NOW
        if isinstance(error, OSError | OperationalError):  # what requests raises is an OSError too
            return True
        error = error.__cause__
    return False


def sqlite_path(tracking_uri: str) -> Path | None:
    """The file behind a sqlite URI; None for any other store."""
    prefix = "sqlite:///"
    return Path(tracking_uri.removeprefix(prefix)) if tracking_uri.startswith(prefix) else None


def _check_uri(tracking_uri: str, *, must_exist: bool) -> None:
    if not re.match(r"^(https?|sqlite|postgresql|mysql|mssql)(\+\w+)?:", tracking_uri):
        raise ConfigError(
            f"tracking.uri {redact(tracking_uri)!r} is not supported: MLflow 3 has no plain-folder store. "
            "Give sqlite:////absolute/path/mlflow.db, another database, or http(s)://server."
        )
    path = sqlite_path(tracking_uri)
    if path is not None and must_exist and not path.is_file():
        raise ConfigError(
            f"no MLflow database at {path}. Give --tracking-uri of the study that registered the model, "
            "as printed at the end of 'fedmentor run'."
        )


def redact(url: str) -> str:
    """``url`` without user name and password."""
    parts = urlsplit(url)
    if "@" not in parts.netloc:
        return url
    return urlunsplit(parts._replace(netloc="***@" + parts.netloc.rpartition("@")[2]))


def quoted(value: str) -> str:
    """``value`` as a string literal of MLflow's search language."""
    if "'" in value:
        raise ConfigError(f"an id or name used in MLflow must not hold a single quote, got {value!r}.")
    return f"'{value}'"


def cut(text: str, limit: int) -> str:
    """``text``, or its beginning and dots where it is longer than ``limit`` characters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def first_line(error: BaseException) -> str:
    """Class and first line of ``error``, short enough for a message, without credentials."""
    line = (str(error).strip().splitlines() or [""])[0]
    line = re.sub(r"//[^/@\s]+@", "//***@", line)
    return f"{type(error).__name__}: {cut(line, 300)}".rstrip(".")
