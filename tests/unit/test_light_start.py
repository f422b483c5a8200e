"""Help answers at once, and a plan nearly so: neither loads a model library, the orchestrator, the tracker or a client."""

import json
import subprocess
import sys

import pytest

HEAVY = (
    "boto3", "datasets", "matplotlib", "mlflow", "numpy", "opacus", "pandas", "peft", "prefect", "ray",
    "scipy", "sqlalchemy", "torch", "transformers",
)  # fmt: skip
PROGRAM = """
import json, sys
sys.argv = ["fedmentor", *json.loads(sys.argv[1])]
from flows.cli import main
try:
    main()
except SystemExit as done:
    code = done.code
loaded = sorted({name.split(".")[0] for name in sys.modules})
print("\\n" + json.dumps([code, loaded]))
"""


ACCOUNTANT = {"numpy", "scipy"}  # what Opacus' accountants calculate with
SMALL = [f"domains.{name}.source.n_units=400" for name in ("peer-support", "student-counselling", "crisis-line")]


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["run", "--help"], ["plan", "--help"], ["compare", "--help"], ["site", "--help"]],
    ids=" ".join,
)
def test_help_loads_nothing_heavy(arguments):
    code, loaded, _ = answered(arguments)
    assert code in (0, None)
    assert "typer" in loaded, "the command line itself was run"
    assert not set(HEAVY) & set(loaded)


def test_a_plan_of_a_backbone_on_disk_loads_no_model_library():
    changes = [part for one in SMALL for part in ("--set", one)]
    code, loaded, said = answered(["plan", "--json", *changes])
    assert code in (0, None)
    assert len(json.loads(said)["domains"]) == 3
    assert not (set(HEAVY) - ACCOUNTANT) & set(loaded)


def answered(arguments):
    """Exit code, top-level packages that were loaded, and what was printed."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(arguments)], capture_output=True, text=True, timeout=120, check=True
    )
    *said, last = done.stdout.splitlines()
    return *json.loads(last), "\n".join(said)
