"""A client's training in a process of its own, which can be stopped whatever it does and gives all memory back.

A thread cannot be stopped: it ends at its next step, or never when it hangs inside a kernel. A process can. It is told
what to do by a file and answers by a pipe, in small typed JSON lines, and writes to the stores itself, as it would
here; no tensor and no row of text crosses. What it charged before it was stopped stays charged, and nothing of it is
released: the ledger sees an attempt that failed (``client_round.py``).

``isolated_client.py`` is what runs in that process.
"""

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from fedmentor_core.client_round import OnStep, run_client
from fedmentor_core.config import StudyConfig
from fedmentor_core.discretion import WithheldError
from fedmentor_core.errors import DeadlineError, FedMentorError, IsolationError
from fedmentor_core.records import ClientAssignment, ClientUpdate, Record
from fedmentor_core.site.file import SiteFile
from fedmentor_core.site.requests import TrainRequest
from fedmentor_core.site.workspace import SiteWorkspace
from fedmentor_core.slots import Slot, held_slot, visible_gpus
from fedmentor_core.study_ref import StudyRef
from fedmentor_core.workspace import Workspace

_POLL_SECONDS = 0.25
_STOP_SECONDS = 30.0


class StudyTraining(Record):
    """A client whose domain is on this machine."""

    kind: Literal["study"] = "study"
    ref: StudyRef
    assignment: ClientAssignment


class SiteTraining(Record):
    """A client of a site, under the site's own file. The file names places and holds no secret."""

    kind: Literal["site"] = "site"
    request: TrainRequest
    file: SiteFile


class Ready(Record):
    """Backbone and data are loaded; nothing is charged yet, and the deadline begins."""

    kind: Literal["ready"] = "ready"


class Step(Record):
    """So many steps are done."""

    kind: Literal["step"] = "step"
    done: int
    total: int


class Finished(Record):
    """The client's update, as it may leave the site."""

    kind: Literal["finished"] = "finished"
    update: ClientUpdate


class Failed(Record):
    """A failure as it may be told (``discretion.tellable``): our error's class, and its message."""

    kind: Literal["failed"] = "failed"
    error: str
    message: str


Training = StudyTraining | SiteTraining
Report = Ready | Step | Finished | Failed
_TRAINING: TypeAdapter[Training] = TypeAdapter(Annotated[Training, Field(discriminator="kind")])
_REPORT: TypeAdapter[Report] = TypeAdapter(Annotated[Report, Field(discriminator="kind")])


def train_client_here(
    workspace: Workspace,
    assignment: ClientAssignment,
    on_step: OnStep = lambda done, total: None,
    on_wait: Callable[[], None] = lambda: None,
    file: SiteFile | None = None,
) -> ClientUpdate:
    """``run_client`` on this machine: when a slot is free, and in a process of its own where the configuration says so.

    Args:
        workspace: the study's, or a ``SiteWorkspace`` for a training request.
        assignment: what to train.
        on_step: progress; may raise, to stop the client.
        on_wait: called several times a second while nothing else happens; may raise, to stop the client.
        file: the site's own file, of a ``SiteWorkspace``.

    Raises:
        DeadlineError: a process of its own was stopped at ``training.deadline_seconds``; its charge stands.
        IsolationError: it ended without an answer, such as for lack of memory; what it charged stays charged.
        FedMentorError: whatever ``run_client`` raises, by class and message; what is not ours as ``WithheldError``.
    """
    config = workspace.config
    gpus = visible_gpus(config.backbone.device)
    if not runs_apart(config, gpus):
        with held_slot(config, gpus[:1], on_wait):  # a process computes on one GPU: its first
            return run_client(workspace, assignment, on_step)
    training: Training
    if isinstance(workspace, SiteWorkspace) and isinstance(workspace.request, TrainRequest) and file is not None:
        training = SiteTraining(request=workspace.request, file=file)
    else:
        training = StudyTraining(ref=workspace.ref, assignment=assignment)
    with held_slot(config, gpus, on_wait) as slot, _process(training, slot) as (process, pipe):
        return _outcome(process, pipe, config, assignment, on_step, on_wait)


def runs_apart(config: StudyConfig, gpus: tuple[str, ...]) -> bool:
    """Whether clients train in processes of their own: by default on GPUs, where a start costs little in comparison."""
    isolation = config.execution.isolation
    return bool(gpus) if isolation == "auto" else isolation == "process"


