"""What runs in a client's own process: load, say so, train one client, answer. Started by ``isolation.py``.

Everything is loaded before the charge is written, so that what fails for lack of memory or data costs no budget.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from fedmentor_core.client_round import run_client
from fedmentor_core.discretion import discreet
from fedmentor_core.errors import FedMentorError
from fedmentor_core.isolation import Failed, Finished, Ready, Report, Step, StudyTraining, Training, read_training
from fedmentor_core.records import ClientUpdate
from fedmentor_core.site.workspace import SiteWorkspace
from fedmentor_core.workspace import Workspace

_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
_LOOK_SECONDS = 1.0


def main() -> None:
    """Carry out the training on standard input; report by the pipe and end with the parent that the arguments name."""
    pipe, parent = int(sys.argv[1]), int(sys.argv[2])
    _end_with(parent)
    training = read_training(sys.stdin.buffer.read())

    def report(what: Report) -> None:
        os.write(pipe, what.model_dump_json().encode() + b"\n")

    try:
        update = discreet(_train)(training, report)
    except FedMentorError as error:
        report(Failed(error=type(error).__name__, message=str(error)))
    else:
        report(Finished(update=update))


def _train(training: Training, report: Callable[[Report], None]) -> ClientUpdate:
    workspace: Workspace
    if isinstance(training, StudyTraining):
        workspace, assignment = Workspace(training.ref), training.assignment
    else:
        workspace, assignment = SiteWorkspace(training.request, training.file), training.request.assignment
    workspace.training_set(assignment.domain)  # loads the backbone too
    report(Ready())
    return run_client(workspace, assignment, lambda done, total: report(Step(done=done, total=total)))


def _end_with(parent: int) -> None:
    """End when the parent ends: nobody would stop this process any more, and its answer would reach no one.

    Linux does it at once, even while a kernel runs; elsewhere, and should Linux refuse, a thread looks every second.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)
    threading.Thread(target=_look_for, args=(parent,), daemon=True).start()


def _look_for(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
