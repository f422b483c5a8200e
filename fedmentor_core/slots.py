"""Places to train at on one machine: one client a GPU, over all studies and processes there.

A slot is a locked file. The lock belongs to the open file, which the client's process inherits, so the system gives it
back when the last process that holds it has ended, in whatever way: a slot is free exactly when nobody trains on it.
There is no server that could forget one, and nothing to clean up after ``kill -9``.
"""

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from fedmentor_core.config import StudyConfig
from fedmentor_core.errors import ConfigError

_POLL_SECONDS = 0.2
_MOST_POLL_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Slot:
    """A slot that is held.

    Attributes:
        name: of its file, such as ``gpu-0``.
        gpu: the GPU as ``CUDA_VISIBLE_DEVICES`` names it; None on a CPU.
        descriptor: of the locked file; a process that inherits it holds the slot too.
    """

    name: str
    gpu: str | None
    descriptor: int


def visible_gpus(device: str) -> tuple[str, ...]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them; none where ``device`` is 'cpu'.

    Name GPUs in one way on a machine, by index or by UUID: a slot is known by the name.
    """
    if device == "cpu":
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return tuple(named[:count]) if named else tuple(map(str, range(count)))


@contextmanager
def held_slot(
    config: StudyConfig, gpus: Sequence[str], on_wait: Callable[[], None] = lambda: None
) -> Iterator[Slot | None]:
    """Hold one of this machine's slots while the block runs; None where nothing limits how many train here.

    Args:
        config: ``execution.slots_per_machine`` counts the slots where there is no GPU; ``execution.slots_folder``.
        gpus: GPUs to choose from; the first that is free is taken.
        on_wait: called several times a second while all are taken; may raise, to give up.

    Raises:
        ConfigError: the slots' folder cannot be used.

    Guarantees:
        At no time do two holders, in any process of this machine that uses the same folder, have the same slot.
    """
    names: dict[str, str | None] = {f"gpu-{gpu}": gpu for gpu in gpus}
    if not gpus:
        names = {f"client-{index}": None for index in range(config.execution.slots_per_machine or 0)}
    if not names:
        yield None
        return
    folder = _folder(config.execution.slots_folder)
    slot = _wait_for_one(folder, names, on_wait)
    try:
        yield slot
    finally:
        os.close(slot.descriptor)


@contextmanager
def held_gpu(config: StudyConfig, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold this process's own GPU, the first that it sees, for work other than training; does nothing on a CPU."""
    gpus = visible_gpus(config.backbone.device)[:1]
    with held_slot(config, gpus, on_wait) if gpus else nullcontext():
        yield


def _wait_for_one(folder: Path, names: dict[str, str | None], on_wait: Callable[[], None]) -> Slot:
    pause = _POLL_SECONDS
    while True:
        for name, gpu in names.items():
            descriptor = _try_lock(folder / f"{name.replace('/', '_')}.lock")
            if descriptor is not None:
                return Slot(name, gpu, descriptor)
        on_wait()
        time.sleep(pause * random.uniform(0.5, 1.0))  # so that those who wait do not all ask at once
        pause = min(pause * 1.5, _MOST_POLL_SECONDS)


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds the file's lock; None where somebody else does."""
    import fcntl

    try:
        descriptor = _open(path)
    except OSError as error:
        raise ConfigError(
            f"slot file {path} cannot be opened: {error.strerror}. Set execution.slots_folder to a folder that every "
            "user who trains on this machine may write to."
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _open(path: Path) -> int:
    """Open, or create for all users: a folder with the sticky bit lets nobody open another's file with O_CREAT."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    with suppress(FileNotFoundError):
        return os.open(path, flags)
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:  # created a moment ago
        return os.open(path, flags)
    with suppress(OSError):
        os.fchmod(descriptor, 0o666)  # whatever the umask says
    return descriptor


def _folder(configured: str | None) -> Path:
    folder = Path(configured) if configured is not None else Path(tempfile.gettempdir()) / "fedmentor-slots"
    if folder.is_dir():
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            folder.chmod(0o1777)
    except OSError as error:
        raise ConfigError(
            f"slots folder {folder} cannot be made: {error.strerror}. Set execution.slots_folder to a folder that "
            "every user who trains on this machine may write to."
        ) from None
    return folder
