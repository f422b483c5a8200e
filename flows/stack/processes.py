"""Starting processes that outlive the command, knowing them again, and stopping them with all their children.

Every process carries the stack's random id in its environment, and hands it on to its children: that finds a child in
a process group of its own, such as a flow run, and a child whose parent was killed. A process is never taken for ours
by its number alone.
"""

import os
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil

from flows.stack.settings import StackError
from flows.stack.state import ServiceRecord

MARK = "FEDMENTOR_STACK"
_POLL_SECONDS = 0.1
_KILL_ROUNDS = 50


def start(
    name: str, command: Sequence[str], env: Mapping[str, str], *, stack_id: str, cwd: Path, log: Path
) -> ServiceRecord:
    """Start ``command`` in a session of its own, with its output appended to ``log``."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            list(command),
            env={**env, MARK: f"{stack_id}/{name}"},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return ServiceRecord(pid=process.pid, started=psutil.Process(process.pid).create_time(), log=str(log))


def find(record: ServiceRecord) -> psutil.Process | None:
    """Return the recorded process if it runs; another process under the same number is not it."""
    try:
        process = psutil.Process(record.pid)
        same = abs(process.create_time() - record.started) < 1.0
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def members(stack_id: str, services: Mapping[str, ServiceRecord | None]) -> list[psutil.Process]:
    """Return every living process of these services: the leaders, their groups, and whoever carries their mark."""
    groups = {process.pid for process in _leaders(services)}  # each leads the session and group it was started in
    marks = {f"{stack_id}/{name}" for name in services}
    own = os.getpid()
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != own and process.status() != psutil.STATUS_ZOMBIE and _belongs(process, groups, marks):
                found.append(process)
        except (psutil.Error, OSError):
            continue  # ended meanwhile, or another user's
    return found


def stop(stack_id: str, services: Mapping[str, ServiceRecord | None], *, grace_seconds: float = 15.0) -> None:
    """End these services and all their processes: TERM to the leaders, then to the rest, KILL to what is left.

    Args:
        stack_id: the stack's mark.
        services: by name; None where none is on record, which still ends whoever carries that service's mark.
        grace_seconds: time for the leaders to end in their own way.

    Raises:
        StackError: a process did not end even so.
    """
    leaders = _leaders(services)
    _signal(leaders, kill=False)
    _gone(leaders, grace_seconds)
    rest = members(stack_id, services)
    _signal(rest, kill=False)
    _gone(rest, min(grace_seconds, 5.0))
    seen_none = 0
    for _ in range(_KILL_ROUNDS):  # again and again: a dying parent may start one more child
        rest = members(stack_id, services)
        if rest:
            seen_none = 0
            _signal(rest, kill=True)
            _gone(rest, 1.0)
            continue
        seen_none += 1
        if seen_none == 2:  # once is not enough: a process that is just being replaced shows no environment
            return
        time.sleep(_POLL_SECONDS)
    raise StackError(f"processes {[process.pid for process in rest]} did not end. See {MARK} in their environment.")


def _leaders(services: Mapping[str, ServiceRecord | None]) -> list[psutil.Process]:
    return [process for record in services.values() if record is not None and (process := find(record))]


def _belongs(process: psutil.Process, groups: set[int], marks: set[str]) -> bool:
    if process.pid in groups or os.getpgid(process.pid) in groups:
        return True
    return process.environ().get(MARK) in marks


def _signal(processes: Iterable[psutil.Process], *, kill: bool) -> None:
    for process in processes:
        try:
            process.kill() if kill else process.terminate()
        except psutil.Error:
            continue


def _gone(processes: Iterable[psutil.Process], seconds: float) -> None:
    """Wait until these have ended, or for ``seconds``; a zombie has ended, whoever should have reaped it."""
    waiting = list(processes)
    until = time.monotonic() + seconds
    while waiting and time.monotonic() < until:
        waiting = [process for process in waiting if _runs(process)]
        if waiting:
            time.sleep(_POLL_SECONDS)


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
