"""Search every byte below a folder for texts, token ids and numbers that must not be there, in many disguises."""

import base64
import html
import io
import itertools
import json
import re
import shutil
import sqlite3
import tempfile
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

KEY = 8  # bytes of a pattern by which candidates are found before they are compared whole
_MAX_DEPTH = 4


def text_patterns(secret: str) -> set[bytes]:
    """``secret`` (letters) as UTF-8, UTF-16, base64 at any alignment, hex, percent-quoted and JSON-escaped bytes."""
    found = {secret.encode(), secret.encode("utf-16-le"), secret.encode("utf-16-be")}
    for raw in tuple(found):
        found |= {raw.hex().encode(), raw.hex().upper().encode(), *_base64_cores(raw)}
    found.add("".join(f"%{byte:02x}" for byte in secret.encode()).encode())
    found.add("".join(f"%{byte:02X}" for byte in secret.encode()).encode())
    found.add("".join(f"\\u{ord(letter):04x}" for letter in secret).encode())
    found |= {json.dumps(secret)[1:-1].encode(), urllib.parse.quote(secret).encode(), html.escape(secret).encode()}
    return found


def _base64_cores(raw: bytes) -> Iterator[bytes]:
    """What of the base64 of any text around ``raw`` depends on ``raw`` alone, for its three alignments."""
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + raw)
        start = -(-before * 8 // 6)
        core = encoded[start : (before + len(raw)) * 8 // 6]
        yield core
        yield core.replace(b"+", b"-").replace(b"/", b"_")


def token_patterns(ids: Sequence[int]) -> set[bytes]:
    """A few consecutive token ids as JSON (two spacings), and packed as int16, int32 and int64 of both byte orders."""
    found = {", ".join(map(str, ids)).encode(), ",".join(map(str, ids)).encode(), " ".join(map(str, ids)).encode()}
    for size in (2, 4, 8):
        for order in "<>":
            found.add(np.asarray(ids, dtype=f"{order}i{size}").tobytes())
    return found


def number_patterns(values: Sequence[float]) -> set[bytes]:
    """Neighbouring values of a list packed as float32 (a lone one of 4 bytes would be met by chance) and float64."""
    values = [value for value in values if _telling(value)]
    found: set[bytes] = set()
    for order in "<>":
        found |= {np.asarray([value], dtype=f"{order}f8").tobytes() for value in values}
        found |= {np.asarray(pair, dtype=f"{order}f4").tobytes() for pair in itertools.pairwise(values)}
    return found


_DECIMAL = re.compile(rb"(?<![\d.])-?\d+\.\d+(?:[eE][-+]?\d+)?")


class Search:
    """What must not be found: byte patterns, and numbers in decimal form."""

    def __init__(self, patterns: Mapping[str, Iterable[bytes]], numbers: Iterable[float] = ()) -> None:
        """``patterns``: what each is called in a finding -> its disguises, at least ``KEY`` bytes each."""
        self._names = {pattern: name for name, disguises in patterns.items() for pattern in disguises}
        short = [pattern for pattern in self._names if len(pattern) < KEY]
        assert not short, f"patterns too short to be told from chance: {short[:3]}"
        self._by_key: dict[int, list[tuple[int, bytes]]] = {}
        for pattern in self._names:
            place = (len(pattern) - KEY) // 2
            key = int.from_bytes(pattern[place : place + KEY], "little")
            self._by_key.setdefault(key, []).append((place, pattern))
        self._keys = np.array(sorted(self._by_key), dtype=np.uint64)
        self._numbers = {f"{abs(value):.{digits}g}" for value in numbers for digits in (6, 8) if _telling(value)}

    def in_folder(self, folder: Path) -> list[str]:
        """Findings in all files below ``folder``, in their names, in what they pack, and in every database cell."""
        found = []
        for path in sorted(folder.rglob("*")):
            where = path.relative_to(folder).as_posix()
            found += self.in_bytes(where.encode(), f"the name of {where}")
            if path.is_file():
                data = path.read_bytes()
                found += self.in_packed(data, where)
                if data.startswith(b"SQLite format 3\0"):
                    for table, cells in database_cells(path):
                        found += self.in_packed(cells, f"{where}, table {table}")
        return sorted(set(found))

    def in_packed(self, data: bytes, where: str, depth: int = 0) -> list[str]:
        """Findings in ``data``, in it without line breaks, and in what it holds in compressed form."""
        found = self.in_bytes(data, where)
        if b"\n" in data and b"\0" not in data[:4096]:
            found += self.in_bytes(re.sub(rb"[ \r\t]*\n[ \t]*", b"", data), f"{where}, lines joined")
        if depth < _MAX_DEPTH:
            for name, inner in unpacked(data):
                found += self.in_packed(inner, f"{where}, {name}", depth + 1)
        return found

    def in_bytes(self, data: bytes, where: str) -> list[str]:
        """Findings in ``data`` as it is."""
        found = set()
        for shift in range(min(KEY, len(data) - KEY + 1) if len(self._keys) else 0):
            words = np.frombuffer(data, dtype="<u8", count=(len(data) - shift) // KEY, offset=shift)
            places = np.minimum(np.searchsorted(self._keys, words), len(self._keys) - 1)
            for index in np.flatnonzero(self._keys[places] == words):
                at = shift + int(index) * KEY
                for place, pattern in self._by_key[int(words[index])]:
                    if data[max(0, at - place) : at - place + len(pattern)] == pattern:
                        found.add(f"{self._names[pattern]} in {where}")
        if self._numbers:
            found |= {f"number {text} in {where}" for text in _decimals(data) if text in self._numbers}
        return sorted(found)


def _telling(value: float) -> bool:
    """Whether a number has digits enough that it cannot be met by chance."""
    return len(re.sub(r"e.*|\D", "", f"{value:.6g}").lstrip("0")) == 6


def _decimals(data: bytes) -> Iterator[str]:
    """Decimal numbers at the precision to compare at: six digits as they stand, more than seven at eight."""
    for match in set(_DECIMAL.findall(data)):
        digits = len(re.sub(rb"[eE].*|\D", b"", match).lstrip(b"0"))
        if digits == 6:
            yield f"{abs(float(match)):.6g}"
        elif digits >= 8:
            yield f"{abs(float(match)):.8g}"


def unpacked(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Members of a zip, and gzip and zlib streams wherever in ``data`` one begins."""
    if data[:4] == b"PK\3\4":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                yield f"zip member {member}", archive.read(member)
        return
    view = memoryview(data)
    for match in re.finditer(rb"\x1f\x8b\x08|\x78[\x01\x5e\x9c\xda]", data):
        is_gzip = match.group().startswith(b"\x1f")
        stream = zlib.decompressobj(wbits=31 if is_gzip else 15)
        try:
            inner = stream.decompress(view[match.start() :], 1 << 26)
        except zlib.error:
            continue
        if inner:
            yield f"{'gzip' if is_gzip else 'zlib'} stream at byte {match.start()}", inner


def database_cells(path: Path) -> Iterator[tuple[str, bytes]]:
    """All cells of each table: a raw search misses a value that is split over pages, or still in the write-ahead log."""
    with tempfile.TemporaryDirectory() as folder:
        for suffix in ("", "-wal"):
            source = path.with_name(path.name + suffix)
            if source.is_file():
                shutil.copyfile(source, Path(folder) / f"copy.db{suffix}")
        connection = sqlite3.connect(Path(folder) / "copy.db")
        connection.text_factory = bytes
        try:
            tables = [
                row[0].decode() for row in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")
            ]
            for table in tables:
                rows = connection.execute(f'SELECT * FROM "{table}"')
                cells = (cell if isinstance(cell, bytes) else str(cell).encode() for row in rows for cell in row)
                yield table, b"\n\0".join(cells)
        finally:
            connection.close()
