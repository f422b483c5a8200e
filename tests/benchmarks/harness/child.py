"""The process of one arm: prepares it, then runs a turn whenever it is told to, and says what the turn took.

Started as ``python -m harness.child MODULE FUNCTION SETTINGS``. A line on standard input asks for a turn, or for a
profile of some turns; the end of it ends the process. Answers are lines of JSON on what was standard output; whatever the arm prints goes to standard error.
"""

import gc
import importlib
import json
import os
import resource
import sys
import time
from dataclasses import asdict
from typing import Any, TextIO

from harness.plan import Sample, SkipArmError, Turn


def main() -> None:
    """Prepare, then answer until nobody asks."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    asked = os.fdopen(os.dup(sys.stdin.fileno()), "r", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())  # what the arm starts must not read what we are asked
    module, function, settings = sys.argv[1:]
    try:
        turn: Turn = getattr(importlib.import_module(module), function)(**json.loads(settings))
    except SkipArmError as reason:
        _say(answers, {"skipped": str(reason)})
        return
    except Exception as error:
        _say(answers, {"failed": _told(error)})
        raise
    _say(answers, {"ready": True})
    for line in asked:
        try:
            _say(answers, _profiled(turn) if line.strip() == "profile" else _measured(turn))
        except Exception as error:
            _say(answers, {"failed": _told(error)})
            raise


def _measured(turn: Turn) -> dict[str, Any]:
    gc.collect()
    before = _start_memory()
    started, computed = time.perf_counter(), _processor_seconds()
    sample = turn() or Sample()
    _finish_gpu()
    seconds, computed = time.perf_counter() - started, _processor_seconds() - computed
    peak = _peak_memory()
    own = sample.peak_bytes is None  # else the turn measured another process, whose growth we do not know
    return {
        "seconds": seconds if sample.seconds is None else sample.seconds,
        "peak_bytes": peak if own else sample.peak_bytes,
        "bytes": sample.bytes,
        "figures": {
            "cpu_seconds": computed,
            **({"growth_bytes": max(0, peak - before)} if own else {}),
            **sample.figures,
        },
    }


def _profiled(turn: Turn) -> dict[str, Any]:
    from harness.profiling import profiled

    return {"spent": [asdict(one) for one in profiled(turn)]}


def _processor_seconds() -> float:
    """Processor time of this process and of those it has waited for: it says less than the clock, and other work on the
    machine hardly changes it.
    """
    used = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def _start_memory() -> int:
    """Bytes in use now; from here on the peak is counted anew."""
    gpu = _gpu()
    if gpu is not None:
        gpu.synchronize()
        gpu.reset_peak_memory_stats()
        return int(gpu.memory_allocated())
    try:
        with open("/proc/self/clear_refs", "w") as handle:
            handle.write("5")
    except OSError:
        return 0  # the peak is then that of the process since its start, and all of it counts as growth
    return _status("VmRSS")


def _peak_memory() -> int:
    """Most bytes in use since ``_start_memory``: of the GPU where the arm uses one, else resident memory."""
    gpu = _gpu()
    if gpu is not None:
        return int(gpu.max_memory_allocated())
    try:
        return _status("VmHWM")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _finish_gpu() -> None:
    gpu = _gpu()
    if gpu is not None:
        gpu.synchronize()


def _gpu() -> Any:
    """``torch.cuda`` where the arm has used it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _status(name: str) -> int:
    with open("/proc/self/status") as handle:
        line = next(line for line in handle if line.startswith(name))
    return int(line.split()[1]) * 1024


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _say(answers: TextIO, what: dict[str, Any]) -> None:
    answers.write(json.dumps(what) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
