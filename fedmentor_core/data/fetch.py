"""Download of a public corpus, file by file, by pinned commit; only bytes with the listed sha256 are kept."""

import hashlib
import http.client
import os
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedmentor_core.data.catalogue import RAW_URL, CatalogueFile, find_corpus
from fedmentor_core.errors import ConfigError, DataError

_BLOCK = 64 * 1024

Progress = Callable[[str, int, int], None]
"""Called with (file, bytes so far, bytes in all) while a file arrives."""


@dataclass(frozen=True, slots=True)
class FetchReport:
    """What a fetch did."""

    name: str
    folder: Path
    fetched: tuple[str, ...]
    already_right: tuple[str, ...]


def fetch(
    name: str,
    destination: str | os.PathLike[str],
    *,
    base_url: str = RAW_URL,
    progress: Progress | None = None,
    timeout_seconds: float = 30.0,
    attempts: int = 3,
    backoff_seconds: float = 1.0,
) -> FetchReport:
    """Download one corpus of the catalogue.

    Guarantees: a file appears under its name only whole and with the sha256 of the catalogue; files that are
    there and right are not downloaded again; a file that is there and differs is left alone and refused.

    Args:
        name: A name of the catalogue.
        destination: The folder that becomes ``data.root``.
        base_url: URL template with ``{repo}``, ``{commit}`` and ``{path}``, or the start of one (a mirror).
        progress: Called while bytes arrive.
        timeout_seconds: Longest silence of the server.
        attempts: Tries per file; a refused digest, size or name is not tried again.
        backoff_seconds: Wait before the second try, doubled each time.

    Raises:
        ConfigError: unknown corpus, or a URL that is not http or https.
        DataError: a file cannot be had, is not what the catalogue lists, or another file is in its place.
    """
    entry = find_corpus(name)
    folder = Path(destination).expanduser()
    template = _template(base_url)
    fetched, right = [], []
    for file in entry.files:
        target = folder / file.file
        if target.exists():
            if not target.is_file() or _sha256(target) != file.sha256:
                raise DataError(
                    f"{target}: already there, with other content than the catalogue lists. Allowed: no "
                    f"file, or the file with sha256 {file.sha256}. Move it away, or fetch into another "
                    "folder."
                )
            right.append(file.file)
            continue
        url = template.format(repo=file.repo, commit=file.commit, path=urllib.parse.quote(file.path))
        _fetch_file(url, file, target, progress, timeout_seconds, max(1, attempts), backoff_seconds)
        fetched.append(file.file)
    return FetchReport(name, folder, tuple(fetched), tuple(right))


def _template(base_url: str) -> str:
    if urllib.parse.urlsplit(base_url).scheme not in ("http", "https"):
        raise ConfigError(f"base_url: got {base_url!r}; allowed: a http or https URL. Correct base_url.")
    return base_url if "{path}" in base_url else base_url.rstrip("/") + "/{repo}/{commit}/{path}"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fetch_file(
    url: str,
    file: CatalogueFile,
    target: Path,
    progress: Progress | None,
    timeout_seconds: float,
    attempts: int,
    backoff_seconds: float,
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(attempts):
        if attempt:
            time.sleep(backoff_seconds * 2 ** (attempt - 1))
        handle, partial = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                digest, n_bytes = _download(url, file, stream.write, progress, timeout_seconds)
                stream.flush()
                os.fsync(stream.fileno())
            if n_bytes < file.n_bytes:
                problem = f"got {n_bytes:,} of {file.n_bytes:,} bytes"
                continue
            if digest != file.sha256:
                raise DataError(
                    f"{url}: got sha256 {digest}; allowed: {file.sha256} ({file.n_bytes:,} bytes). Nothing "
                    "was kept. The source or the connection changed the file: do not use it; try another "
                    "mirror."
                )
            os.chmod(partial, 0o644)
            os.replace(partial, target)
            return
        except urllib.error.HTTPError as error:
            problem = f"the server answered {error.code}"
            if error.code < 500 and error.code not in (408, 429):
                break
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            problem = f"{type(error).__name__}: {reason}"
        finally:
            Path(partial).unlink(missing_ok=True)
    raise DataError(
        f"{url}: could not be fetched ({problem}; {attempt + 1} of {attempts} tries). Nothing was kept of "
        "it. Check the network, or name a mirror with base_url; the files that did arrive are not fetched "
        "again."
    )


def _download(
    url: str, file: CatalogueFile, write: Callable[[bytes], object], progress: Progress | None, timeout: float
) -> tuple[str, int]:
    digest, n_bytes = hashlib.sha256(), 0
    request = urllib.request.Request(url, headers={"User-Agent": "fedmentor"})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        while block := response.read(_BLOCK):
            n_bytes += len(block)
            if n_bytes > file.n_bytes:
                raise DataError(
                    f"{url}: got more than the {file.n_bytes:,} bytes that are listed. Nothing was kept. "
                    "The source changed the file: do not use it; try another mirror."
                )
            digest.update(block)
            write(block)
            if progress is not None:
                progress(file.file, n_bytes, file.n_bytes)
    return digest.hexdigest(), n_bytes
