"""An empty Prefect database, brought up to date once for each version of Prefect and copied for each study.

A study without a Prefect server of its own gets one with a new SQLite database, to which Prefect applies all changes of
its history: half of what its start takes. They are the same for everybody, so their result is kept in the cache folder
of the user. Whatever goes wrong here, Prefect makes the database itself, as it would without us.
"""

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
from contextlib import closing, suppress
from importlib.metadata import version
from pathlib import Path

CACHE_VARIABLE = "FEDMENTOR_CACHE_DIR"
_OTHER_DATABASE = (
    "PREFECT_API_URL",
    "PREFECT_API_DATABASE_CONNECTION_URL",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL",
    "PREFECT_API_DATABASE_DRIVER",
    "PREFECT_SERVER_DATABASE_DRIVER",
)
_LIMIT_SECONDS = 180.0
_FAILURES = (OSError, RuntimeError, subprocess.SubprocessError, sqlite3.Error)  # RuntimeError: there is no home


def provide_database() -> bool:
    """Put an up-to-date, empty database into this process's Prefect home, where that is what Prefect will use.

    Returns:
        Whether it was put there; see ``put_database``. False too where the environment names a server or another
        database, or no home.
    """
    home = os.environ.get("PREFECT_HOME")
    if not home or any(name in os.environ for name in _OTHER_DATABASE):
        return False
    return put_database(Path(home))


def put_database(home: Path) -> bool:
    """Put an up-to-date, empty database into a folder that has none.

    The first call for a version of Prefect makes it, in about ten seconds; later ones copy a megabyte.

    Args:
        home: a Prefect home; made where it is missing.

    Returns:
        Whether it was put there. False where there is one, and where it could not be made or kept.
    """
    target = home / "prefect.db"
    if target.exists():
        return False
    with suppress(*_FAILURES):
        template = kept_database()
        home.mkdir(parents=True, exist_ok=True)
        return _put(template, target)
    return False


def kept_database() -> Path:
    """The database that is copied, made where there is none, or none that only the user can have written.

    Raises:
        OSError, RuntimeError, subprocess.SubprocessError, sqlite3.Error: it could not be made or kept.
    """
    template = cache_folder() / f"prefect-{version('prefect')}.db"
    if not (_is_ours(template) and _is_migrated(template)):
        _make(template)
    return template


def cache_folder() -> Path:
    """Where what can be made again is kept: ``FEDMENTOR_CACHE_DIR``, else a folder in the user's cache."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "fedmentor"


def _make(template: Path) -> None:
    template.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=template.parent) as home:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        subprocess.run(
            [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"],
            env=inherited | {"PREFECT_HOME": home, "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"},
            cwd=home,  # no settings file of the folder that we are in: a database of the user's is not ours to change
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_LIMIT_SECONDS,
            check=True,
        )
        made = Path(home) / "prefect.db"
        with closing(sqlite3.connect(made)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # all of it in the one file
        if not _is_migrated(made):
            raise OSError("Prefect made no database where it was told to")
        os.chmod(made, 0o600)
        os.replace(made, template)


def _is_ours(path: Path) -> bool:
    """Whether nobody else can have written it: Prefect would carry out what it holds, such as an automation."""
    if not path.is_file():
        return False
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_migrated(path: Path) -> bool:
    """Whether this is a whole database with Prefect's mark of what was applied."""
    try:
        with closing(sqlite3.connect(path)) as connection:
            marked = connection.execute("SELECT COUNT(*) FROM alembic_version").fetchone()[0]
            return bool(marked == 1 and connection.execute("PRAGMA quick_check").fetchone()[0] == "ok")
    except sqlite3.Error:
        return False


def _put(template: Path, target: Path) -> bool:
    """Copy, complete or not at all, and never over a database that came meanwhile."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix="prefect.db.")
    os.close(handle)
    try:
        shutil.copyfile(template, name)
        os.link(name, target)
    except FileExistsError:
        return False
    finally:
        os.unlink(name)
    return True


if __name__ == "__main__":  # 'make install': so that the first study does not wait for it either
    with suppress(*_FAILURES):
        kept_database()