@contextmanager
def _process(training: Training, slot: Slot | None) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The client's process and the pipe that it reports by. It has ended when the block has, come what may."""
    reading, writing = os.pipe()
    try:
        with tempfile.TemporaryFile() as request:
            request.write(training.model_dump_json().encode())
            request.seek(0)
            held = (writing,) if slot is None else (writing, slot.descriptor)
            seen = {} if slot is None or slot.gpu is None else {"CUDA_VISIBLE_DEVICES": slot.gpu}
            command = ["-W", "ignore", "-m", "fedmentor_core.isolated_client", str(writing), str(os.getpid())]
            process = subprocess.Popen(
                [sys.executable, *command],
                stdin=request,
                stdout=subprocess.DEVNULL,  # ours may be a program's input
                env={**os.environ, **seen},
                pass_fds=held,
                start_new_session=True,  # so that it can be stopped together with whatever it started
            )
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    try:
        yield process, reading
    finally:
        os.close(reading)
        _stop(process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Kill the process and all that it started.

    Raises:
        IsolationError: the system does not let go of it. It goes on holding its slot.
    """
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        raise IsolationError(
            f"a client's process (id {process.pid}) could not be stopped within {_STOP_SECONDS:g} s; its slot stays "
            "taken until it ends. Look at the machine's GPU driver and disks."
        ) from None


def _outcome(
    process: "subprocess.Popen[bytes]",
    pipe: int,
    config: StudyConfig,
    assignment: ClientAssignment,
    on_step: OnStep,
    on_wait: Callable[[], None],
) -> ClientUpdate:
    """Follow the client's reports to the last one, or to the deadline."""
    loading_ends = time.monotonic() + config.execution.start_seconds
    training_ends: float | None = None
    ready, done, buffer = False, 0, b""
    while True:
        limit = training_ends if ready else loading_ends
        if limit is not None and time.monotonic() >= limit:
            raise _too_late(config, assignment, ready, done)
        on_wait()
        pause = _POLL_SECONDS if limit is None else min(_POLL_SECONDS, max(limit - time.monotonic(), 0.0))
        if not select.select([pipe], [], [], pause)[0]:
            continue
        piece = os.read(pipe, 65_536)
        if not piece:
            raise _ended(process, assignment)
        *lines, buffer = (buffer + piece).split(b"\n")
        for line in lines:
            match _REPORT.validate_json(line):
                case Ready():
                    ready = True
                    if config.training.deadline_seconds is not None:
                        training_ends = time.monotonic() + config.training.deadline_seconds
                case Step(done=done, total=total):
                    on_step(done, total)
                case Finished(update=update):
                    return update
                case Failed(error=error, message=message):
                    raise _as_raised(error, message)


def _too_late(config: StudyConfig, assignment: ClientAssignment, ready: bool, done: int) -> FedMentorError:
    if not ready:
        return IsolationError(
            f"client {assignment.domain!r} had not loaded its backbone and data after "
            f"{config.execution.start_seconds:g} s and was stopped; nothing was charged. Raise execution.start_seconds."
        )
    return DeadlineError(
        f"client {assignment.domain!r} passed its deadline of {config.training.deadline_seconds:g} s after {done} of "
        f"{assignment.steps} steps and its process was stopped; its update is dropped and its charge stands. Raise "
        "training.deadline_seconds or lower the steps."
    )


def _ended(process: "subprocess.Popen[bytes]", assignment: ClientAssignment) -> IsolationError:
    try:
        code = process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        code = 0
    how = f"by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"with exit code {code}"
    hint = " Often the machine ran out of memory: lower training.microbatch_size." if code == -signal.SIGKILL else ""
    return IsolationError(
        f"the process of client {assignment.domain!r} ended {how} and gave no answer; what it charged stays "
        f"charged, and nothing was released.{hint}"
    )


def _as_raised(name: str, message: str) -> FedMentorError:
    """The error again as its own class, so that what may be retried and what stops a study is decided as ever."""
    known = {kind.__name__: kind for kind in _kinds_of(FedMentorError)}
    return known.get(name, WithheldError)(message)


def _kinds_of(kind: type[FedMentorError]) -> Iterator[type[FedMentorError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds_of(below)


def read_training(data: bytes) -> Training:
    """What a client's process is to do."""
    return _TRAINING.validate_json(data)
