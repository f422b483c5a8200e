"""Public prompts that a safe model refuses, and prompts that only sound so and that it answers.

References:
    Vidgen et al. 2023, "SimpleSafetyTests" (arXiv 2311.08370): 100 prompts to refuse, in five areas of harm;
    Röttger et al. 2024, "XSTest" (arXiv 2308.01263): 200 prompts to refuse and 250 that sound alike and are safe.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from fedmentor_core.config import SafetyPromptsConfig
from fedmentor_core.data.files import read_csv, resolve
from fedmentor_core.errors import ConfigError, DataError
from fedmentor_core.hashing import canonical_sha256

_FOLDER = "safety"


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts of one source."""

    name: str
    unsafe: tuple[str, ...]
    """Requests that a safe model refuses."""
    safe: tuple[str, ...]
    """Requests that sound unsafe; to refuse one is over-refusal."""

    @property
    def sha256(self) -> str:
        """Digest of the prompts."""
        return canonical_sha256([self.unsafe, self.safe])


def read_prompt_sets(config: SafetyPromptsConfig, data_root: str | None) -> list[PromptSet]:
    """The configured sets; of each kind at most ``max_prompts``, spread evenly over its file.

    Args:
        config: ``evaluation.safety_prompts``.
        data_root: ``data.root``; the files are in its folder ``safety`` unless the section names another.

    Raises:
        ConfigError: a set needs a folder and none is named.
        DataError: a file is missing or not what it should be.
    """
    sets = []
    for name in config.kinds:
        match name:
            case "embedded":
                found = _embedded()
            case "simple_safety_tests":
                found = _simple_safety_tests(_path(config, data_root, "simple_safety_tests.csv"))
            case "xstest":
                found = _xstest(_path(config, data_root, "xstest_prompts.csv"))
        limit = config.max_prompts
        sets.append(PromptSet(name, _spread(found.unsafe, limit), _spread(found.safe, limit)))
    return sets


def _embedded() -> PromptSet:
    made = json.loads((files("fedmentor_core") / "assets" / "safety" / "prompts.json").read_text("utf-8"))
    labelled = [(one["label"], one["prompt"]) for one in made["prompts"]]
    return PromptSet("embedded", _with(labelled, "unsafe"), _with(labelled, "safe"))


def _simple_safety_tests(path: Path) -> PromptSet:
    rows = _rows(path, ("prompts_final",))
    return PromptSet("simple_safety_tests", tuple(row["prompts_final"] for row in rows), ())


def _xstest(path: Path) -> PromptSet:
    labelled = [(row["label"], row["prompt"]) for row in _rows(path, ("prompt", "label"))]
    unknown = {label for label, _ in labelled} - {"safe", "unsafe"}
    if unknown:
        raise DataError(f"{path.name}: label is {sorted(unknown)[0]!r}; allowed: safe, unsafe. Restore the file.")
    return PromptSet("xstest", _with(labelled, "unsafe"), _with(labelled, "safe"))


def _with(labelled: Sequence[tuple[str, str]], wanted: str) -> tuple[str, ...]:
    return tuple(prompt for label, prompt in labelled if label == wanted)


def _rows(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    columns, rows = read_csv(path)
    missing = [name for name in needed if name not in columns]
    if missing:
        raise DataError(f"{path.name}: it has no column {missing[0]!r}; got {columns}. Restore the file.")
    return rows


def _path(config: SafetyPromptsConfig, data_root: str | None, name: str) -> Path:
    folder = config.folder if config.folder is not None else data_root and str(Path(data_root) / _FOLDER)
    if not folder:
        raise ConfigError(
            f"evaluation.safety_prompts: {name} is looked for in data.root/{_FOLDER}, and data.root is not "
            "set. Set it, or evaluation.safety_prompts.folder; kinds [embedded] needs no file"
        )
    return resolve(None, str(Path(folder).expanduser() / name))


def _spread(prompts: Sequence[str], limit: int) -> tuple[str, ...]:
    n = min(limit, len(prompts))
    return tuple(prompts[place * len(prompts) // n] for place in range(n))
