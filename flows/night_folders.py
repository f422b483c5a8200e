"""The folders of a nightly study: one a night, in order, and only one night at a time."""

import fcntl
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from fedmentor_core.errors import ConfigError
from fedmentor_core.nights import NightReport
from fedmentor_core.study_ref import MARKER
from flows.outputs import write_text

REPORT_FILE = "night.json"
_NIGHT = re.compile(r"(\d{4}-\d{2}-\d{2})-(\d+)")


@contextmanager
def only_one_night(root: Path) -> Iterator[None]:
    """Hold the nightly study's folder; the lock ends with the process, however that ends.

    Raises:
        ConfigError: another night is running here.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"a night of {root} is running already. Wait for it, or give another --out.") from None
        yield


def nights(root: Path) -> list[Path]:
    """All nights' folders, oldest first."""
    found = [(match[1], int(match[2]), path) for path in root.iterdir() if (match := _NIGHT.fullmatch(path.name))]
    return [path for _, _, path in sorted(found)]


def unfinished_night(root: Path) -> Path | None:
    """The last night, where it began a study and left no report: a crash cut it short."""
    last = next(reversed(nights(root)), None)
    begun = last is not None and (last / MARKER).is_file() and not (last / REPORT_FILE).is_file()
    return last if begun else None


def next_night(root: Path) -> Path:
    """Tonight's folder: today's date, and the next number after all nights so far. Not made yet."""
    last = max((int(match[2]) for path in root.iterdir() if (match := _NIGHT.fullmatch(path.name))), default=0)
    return root / f"{datetime.now().astimezone():%Y-%m-%d}-{last + 1}"


def write_report(folder: Path, report: NightReport) -> NightReport:
    """Write ``night.json``: where it is, the night is over."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / REPORT_FILE, report.model_dump_json(indent=2) + "\n")
    return report
