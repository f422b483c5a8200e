"""Files that an operator meets: configurations, prefect.yaml, constraints, README."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedmentor_core.config_io import load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "infra" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid_and_private(path):
    config = load_config(path)
    assert config.is_private
    assert config.evaluation.thresholds, "a shipped study has a gate"
    assert {t.metric for t in config.evaluation.thresholds} >= {"bertscore_f1", "rouge_l", "label_f1", "safe_rate"}


def test_the_paper_scale_configuration_names_the_real_models():
    config = load_config(ROOT / "infra" / "configs" / "mental_health.yaml")
    assert "1.7B" in config.backbone.name
    assert config.evaluation.toxicity.model == "original"
    assert config.evaluation.bertscore.model == "roberta-large"


def test_prefect_yaml_names_flows_that_exist():
    described = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    names = [one["name"] for one in described["deployments"]]
    assert "train" in names
    assert len(set(names)) == len(names)
    for one in described["deployments"]:
        file, function = one["entrypoint"].split(":")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        flows = {
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and any("flow" in ast.unparse(d) for d in node.decorator_list)
        }
        assert function in flows


def test_constraints_pin_every_dependency_inside_its_range():
    pins = {}
    for line in (ROOT / "infra" / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    for text in wanted:
        requirement = Requirement(text)
        version = pins.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(version), (
            f"{requirement.name}=={version} is outside {requirement.specifier}"
        )


def test_the_readme_lists_every_module():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for package in ("flows", "tasks", "fedmentor_core"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "__init__.py":
                assert f"{path.stem}.py" in readme, f"{path.relative_to(ROOT)} is missing from the README's layout"


def test_no_path_of_one_machine_is_in_the_sources():
    pattern = re.compile(r"(?<![\w.])/(root|home|Users|tmp|work|srv/\w+/\w+)/\w+")
    for path in [
        *ROOT.glob("*.*"),
        *(p for d in ("flows", "tasks", "fedmentor_core", "infra") for p in (ROOT / d).rglob("*")),
    ]:
        if (
            path.is_file()
            and path.suffix in {".py", ".yaml", ".toml", ".md", ".txt", ".json", ".j2"}
            and path.stat().st_size < 10**6
        ):
            assert not pattern.search(path.read_text(encoding="utf-8")), path
