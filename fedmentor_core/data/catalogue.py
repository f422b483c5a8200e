"""The public corpora that ``fetch`` may download: every file with its source, commit, size and sha256."""

import difflib
import json
from functools import lru_cache
from importlib import resources

from pydantic import BaseModel, ConfigDict, Field

from fedmentor_core.errors import ConfigError

RAW_URL = "https://raw.githubusercontent.com/{repo}/{commit}/{path}"
"""Where a file of a public repository is at a commit."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CatalogueFile(_Frozen):
    """One file, pinned."""

    file: str = Field(pattern=r"^[a-z_]+/[A-Za-z0-9_]+\.csv$", description="Place below data.root.")
    repo: str = Field(pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$", description="Source repository, owner/name.")
    commit: str = Field(pattern=r"^[0-9a-f]{40}$", description="Commit the bytes were taken from.")
    path: str = Field(min_length=1, description="Path inside the repository.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Digest of the bytes.")
    n_bytes: int = Field(gt=0, description="Size in bytes.")
    n_rows: int = Field(gt=0, description="Rows, without the header.")


class CatalogueEntry(_Frozen):
    """One corpus."""

    name: str
    title: str = Field(description="What it is, in one line.")
    licences: dict[str, str] = Field(description="Licence as stated, by source repository.")
    files: tuple[CatalogueFile, ...]

    @property
    def n_bytes(self) -> int:
        """Size of all its files in bytes."""
        return sum(file.n_bytes for file in self.files)


@lru_cache(maxsize=1)
def catalogue() -> dict[str, CatalogueEntry]:
    """All known corpora by name."""
    text = resources.files("fedmentor_core.data").joinpath("catalogue.json").read_text(encoding="utf-8")
    entries = [CatalogueEntry.model_validate(entry) for entry in json.loads(text)["corpora"]]
    return {entry.name: entry for entry in entries}


def find_corpus(name: str) -> CatalogueEntry:
    """One corpus by name.

    Raises:
        ConfigError: the name is not in the catalogue.
    """
    known = catalogue()
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name.lower(), list(known), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"corpus: got {name!r}; allowed: {', '.join(sorted(known))}.{hint} Use one of these names.")
