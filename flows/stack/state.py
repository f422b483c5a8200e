"""What a stack's folder remembers between commands: who was started, where it listens, where it logs."""

import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from flows.stack.settings import StackError, StackSettings


class ServiceRecord(BaseModel):
    """A process that the stack started. ``pid`` and ``started`` together name it; a pid alone may be used again."""

    pid: int
    started: float = Field(description="The process's start time, in seconds since the epoch.")
    log: str


class StackState(BaseModel):
    """The content of ``stack.json``."""

    schema_version: int = 1
    stack_id: str = Field(default_factory=lambda: uuid.uuid4().hex, description="Marks this stack's processes.")
    settings: StackSettings = StackSettings()
    services: dict[str, ServiceRecord] = {}
    deployed: str | None = Field(default=None, description="sha256 of the deployments that were applied.")
    versions: dict[str, str] = {}


class StackFolder:
    """A stack's folder: ``stack.json``, ``logs/`` and ``data/``, readable by their owner only."""

    def __init__(self, path: Path) -> None:
        """Name the folder; nothing is made yet."""
        self.path = path.resolve()
        self.file = self.path / "stack.json"
        self.logs = self.path / "logs"
        self.data = self.path / "data"

    def load(self) -> StackState | None:
        """Return the state, or None where no stack was ever started.

        Raises:
            StackError: the file is not a stack's state.
        """
        try:
            return StackState.model_validate_json(self.file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise StackError(
                f"{self.file} is not a stack's state ({type(error).__name__}). Use another --dir."
            ) from None

    def save(self, state: StackState) -> None:
        """Replace the state in one step, so that a reader never sees half of it."""
        scratch = self.file.with_suffix(".part")
        scratch.write_text(json.dumps(state.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
        os.replace(scratch, self.file)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, so that no second ``up`` or ``down`` works on it.

        Raises:
            StackError: another command holds it.
        """
        for folder in (self.path, self.logs, self.data):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.path / "lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StackError(f"another up or down is at work on {self.path}. Wait for it to end.") from None
            yield
