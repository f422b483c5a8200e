"""How long the command line takes to answer, each time in a fresh process: help, and the plan of the quickstart."""

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness import Arm, Finding, Plan, Ratio, Sample, Scale, Turn, benchmark, median_of

SECOND = 1.0
PLAN_STARTS = """
from pathlib import Path
from flows import cli
config = cli._load(cli.DEFAULT_CONFIG, [])
from fedmentor_core.study_ref import find_study
from fedmentor_core.workspace import Workspace
import fedmentor_core.data.loading, fedmentor_core.data.invented
Workspace(find_study(config, Path("plan")))
"""
"""Start-up of a plan: all that comes before it reads data. Opacus' accountants are loaded after that, by the planning."""
PLAN_LOADS = (
    PLAN_STARTS
    + """
from fedmentor_core.privacy import opacus_accountants
opacus_accountants.rdp_analysis(), opacus_accountants.prv_accountant()
"""
)


@benchmark("startup", title="seconds until the command line has answered", minutes=1.0)
def startup(scale: Scale) -> Plan:
    """Bare Python and an import of torch are there to say what part of it is not ours."""
    return Plan(
        arms=[
            Arm("python -c pass", interpreter, {"program": "pass"}),
            Arm("import torch", interpreter, {"program": "import torch"}),
            Arm("fedmentor --help", command, {"arguments": ["--help"]}),
            Arm("fedmentor plan --help", command, {"arguments": ["plan", "--help"]}),
            Arm("fedmentor plan, until it reads data", interpreter, {"program": PLAN_STARTS}),
            Arm("the same, and the accountants", interpreter, {"program": PLAN_LOADS}),
            Arm("fedmentor plan", command, {"arguments": ["plan", "--json"]}),
        ],
        ratios=[Ratio("plan over an import of torch", of="fedmentor plan", to="import torch")],
        turns=2 if scale.quick else 3,
        warm_up=1,  # the first start reads the files from the disk
        conclude=_against_a_second,
    )


def _against_a_second(samples: Mapping[str, Sequence[Sample]]) -> list[Finding]:
    ours = [name for name in samples if "fedmentor" in name]
    return [Finding(name, median_of(samples[name]), "s", at_most=SECOND) for name in ours]


def command(arguments: list[str]) -> Turn:
    """The installed entry point, as a user types it."""
    program = Path(sys.executable).with_name("fedmentor")
    if not program.is_file():
        raise FileNotFoundError(f"{program} is missing: install the project first (make install).")
    return _timed([str(program), *arguments])


def interpreter(program: str) -> Turn:
    """A program in a fresh interpreter."""
    return _timed([sys.executable, "-c", program])


def _timed(arguments: list[str]) -> Turn:
    def turn() -> Sample:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(arguments, cwd=folder, stdout=subprocess.DEVNULL, check=True, env=os.environ.copy())
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        return Sample(peak_bytes=peak if sys.platform == "darwin" else peak * 1024)

    return turn
