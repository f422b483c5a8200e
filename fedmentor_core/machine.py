"""What ``fedmentor doctor`` looks at on this machine: Python, torch, devices, space, and the tested versions."""

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fedmentor_core.check import Check, Diagnosis

_GB = 1e9
_LEAST_DISK_BYTES = 5 * _GB
_LEAST_MEMORY_BYTES = 3 * _GB
_OLDEST_PYTHON = (3, 11)


def examine_machine(folder: Path, constraints: Path | None) -> Diagnosis:
    """Look at this machine. Writes nothing.

    Args:
        folder: where runs will be written; its file system's space is looked at.
        constraints: file of ``name==version`` lines that were tested together; None: not looked at.
    """
    checks = [_python(), _torch(), _gpu(), _memory(), _disk(folder)]
    if constraints is not None and constraints.is_file():
        checks.append(_versions(constraints))
    return Diagnosis(subject="this machine", checks=tuple(checks))


def _python() -> Check:
    enough = sys.version_info[:2] >= _OLDEST_PYTHON
    return Check(
        name="python",
        status="pass" if enough else "fail",
        found=f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        why="FedMentor is written for Python 3.11 and newer.",
        remedy="" if enough else "Install Python 3.11.",
    )


def _torch() -> Check:
    try:
        import torch

        found, status = f"{torch.__version__}, {torch.get_num_threads()} threads", "pass"
    except Exception as error:  # a broken native library raises anything
        found, status = type(error).__name__, "fail"
    return Check(
        name="torch",
        status="pass" if status == "pass" else "fail",
        found=found,
        why="Models are trained with it.",
        remedy="" if status == "pass" else "Install with the constraints file: make venv.",
    )


def _gpu() -> Check:
    why = "A backbone of a billion parameters needs one; the embedded one does not."
    try:
        import torch

        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except Exception as error:
        return Check(name="gpu", status="warn", found=type(error).__name__, why=why, remedy="Check the driver.")
    if not names:
        return Check(name="gpu", status="pass", found="none: training runs on the CPU", why=why)
    found = "; ".join(f"{one.name}, {one.total_memory / _GB:.0f} GB" for one in names)
    return Check(name="gpu", status="pass", found=found, why=why)


def _memory() -> Check:
    free = _free_memory_bytes()
    if free is None:
        return Check(name="memory", status="warn", found="unknown", why="The quickstart takes up to 3 GB.")
    enough = free >= _LEAST_MEMORY_BYTES
    return Check(
        name="memory",
        status="pass" if enough else "warn",
        found=f"{free / _GB:.1f} GB free",
        why="The quickstart takes up to 3 GB.",
        remedy="" if enough else "Close other programs, or expect it to be slow.",
    )


def _free_memory_bytes() -> float | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    enough = free >= _LEAST_DISK_BYTES
    return Check(
        name="disk",
        status="pass" if enough else "warn",
        found=f"{free / _GB:.1f} GB free here",
        why="Stores keep every round's adapters; nothing is deleted.",
        remedy="" if enough else "Point --out or storage.url to a larger disk.",
    )


def _versions(constraints: Path) -> Check:
    other, n_pins = [], 0
    for line in constraints.read_text(encoding="utf-8").splitlines():
        name, separator, pinned = line.partition("==")
        if line.startswith("#") or not separator:
            continue
        n_pins += 1
        try:
            found = version(name)
        except PackageNotFoundError:
            continue  # an optional package, or one for the tests
        if found.partition("+")[0] != pinned.strip():
            other.append(f"{name} {found} (tested: {pinned.strip()})")
    return Check(
        name="versions",
        status="warn" if other else "pass",
        found=", ".join(other) if other else f"as tested ({n_pins} packages)",
        why="These versions were installed and tested together; a newer fastapi, for one, breaks the Prefect server.",
        remedy="pip install -c infra/constraints.txt -e ." if other else "",
    )
