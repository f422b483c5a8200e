"""Opacus' own accountants, without the three seconds that the rest of Opacus and torch take to import.

``opacus/__init__`` imports its training side, and its accountants' base class imports that too, for a hook that we do
not use. Planning trains nothing, so where Opacus is not loaded yet the very files of its installed accountants are
executed under a package name of ours, with a base class that has the one attribute they use. Nothing is copied: the
series and the convolutions are the installed package's, and a test holds the two ways to equal bits. Should a release
of Opacus be laid out otherwise, the package is imported as it is.
"""

import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_ALONE = "_opacus_accountants_alone"


class _Base:
    """What Opacus' accountants use of their base class: a history of (noise_multiplier, sample_rate, steps)."""

    def __init__(self) -> None:
        self.history: list[tuple[float, float, int]] = []


@cache
def rdp_analysis() -> Any:
    """The module ``opacus.accountants.analysis.rdp``: Mironov et al. 2019 (arXiv 1908.10530)."""
    return _load("analysis.rdp")


@cache
def prv_accountant() -> Any:
    """The class ``opacus.accountants.PRVAccountant``: Gopi et al. 2021 (arXiv 2106.02848)."""
    return _load("prv").PRVAccountant


def _load(name: str) -> Any:
    if "opacus" not in sys.modules:
        try:
            _prepare()
            with _convolution_when_called():
                return importlib.import_module(f"{_ALONE}.{name}")
        except (ImportError, AttributeError):
            pass
    return importlib.import_module(f"opacus.accountants.{name}")


def _prepare() -> None:
    """Register the package under our name, and the base class in place of the file that imports torch."""
    if _ALONE in sys.modules:
        return
    found = find_spec("opacus")
    if found is None or not found.submodule_search_locations:
        raise ImportError("Opacus is not installed as a folder")
    base: Any = ModuleType(f"{_ALONE}.accountant")
    base.IAccountant = _Base
    package = ModuleType(_ALONE)
    package.__path__ = [str(Path(found.submodule_search_locations[0]) / "accountants")]
    sys.modules[base.__name__] = base
    sys.modules[_ALONE] = package


@contextmanager
def _convolution_when_called() -> Iterator[None]:
    """Meanwhile, ``from scipy.signal import convolve`` takes a function that imports scipy.signal once it is called.

    That import takes 0.6 s, and only the composition of unlike mechanisms calls it. Where another thread could see the
    stand-in, there is none.
    """
    if "scipy.signal" in sys.modules or threading.active_count() > 1:
        yield
        return
    for wanted in ("scipy.fft", "scipy.integrate", "scipy.special"):  # so that what they import meets no stand-in
        importlib.import_module(wanted)
    stand_in: Any = ModuleType("scipy.signal")
    stand_in.convolve = _convolve
    sys.modules["scipy.signal"] = stand_in
    try:
        yield
    finally:
        del sys.modules["scipy.signal"]


def _convolve(*arguments: Any, **options: Any) -> Any:
    return importlib.import_module("scipy.signal").convolve(*arguments, **options)
