"""A small study in forked processes that may be killed before any write of the server's part, or may kill a server.

Run as a program it reads one start per line from standard input (JSON, the arguments of ``run``) and answers with the
exit code of the process that lived it. It only imports and forks, so each start begins at once.
"""

import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

MLFLOW_WRITES = (
    "create_run", "update_run", "log_batch", "log_dict", "log_text", "log_inputs", "set_terminated", "set_tag",
    "create_model_version", "set_registered_model_alias", "set_model_version_tag",
)  # fmt: skip


def run(config: dict[str, Any], out: str, at: str = "", nth: int = 0, kill: int = 0, flow: bool = False) -> None:
    """Run or resume a study, with the production code of the core or of the whole Prefect flow.

    Args:
        config: the study.
        out: its output folder.
        at: regular expression of the writes that count: a path in ``out``, or 'mlflow METHOD'.
        nth: before which of them to kill, from 1; 0: never.
        kill: whom: a process group, such as a server's; 0: this process.
        flow: run the command line's flow, and not the core alone.
    """
    import torch

    torch.set_num_threads(1)
    watch(Path(out).resolve(), at, nth, kill)
    if flow:
        from fedmentor_core.config_io import validate_config
        from flows.cli import _run

        _run(validate_config(config), Path(out), "plain")
        return
    from fedmentor_core.config_io import validate_config
    from fedmentor_core.study import run_study
    from fedmentor_core.study_ref import open_study
    from fedmentor_core.workspace import workspace_of
    from flows.outputs import write_outputs

    ref = open_study(validate_config(config), out)
    write_outputs(ref, workspace_of(ref), run_study(ref))


def watch(out: Path, at: str, nth: int, kill: int) -> None:
    """Look at every file that gets its name in ``out`` for the first time, and at every write to MLflow."""
    seen = {"writes": 0}

    def about_to(label: str) -> None:
        if not nth or not re.search(at, label):
            return
        seen["writes"] += 1
        if seen["writes"] != nth:
            return
        with (out.parent / f"{out.name}.died-before").open("a") as handle:
            handle.write(label + "\n")
        if kill:
            os.killpg(kill, signal.SIGKILL)
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    def first_time(name: str) -> None:
        original: Callable[..., None] = getattr(os, name)

        def named(source: Any, target: Any, **more: Any) -> None:
            path = Path(target).resolve()
            if path.is_relative_to(out) and not path.exists():
                about_to(path.relative_to(out).as_posix())
            original(source, target, **more)

        setattr(os, name, named)

    first_time("link")
    first_time("replace")
    if "mlflow" in at:
        from mlflow import MlflowClient

        for method in MLFLOW_WRITES:
            _wrap(MlflowClient, method, about_to)


def _wrap(owner: type, method: str, about_to: Callable[[str], None]) -> None:
    original = getattr(owner, method)

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        about_to(f"mlflow {method}")
        return original(self, *args, **kwargs)

    setattr(owner, method, wrapped)


def main() -> None:
    """Fork a process for each start that is asked for."""
    import datasets  # noqa: F401  imported once, so that no start has to
    import opacus.accountants
    import opacus.grad_sample  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401

    import flows.outputs

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if "--flow" in sys.argv:
        import mlflow  # noqa: F401

        import flows.federated_training
        import flows.quiet  # noqa: F401
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                run(**asked)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    main()
