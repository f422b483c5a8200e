"""On what it was measured: processor, memory, how busy the machine was, and the versions of what does the work."""

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("fedmentor", "torch", "transformers", "peft", "opacus", "safetensors", "prefect", "mlflow", "numpy")


def machine() -> dict[str, Any]:
    """The machine, without any name that tells whose it is."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "load_average_at_start": [round(value, 2) for value in os.getloadavg()],
    }
    gpu = gpu_name()
    return found if gpu is None else found | {"gpu": gpu}


def gpu_name() -> str | None:
    """Name of the GPU that torch would use, or None. Asked in a process of its own: the runner loads no torch."""
    if shutil.which("nvidia-smi") is None and not Path("/dev/kfd").exists():
        return None  # no driver: torch, which takes seconds to load, need not be asked
    program = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that do the work."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
