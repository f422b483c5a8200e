"""No secret in the repository, and nothing in it that turns data into running code."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = [
    *(
        path
        for folder in ("flows", "tasks", "fedmentor_core", "infra")
        for path in sorted((ROOT / folder).rglob("*.py"))
    )
]

KEYS = {
    "private key": re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----\s*[A-Za-z0-9+/]{40}"),
    "AWS key id": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{60,})\b"),
    "Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"),
    "Slack token": re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
    "Google key": re.compile(r"\bAIza[0-9A-Za-z_-]{35}\b"),
    "JSON web token": re.compile(r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
    "password in a URL": re.compile(r"\b\w+://[\w.-]*:(?!PASSWORD@|password@)[^\s:@/{}$'\"<>*]{8,}@"),
    "secret by assignment": re.compile(
        r"(?i)\b(?:aws_secret_access_key|secret_key|api_key|auth_string|password|token)\b\s*[:=]\s*['\"][A-Za-z0-9+/_-]{24,}['\"]"
    ),
}
EXAMPLES = {
    "private key": "-----BEGIN EC PRIVATE KEY-----\n" + "MHcCAQEEI" * 6,
    "AWS key id": "AKIA" + "IOSFODNN7" + "EXAMPLE",
    "GitHub token": "ghp_" + "a1" * 18,
    "Hugging Face token": "hf_" + "aB" * 17,
    "Slack token": "xoxb-" + "1234567890ab",
    "Google key": "AIza" + "x" * 35,
    "JSON web token": "eyJ" + "a" * 12 + ".eyJ" + "b" * 12 + "." + "c" * 12,
    "password in a URL": "postgresql://user:" + "correcthorse" + "@host/db",
    "secret by assignment": "password = '" + "x9" * 14 + "'",
}


def tracked() -> list[Path]:
    """Every file that git keeps or would add; without git, every file of ours."""
    found = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = found.stdout.split("\0") if found.returncode == 0 else [str(path) for path in ROOT.rglob("*")]
    paths = [ROOT / name for name in names if name]
    return [path for path in paths if path.is_file() and path.stat().st_size < 2 * 10**6]


@pytest.mark.parametrize("kind", KEYS)
def test_the_patterns_find_what_they_are_for(kind):
    assert KEYS[kind].search(EXAMPLES[kind])


def test_no_secret_is_in_the_repository():
    paths = tracked()
    assert len(paths) > 100
    found = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and pictures
        made_up = path.is_relative_to(ROOT / "tests")  # tests of what is done with a password need one
        found += [
            f"{path.relative_to(ROOT)}: {kind}"
            for kind, pattern in KEYS.items()
            if pattern.search(text) and not (made_up and kind == "password in a URL")
        ]
    assert not found


def test_files_that_hold_secrets_are_ignored():
    for name in ("infra/compose/secrets/prefect_auth", "infra/compose/.env"):
        done = subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT)
        assert done.returncode in (0, 128), name  # 128: not a git checkout


# --- code readers ------------------------------------------------------------------------------------------------------

CHECKPOINT_READER = "fedmentor_core/evaluation/toxicity.py"
"""Opens a checkpoint only when its sha256 is on a list; its module says how."""

BANNED_IMPORTS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
BANNED_CALLS = {
    "eval", "exec", "compile", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "os.system", "os.popen",
    "subprocess.getoutput", "subprocess.getstatusoutput", "torch.load",
}  # fmt: skip


def faults(source: str, place: str) -> list[str]:
    """What a file does that it must not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module)]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            weights_only = called == "torch.load" and keywords.get("weights_only") == "True"
            if called in BANNED_CALLS and not weights_only:
                found.append(f"{place}:{node.lineno}: {called}")
            if keywords.get("shell", "False") != "False":
                found.append(f"{place}:{node.lineno}: a command line for a shell")
            if keywords.get("allow_pickle", "False") != "False":
                found.append(f"{place}:{node.lineno}: allow_pickle")
            if keywords.get("verify") == "False":
                found.append(f"{place}:{node.lineno}: a certificate that nobody checks")
        found += [f"{place}: imports {name}" for name in names if name.split(".")[0] in BANNED_IMPORTS]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval('1')",
        "subprocess.run('ls', shell=True)",
        "numpy.load(path, allow_pickle=True)",
        "httpx.get(url, verify=False)",
    ],
)
def test_the_reader_of_sources_finds_what_it_is_for(source):
    assert faults(source, "x")


def test_nothing_runs_data_as_code():
    assert len(OURS) > 60
    found = [
        fault
        for path in OURS
        for fault in faults(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
        if not (fault.startswith(CHECKPOINT_READER) and ("torch.load" in fault or "pickle" in fault))
    ]
    assert not found


def test_no_stored_object_is_a_pickle():
    """What ships with the package, by its first bytes: a pickle of protocol 2 to 5, or a zip that torch.save wrote."""
    for path in (ROOT / "fedmentor_core").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            head = path.open("rb").read(4)
            assert not re.match(rb"\x80[\x02-\x05]|PK\x03\x04", head), path


# --- secrets in parameters -----------------------------------------------------------------------------------------------


def test_no_flow_parameter_or_configuration_field_is_a_secret():
    """Prefect stores and shows parameters; configurations lie in stores and reports."""
    from fedmentor_core.config import StudyConfig

    schema = StudyConfig.model_json_schema()
    fields = {name for part in [schema, *schema["$defs"].values()] for name in part.get("properties", {})}
    assert "encryption_key_file" in fields, "nested sections are looked into"
    secret = re.compile(r"password|secret|(^|_)token$|credential|access_key|auth_string|(?<!public)_key$")
    assert not {name for name in fields if secret.search(name)}
