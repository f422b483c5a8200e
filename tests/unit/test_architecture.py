"""Who may import whom, by the source's syntax tree; and no reader that runs code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("fedmentor_core", "tasks", "flows")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path) -> set[str]:
    """Full names of all modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place(path)}: relative import"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            found |= {str(a.value) for a in node.args if isinstance(a, ast.Constant)}
    return found


def importers_of(*names: str) -> set[str]:
    """Files that import one of these top-level packages."""
    return {place(path) for path in SOURCES if {name.split(".")[0] for name in imports_of(path)} & set(names)}


def test_sources_are_found() -> None:
    assert len(SOURCES) > 30


def test_core_knows_no_orchestrator() -> None:
    above = importers_of("prefect", "mlflow", "tasks", "flows")
    assert not {path for path in above if path.startswith("fedmentor_core/")}


def test_tasks_do_not_know_flows() -> None:
    assert not {path for path in importers_of("flows") if path.startswith("tasks/")}


def test_flows_hold_no_tensor() -> None:
    heavy = importers_of("torch", "transformers", "peft", "opacus")
    assert not {path for path in heavy if path.startswith("flows/")}


def test_mlflow_has_few_doors() -> None:
    doors = ("mlflow_connection", "tracking", "reference", "evidence", "registered_files", "serve_model")
    registry = ("registry", "registry_client")
    assert importers_of("mlflow") <= {f"tasks/{name}.py" for name in doors + registry}


def test_s3_has_one_door() -> None:
    assert importers_of("boto3", "botocore") == {"fedmentor_core/storage/s3_client.py"}


def test_no_reader_that_runs_code() -> None:
    """Pickles are programs. The one exception opens checkpoints by digest; its module says how."""
    exception = "fedmentor_core/evaluation/toxicity.py"
    assert importers_of("pickle", "cloudpickle", "dill", "joblib", "shelve") <= {exception}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                risky = called in ("torch.load", "eval", "exec", "yaml.load", "yaml.unsafe_load")
                assert not risky or (called == "torch.load" and place(path) == exception), f"{place(path)}: {called}"
                assert not any(
                    keyword.arg == "trust_remote_code" and getattr(keyword.value, "value", None) is not False
                    for keyword in node.keywords
                ), place(path)


@pytest.mark.slow
def test_core_imports_where_prefect_and_mlflow_do_not_exist() -> None:
    program = """
import importlib, pkgutil, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("prefect", "mlflow", "tasks", "flows"):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
import fedmentor_core
names = [m.name for m in pkgutil.walk_packages(fedmentor_core.__path__, "fedmentor_core.")]
for name in names:
    importlib.import_module(name)
print(len(names), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    count, torch_loaded = done.stdout.split()
    assert int(count) > 30
    assert torch_loaded == "False", "importing the core must not load torch"
