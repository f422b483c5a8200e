"""The command line as a user meets it: exit codes, messages, the summary's contract, resume after ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fedmentor_core.errors import ConfigError
from fedmentor_core.privacy.ledger import Ledger
from fedmentor_core.storage.local import LocalStore
from flows import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("prefect-home")


@pytest.fixture
def environment(prefect_home) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}  # MLflow sets it
    return {**kept, "PREFECT_HOME": str(prefect_home), "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}


@pytest.fixture
def config_file(tiny_study, tmp_path) -> Path:
    tiny_study["tracking"] = {}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_study), encoding="utf-8")
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "flows.cli", *map(str, arguments)]


def call(capsys, monkeypatch, *arguments: object) -> tuple[int, str, str]:
    """Run in this process, for commands that need no Prefect."""
    monkeypatch.setattr(sys, "argv", ["fedmentor", *map(str, arguments)])
    monkeypatch.setenv("PREFECT_HOME", os.environ.get("PREFECT_HOME", "unused"))  # restored after the test
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


@pytest.mark.slow
def test_a_whole_run_its_summary_and_the_second_start(config_file, environment, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    first = subprocess.run(
        command("run", "-c", config_file, "-o", out, "--plain"),
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert first.returncode == 0, first.stderr[-2000:]
    assert "Traceback" not in first.stderr
    assert "report.html" in first.stdout
    _check_summary_contract(json.loads((out / "summary.json").read_text()))
    assert "<html" in (out / "report.html").read_text()[:500].lower()

    code, shown, _ = call(capsys, monkeypatch, "run", "-c", config_file, "-o", out, "--json")
    assert code == 0
    assert json.loads(shown) == json.loads((out / "summary.json").read_text())

    code, _, message = call(capsys, monkeypatch, "run", "-c", config_file, "-o", out, "--set", "seed=99")
    assert code == 2
    assert "already holds study" in message

    code, shown, _ = call(capsys, monkeypatch, "ledger", "--out", out, "--json")
    account = json.loads(shown)
    assert account["verified"] is True
    for domain in account["domains"]:
        assert domain["epsilon_spent"] <= domain["epsilon_budget"]
        assert [entry["kind"] for entry in domain["entries"]] == ["plan", "charge", "release", "charge", "release"]

    code, shown, _ = call(
        capsys, monkeypatch, "generate", "--out", out, "--post", "I sleep badly.", "--question", "Is it so?", "--json"
    )
    assert code == 0
    assert len(json.loads(shown)["answers"]) == 1


@pytest.mark.slow
def test_ctrl_c_in_the_middle_then_the_same_command_resumes(config_file, environment, tmp_path):
    out = tmp_path / "out"
    arguments = command("run", "-c", config_file, "-o", out, "--plain", "--set", "training.steps_per_round=24")
    running = subprocess.Popen(
        arguments,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    ledger = Ledger(LocalStore(out / "store"), "two")
    _wait_for(lambda: any(e.kind == "charge" for e in ledger.entries()), running, seconds=240)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 1, errors[-2000:]
    assert "resume" in errors
    assert not (out / "summary.json").exists()
    kept = json.loads((out / "study.json").read_text())["run_id"]
    released = out / "store" / "runs" / kept / "rounds" / "0000" / "clients" / "one" / "update-000.safetensors"
    first_bytes = released.read_bytes()

    again = subprocess.run(arguments, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert again.returncode in (0, 3), again.stderr[-2000:]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["run_id"] == kept
    assert released.read_bytes() == first_bytes
    for view in (Ledger(LocalStore(out / "store"), name).view() for name in ("one", "two")):
        assert view.epsilon_spent <= view.epsilon_budget
    one = Ledger(LocalStore(out / "store"), "one").entries()
    assert [e.attempt for e in one if e.kind == "charge" and e.round_index == 0] == [0], (
        "what was released is not redone"
    )


BAD_INPUT = {
    "unknown key": (["--set", "traning.x=1"], "unknown key"),
    "impossible value": (["--set", "rounds=0"], "greater than or equal to 1"),
    "contradiction": (["--set", "domains.one.sensitivity=low"], "exactly one of"),
    "missing backbone": (["--set", "backbone.name=./nowhere"], "does not exist"),
    "lora target": (["--set", "adapter.target_modules=[nothing_proj]"], "match no linear module"),
    "too few units": (["--set", "training.batch_size=500"], "fewer than training.batch_size"),
    "missing file": (
        ["--set", "domains.one.source={kind: csv, path: ./no.csv, columns: {post: a, response: b, question: c}}"],
        "no.csv",
    ),
    "no such store": (["--set", "storage.url=ftp://x"], "storage.url"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_and_nothing_is_written(name, config_file, tmp_path, capsys, monkeypatch):
    arguments, expected = BAD_INPUT[name]
    out = tmp_path / "out"
    code, _, message = call(capsys, monkeypatch, "run", "-c", config_file, "-o", out, "-q", *arguments)
    assert code == 2, message
    assert expected in message
    assert "Traceback" not in message
    assert not (out / "study.json").exists()
    assert not (out / "store").exists()


def test_a_budget_too_small_for_the_plan_is_exit_3(config_file, tmp_path, capsys, monkeypatch):
    code, _, message = call(
        capsys, monkeypatch, "run", "-c", config_file, "-o", tmp_path / "out", "-q",
        "--set", "domains.one.epsilon=0.001", "--set", "privacy.epsilon_by_sensitivity={low: .001, medium: .001, high: .001}",
    )  # fmt: skip
    assert code == 3
    assert "too small" in message
    assert not (tmp_path / "out" / "study.json").exists()


def test_a_foreign_folder_is_left_alone(config_file, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text("{}")
    code, _, message = call(capsys, monkeypatch, "run", "-c", config_file, "-o", tmp_path / "out", "-q")
    assert code == 2
    assert "not a study of ours" in message
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["summary.json"]


def test_plan_as_json_has_its_contract(config_file, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fedmentor", "plan", "-c", str(config_file), "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    made = json.loads(capsys.readouterr().out)
    assert set(made) >= {"domains", "bytes_per_round", "refusals"}
    for domain in made["domains"]:
        assert set(domain) >= {
            "domain", "n_units", "sample_rate", "steps_per_round", "rounds", "noise_multiplier", "clip_norm", "delta",
            "epsilon_budget", "epsilon_planned_rdp", "epsilon_planned_prv", "bytes_up_per_round", "bytes_down_per_round",
        }  # fmt: skip
        assert domain["epsilon_planned_rdp"] <= domain["epsilon_budget"]


@pytest.mark.parametrize("name", ["run", "plan", "ledger", "report", "generate", "promote", "rollback", "track"])
def test_every_command_has_help_with_an_example(name, capsys, monkeypatch):
    code, shown, _ = call(capsys, monkeypatch, name, "--help")
    assert code == 0
    assert "Example" in shown


def test_a_wrong_flag_is_exit_2(capsys, monkeypatch):
    code, _, message = call(capsys, monkeypatch, "run", "--nonsense")
    assert code == 2
    assert "nonsense" in message


def _wait_for(condition, process, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def _check_summary_contract(summary: dict) -> None:
    assert set(summary) >= {
        "schema_version", "run_id", "status", "config_sha256", "backbone", "adapter", "baseline", "rounds", "final", "model",
        "seconds_total",
    }  # fmt: skip
    assert set(summary["backbone"]) >= {"name", "n_parameters"}
    assert set(summary["adapter"]) >= {"rank", "target_modules", "n_trainable"}
    scores = {"bertscore_f1", "rouge_l", "label_f1", "safe_rate", "toxicity_mean"}
    assert set(summary["baseline"]) >= scores
    assert set(summary["final"]) >= scores
    for one in summary["rounds"]:
        assert set(one) >= {"round_index", "clients", "metrics", "gate", "noise_changes", "bytes_total", "seconds"}
        assert set(one["metrics"]) >= scores | {"toxicity_max", "by_domain"}
        assert set(one["gate"]) >= {"passed", "reasons"}
        for change in one["noise_changes"]:
            assert set(change) == {"domain", "from", "to", "reason"}
        for client in one["clients"]:
            assert set(client) >= {
                "domain", "status", "n_units", "sample_rate", "steps", "noise_multiplier", "clip_norm", "epsilon_spent",
                "epsilon_budget", "delta", "bytes_up", "bytes_down", "seconds",
            }  # fmt: skip
            assert client["epsilon_spent"] <= client["epsilon_budget"]
    assert set(summary["model"]) >= {"name", "version", "aliases"}


def test_a_study_tracked_elsewhere_is_found_by_its_summary(tmp_path):
    with pytest.raises(ConfigError, match=r"no mlflow\.db and no summary"):
        cli._tracking_uri(tmp_path, None)
    (tmp_path / "summary.json").write_text(json.dumps({"tracking_uri": "http://127.0.0.1:5000"}), encoding="utf-8")
    assert cli._tracking_uri(tmp_path, None) == "http://127.0.0.1:5000"
    (tmp_path / "mlflow.db").touch()
    assert cli._tracking_uri(tmp_path, None) == f"sqlite:///{tmp_path.resolve() / 'mlflow.db'}"
