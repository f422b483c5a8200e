"""A comparison in its output folder: what is shared, which cells there are, and how one of them is run.

``OUT/comparison.json`` says what the folder holds. Each cell has a folder ``OUT/cells/KEY``: ``cell.json`` with all
that decides its result (its digest is the key), the cell's own store and ledgers, and ``result.json``, written last and
never changed. A cell that has one is finished, whoever ran it.
"""

import gc
import os
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedmentor_core.compare.arms import cell_config, find_arm
from fedmentor_core.compare.grid import config_of, plan_grid
from fedmentor_core.compare.identity import identity_of, key_parts, refuse_other_identity
from fedmentor_core.compare.procedures import PROCEDURES
from fedmentor_core.compare.public import refuse_unless_public
from fedmentor_core.compare.records import Cell, CellResult, ComparisonFile, Identity, KeyedCell
from fedmentor_core.compare.settings import CompareSettings
from fedmentor_core.compare.workbench import CellWorkspace, untrained
from fedmentor_core.config import StorageConfig, StudyConfig
from fedmentor_core.config_io import config_sha256
from fedmentor_core.errors import ConfigError, OutputExistsError
from fedmentor_core.hashing import canonical_sha256
from fedmentor_core.progress import Listener, ProgressEvent, silent
from fedmentor_core.storage.local import LocalStore
from fedmentor_core.study_ref import MARKER, StudyRef, claim_study, find_study
from fedmentor_core.workspace import Workspace, workspace_of

FILE = "comparison.json"
_KEY_DIGITS = 24


@dataclass(frozen=True)
class Comparison:
    """A comparison by reference; backbone, data and scorers are loaded once per process, when they are first needed.

    Attributes:
        config: the study that all arms start from.
        settings: the grid.
        out: the output folder.
    """

    config: StudyConfig
    settings: CompareSettings
    out: Path

    @classmethod
    def open(cls, config: StudyConfig, settings: CompareSettings, out_dir: str | Path) -> "Comparison":
        """Refuse what must not or cannot be compared. Reads no data and writes nothing.

        Raises:
            ConfigError: the data is not public, or a setting has no meaning in a comparison.
            OutputExistsError: the folder holds something else.
        """
        refuse_unless_public(config, stated=settings.data_is_public)
        made = cls(config, settings, Path(out_dir).resolve())
        made._check_folder()
        return made

    @property
    def common(self) -> Workspace:
        """What all cells share, loaded once per process."""
        base = cell_config(self.config, find_arm("base"), self.config.seed)
        base = base.model_copy(update={"storage": _store_in(self.out / "untrained")})
        run_id = f"untrained-{canonical_sha256(base.model_dump(mode='json'))[:12]}"
        return workspace_of(StudyRef(config=base, run_id=run_id, out_dir=str(self.out / "untrained")))

    @cached_property
    def identity(self) -> Identity:
        """What every cell shares; loads backbone, data and scorers."""
        return identity_of(self.common)

    @cached_property
    def cells(self) -> tuple[KeyedCell, ...]:
        """The grid, with keys."""
        return tuple(
            KeyedCell(**cell.model_dump(), key=self._key(cell)) for cell in plan_grid(self.config, self.settings)
        )

    def claim(self) -> ComparisonFile:
        """Write ``comparison.json``: from now on the folder is this comparison's.

        Raises:
            OutputExistsError: the folder holds something else.
        """
        found = self._check_folder()
        made = ComparisonFile(
            comparison_id=found.comparison_id if found else f"{self.config.name}-{secrets.token_hex(4)}",
            study=self.config.name,
            config_sha256=config_sha256(self.config),
            against=self.settings.against,
            data_is_public=self.settings.data_is_public,
            cells=self.cells,
        )
        write_text(self.out / FILE, made.model_dump_json(indent=2) + "\n")
        return made

    def prepare(self, listen: Listener = silent) -> None:
        """Score the untrained backbone on every set, once for all cells."""
        listen(ProgressEvent("baseline", "evaluating the untrained backbone"))
        for domain in self.config.domains:
            for split in ("gate", "test"):
                untrained(self.common, domain.name, "gate" if split == "gate" else "test", listen)

    def result(self, cell: KeyedCell) -> CellResult | None:
        """A finished cell's result, or None."""
        return read_result(self.out, cell)

    def adopt(self, others: Sequence[Path]) -> int:
        """Copy finished cells of other comparisons that are the same as cells of this one; returns how many.

        Raises:
            ConfigError: a folder holds no comparison, or one of other splits, scorers or backbone.
        """
        copied = 0
        for other in others:
            listed = read_file(other)
            for cell in listed.cells:
                theirs = read_result(other, cell)
                if theirs is not None:
                    refuse_other_identity(self.identity, theirs.identity, str(other))
            for cell in self.cells:
                copied += self.result(cell) is None and copy_cell(other, self.out, cell)
        return copied

    def run(self, cell: KeyedCell, listen: Listener = silent) -> CellResult:
        """Run one cell, or go on with it; a finished one is only read.

        Raises:
            FedMentorError: the cell failed. What it finished is kept, and the next start goes on from there.
        """
        done = self.result(cell)
        if done is not None:
            return done
        config = config_of(self.config, self.settings, cell)
        folder = self.out / "cells" / cell.key
        config = config.model_copy(update={"storage": _store_in(folder)})
        store = LocalStore(folder)
        store.put_json("cell.json", key_parts(cell, config, self.identity))
        ref = find_study(config, folder)
        if not (folder / MARKER).exists():
            claim_study(ref)
        arm = find_arm(cell.arm)
        workspace = CellWorkspace(ref, self.common)
        listen(ProgressEvent("prepare", "planning", n_rounds=config.rounds))
        outcome = PROCEDURES[arm.procedure](workspace, listen)
        result = CellResult(
            key=cell.key,
            arm=cell.arm,
            seed=cell.seed,
            epsilon=cell.epsilon,
            identity=self.identity,
            final=outcome.final,
            rounds=outcome.rounds,
            samples=outcome.samples,
            safety=outcome.safety,
            epsilon_spent=dict(outcome.epsilon_spent),
            bytes_total=sum(one.bytes_total for one in outcome.rounds),
            seconds=outcome.seconds,
            warnings=outcome.warnings,
        )
        store.put_json("result.json", result)
        del workspace, outcome
        gc.collect()  # a cell's models refer to themselves; a grid must not keep them all
        return result

    def _key(self, cell: Cell) -> str:
        return cell_key(key_parts(cell, config_of(self.config, self.settings, cell), self.identity))

    def _check_folder(self) -> ComparisonFile | None:
        advice = "Nothing was changed. Give another --out; finished cells of this one can be had by --reuse."
        if self.out.exists() and not self.out.is_dir():
            raise OutputExistsError(f"output folder {self.out} is a file. Give another --out.")
        if not (self.out / FILE).is_file():
            if (self.out / MARKER).exists() or (self.out / "table.json").exists():
                raise OutputExistsError(f"output folder {self.out} holds something that is no comparison. {advice}")
            return None
        found = read_file(self.out)
        digest = config_sha256(self.config)
        if found.config_sha256 != digest:
            raise OutputExistsError(
                f"output folder {self.out} already holds a comparison of {found.study!r} with another configuration "
                f"(sha256 {found.config_sha256[:12] or 'of joined tables'}, this one has {digest[:12]}). {advice}"
            )
        return found


