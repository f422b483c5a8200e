"""Reading tables from disk: paths, encodings and shapes, with errors that name file, line and column only."""

import csv
import difflib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fedmentor_core.errors import ConfigError, DataError

Record = dict[str, str]


def resolve(root: str | None, name: str, *, need_root: bool = False) -> Path:
    """The path of a data file: relative names start at ``data.root``.

    Raises:
        ConfigError: a root is needed and not set, or is not a folder.
        DataError: the file does not exist.
    """
    path = Path(name).expanduser()
    if not path.is_absolute():
        if root is None and need_root:
            raise ConfigError(
                "data.root is not set; this source reads its files below it. Allowed: the folder that holds "
                "dreaddit/, irf/ and multiwd/. Set it with --set data.root=FOLDER, or fetch a corpus with "
                "'fedmentor data fetch NAME'."
            )
        if root is not None:
            folder = Path(root).expanduser()
            if not folder.is_dir():
                raise ConfigError(
                    f"data.root: got {root!r}, which is not a folder. Allowed: an existing folder."
                    f"{_close_names(folder)} Correct data.root."
                )
            path = folder / path
    if not path.exists():
        raise DataError(
            f"data file {str(path)!r} does not exist.{_close_names(path)} Correct the path, or fetch a "
            "public corpus with 'fedmentor data fetch NAME'."
        )
    if not path.is_file():
        raise DataError(f"data file {str(path)!r} is not a file. Allowed: one CSV or JSONL file. Correct the path.")
    return path


def _close_names(path: Path) -> str:
    """A sentence with existing names that resemble the first missing part of a path, or nothing."""
    while not path.parent.is_dir() and path.parent != path:
        path = path.parent
    try:
        present = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        return ""
    lowered = {name.lower(): name for name in present}
    close = difflib.get_close_matches(path.name.lower(), list(lowered), n=3, cutoff=0.5)
    if close:
        return f" Close names in {str(path.parent)!r}: {', '.join(lowered[name] for name in close)}."
    return f" Nothing in {str(path.parent)!r} has a similar name ({len(present)} entries)."


def read_text(path: Path) -> str:
    """The whole file as text; UTF-8 with or without a byte order mark.

    Raises:
        DataError: not readable, empty, or not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the file's permissions.") from None
    if not content.strip():
        raise DataError(f"{path}: got an empty file ({len(content)} bytes); allowed: at least one row of data.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: not UTF-8: the byte at offset {error.start} (line {line}, which is row {line - 1} "
            "after the header where no field spans lines) does not decode. Allowed: UTF-8. Save the file as "
            "UTF-8, for instance with 'iconv -f WINDOWS-1252 -t UTF-8'."
        ) from None


def read_csv(path: Path) -> tuple[list[str], list[Record]]:
    """Columns and rows of a comma-separated file with a header; every value stays a string.

    Raises:
        DataError: empty, not UTF-8, broken quoting, or a row with another number of fields than the header.
    """
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    rows: list[Record] = []
    columns: list[str] = []
    try:
        for fields in reader:
            if not fields:
                continue
            if not columns:
                columns = [name.strip() for name in fields]
                if len(set(columns)) < len(columns):
                    raise DataError(f"{path}: the header names a column twice. Rename one of the two columns.")
                continue
            if len(fields) != len(columns):
                raise DataError(
                    f"{path}: row {len(rows) + 1} (line {reader.line_num}) has {len(fields)} fields; "
                    f"allowed: {len(columns)}, as in the header. Quote fields that hold commas."
                )
            rows.append(dict(zip(columns, fields, strict=True)))
    except csv.Error as error:
        raise DataError(
            f"{path}: broken CSV near row {len(rows) + 1} (line {reader.line_num}): {error}. Write the file "
            "with fields quoted and quotes doubled."
        ) from None
    if not rows:
        raise DataError(f"{path}: got a header and no rows; allowed: at least one row of data.")
    return columns, rows


def read_jsonl(path: Path) -> tuple[list[str], list[Record]]:
    """Columns and rows of a file with one JSON object per line.

    Raises:
        DataError: empty, not UTF-8, or a line that is not a JSON object.
    """
    objects: list[dict[str, Any]] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise DataError(f"{path}: line {number} is not a JSON object. Allowed: one object per line (JSONL).")
        objects.append(value)
    return as_records(objects)


def as_records(objects: Iterable[dict[str, Any]]) -> tuple[list[str], list[Record]]:
    """Columns in order of appearance, and rows with every value as a string (None and missing: empty)."""
    listed = list(objects)
    columns = list(dict.fromkeys(str(name) for item in listed for name in item))
    return columns, [{name: _as_text(item.get(name)) for name in columns} for item in listed]


def _as_text(value: Any) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) else str(value)


def require_columns(where: str, present: Sequence[str], wanted: dict[str, str | None]) -> None:
    """Check that every column a mapping names exists; ``wanted`` is setting -> column (None: not set).

    Raises:
        DataError: naming the setting, the column it names, and the columns that exist.
    """
    named = [column for column in wanted.values() if column is not None]
    is_header = any(column in present or difflib.get_close_matches(column, present, cutoff=0.7) for column in named)
    for setting, column in wanted.items():
        if column is None or column in present:
            continue
        close = difflib.get_close_matches(column, present, n=1, cutoff=0.5) if is_header else []
        listed = ", ".join(repr(name) for name in present[:30]) + (", ..." if len(present) > 30 else "")
        if not is_header:  # then the first line may well be a row of private text
            listed = (
                f"one of the {len(present)} columns, not shown as none is like a mapped one (is the header missing?)"
            )
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise DataError(
            f"{where}: {setting} names the column {column!r}, which does not exist. Allowed: {listed}.{hint} "
            f"Correct {setting}."
        )
