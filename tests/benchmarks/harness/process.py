"""An arm's process, seen from the runner: asked for turns, and ended when it takes too long or nobody needs it."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from harness.plan import Arm, Sample

_TAIL = 400


class ArmFailedError(Exception):
    """The arm raised, died or took too long."""


class ArmSkippedError(Exception):
    """The arm says that it cannot run here."""


class ArmProcess:
    """A fresh process that is prepared for one arm. A context manager: the process ends with the block."""

    def __init__(self, arm: Arm) -> None:
        """Start the process and prepare the arm.

        Raises:
            ArmFailedError: the preparation raised, died or took too long.
            ArmSkippedError: the arm cannot run here.
        """
        self._arm = arm
        self._rest = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        module = sys.modules[arm.prepare.__module__]
        folders = [str(Path(module.__file__ or "").parent), str(Path(__file__).resolve().parent.parent)]
        command = [arm.python or sys.executable, "-m", "harness.child", module.__name__, arm.prepare.__name__]
        self._process = subprocess.Popen(
            [*command, json.dumps(dict(arm.settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # so that what the arm itself starts can be ended with it
            env=os.environ | {"PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])},
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def turn(self) -> Sample:
        """Have the arm do its thing once.

        Raises:
            ArmFailedError: it raised, died or took too long.
        """
        return Sample(**self._asked(b"\n"))

    def profile(self) -> list[dict[str, Any]]:
        """Have the arm do its thing some times under a profiler: the fields of ``profiling.Spent``, most first.

        Raises:
            ArmFailedError: it raised, died or took too long.
        """
        return list(self._asked(b"profile\n")["spent"])

    def _asked(self, line: bytes) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except OSError:
            raise ArmFailedError(f"its process ended between turns. {self._tail()}") from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._line())
        if "failed" in found:
            raise ArmFailedError(found["failed"])
        if "skipped" in found:
            raise ArmSkippedError(found["skipped"])
        return found

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        descriptor, ends = self._process.stdout.fileno(), time.monotonic() + self._arm.limit_seconds
        while b"\n" not in self._rest:
            left = ends - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                self._kill()
                raise ArmFailedError(f"it took longer than {self._arm.limit_seconds:g} s and was ended.")
            piece = os.read(descriptor, 65_536)
            if not piece:
                raise ArmFailedError(f"its process ended with code {self._process.wait()}. {self._tail()}")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _tail(self) -> str:
        """The end of what the process said on standard error."""
        self._errors.seek(0)
        return self._errors.read().decode("utf-8", "replace").strip()[-_TAIL:]

    def close(self) -> None:
        """End the process; safe to call again."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()  # the child then ends by itself
            self._process.wait(timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            self._kill()
        self._process.stdout.close()
        self._errors.close()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> "ArmProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