def cell_key(parts: dict[str, object]) -> str:
    """The first digits of the digest of all that decides a cell's result."""
    return canonical_sha256(parts)[:_KEY_DIGITS]


def read_file(folder: Path) -> ComparisonFile:
    """What a folder's ``comparison.json`` says.

    Raises:
        ConfigError: the folder holds no comparison.
    """
    try:
        return ComparisonFile.model_validate_json((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(
            f"{folder} holds no comparison ({FILE} is missing or cannot be read). Give the output folder of "
            "'fedmentor compare'."
        ) from None


def read_result(folder: Path, cell: KeyedCell) -> CellResult | None:
    """A finished cell's result in a comparison's folder, or None.

    Raises:
        IntegrityError: the file was changed.
        ConfigError: the file is another cell's, or was written by another version of FedMentor.
    """
    store = LocalStore(folder / "cells" / cell.key)
    if not store.exists("result.json"):
        return None
    try:
        found = CellResult.model_validate(store.get_json("result.json"))
    except ValueError:
        raise ConfigError(
            f"{folder / 'cells' / cell.key}: result.json is not one of this version of FedMentor. Remove the folder to "
            "run the cell again."
        ) from None
    if (found.key, found.arm, found.seed, found.epsilon) != (cell.key, cell.arm, cell.seed, cell.epsilon):
        raise ConfigError(f"{folder / 'cells' / cell.key}: result.json is of another cell. Remove the folder.")
    return found


def copy_cell(source: Path, destination: Path, cell: KeyedCell) -> bool:
    """Copy a finished cell's two files; False where ``source`` does not have it."""
    theirs, ours = (LocalStore(folder / "cells" / cell.key) for folder in (source, destination))
    if read_result(source, cell) is None:
        return False
    for name in ("cell.json", "result.json"):  # the result last: where it is, the cell is finished
        ours.put(name, theirs.get_bytes(name))
    return True


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
        handle.write(text)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def _store_in(folder: Path) -> StorageConfig:
    """A store of the folder's own, whatever store the environment names for studies."""
    return StorageConfig(url=(folder / "store").as_uri())
