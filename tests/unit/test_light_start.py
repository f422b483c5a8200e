"""Help answers at once: no command's help loads a model library, the orchestrator, the tracker or a store's client."""

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


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["run", "--help"], ["plan", "--help"], ["compare", "--help"], ["site", "--help"]],
    ids=" ".join,
)
def test_help_loads_nothing_heavy(arguments):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(arguments)], capture_output=True, text=True, timeout=120, check=True
    )
    code, loaded = json.loads(done.stdout.splitlines()[-1])
    assert code in (0, None)
    assert "typer" in loaded, "the command line itself was run"
    assert not set(HEAVY) & set(loaded)
