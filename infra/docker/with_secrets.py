#!/usr/bin/env python3
"""Entry point of the images: put secrets that lie in files into the environment of one process, and become it.

``SECRET_FILE_NAME=/run/secrets/x`` makes ``NAME`` hold the content of that file. Prefect and MLflow read some secrets
from the environment only; so the compose file, ``docker inspect`` and the image never hold them.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

PREFIX = "SECRET_FILE_"


def with_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with each named file's content in place of its name.

    Raises:
        SystemExit: a file cannot be read or is empty. The message names the variable and the path, nothing else.
    """
    found = {name: value for name, value in environment.items() if not name.startswith(PREFIX)}
    for name, path in environment.items():
        if name.startswith(PREFIX):
            try:
                value = Path(path).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise SystemExit(f"with-secrets: {name}: cannot read {path} ({type(error).__name__}).") from None
            if not value:
                raise SystemExit(f"with-secrets: {name}: {path} is empty. Run infra/compose/make_secrets.py.")
            found[name.removeprefix(PREFIX)] = value
    return found


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("with-secrets: give the command to run.")
    made = with_secrets(os.environ)
    try:
        os.execvpe(sys.argv[1], sys.argv[1:], made)
    except OSError as error:
        raise SystemExit(f"with-secrets: cannot run {sys.argv[1]} ({error.strerror}).") from None
