"""Reading a file that only its owner may read: keys, and nothing else."""

import os
import stat
from pathlib import Path

from fedmentor_core.errors import ConfigError


def read_secret_file(path: Path, what: str, how: str) -> str:
    """The file's text; characters that are not ASCII become the replacement character.

    Args:
        path: the file.
        what: its name in messages, such as 'signing key'.
        how: how to make one, for a message.

    Raises:
        ConfigError: the file is missing, cannot be read, or is open to others. Never quotes it.
    """
    try:
        with path.open("rb") as handle:
            mode = stat.S_IMODE(os.fstat(handle.fileno()).st_mode)
            if mode & 0o077:
                raise ConfigError(
                    f"{what} {path} has mode {mode:04o}, so that others can use it; allowed: 0600 or 0400. Run chmod "
                    "600 on it, and think of a new key."
                )
            return handle.read().decode("ascii", errors="replace")
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}. {how}") from None
