"""``fedmentor compare`` as a user meets it: a whole grid, a kill in its middle, exit codes, and joined tables."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from flows import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config_file(tiny_study, tmp_path) -> Path:
    tiny_study["rounds"] = 1
    tiny_study["training"] |= {"steps_per_round": 1, "batch_size": 4}
    tiny_study["evaluation"] |= {"max_gate_examples": 2, "max_test_examples": 2, "max_new_tokens": 4}
    tiny_study["tracking"] = {}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_study), encoding="utf-8")
    return path


def call(capsys, monkeypatch, *arguments: object) -> tuple[int, str, str]:
    """Run in this process."""
    monkeypatch.setattr(sys, "argv", ["fedmentor", "compare", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def results(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("result.json")}


@pytest.mark.slow
def test_a_grid_killed_in_its_middle_goes_on_from_its_finished_cells(config_file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    grid = ["-c", config_file, "-o", out, "--arms", "base,local,centralized,federated,fedmentor"]
    grid += ["--seeds", "2", "--budgets", "2", "--plain"]
    environment = {**os.environ, "COLUMNS": "160", "MLFLOW_TRACKING_URI": ""}
    with subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "compare", *map(str, grid)],
        env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    ) as started:  # fmt: skip
        while len(results(out)) < 3 and started.poll() is None:
            time.sleep(0.05)
        assert started.poll() is None, started.stderr.read().decode()[-2000:]
        os.killpg(started.pid, signal.SIGKILL)
    finished = results(out)
    assert 3 <= len(finished) < 11
    assert not (out / "table.json").exists()

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    code, shown, _ = call(capsys, monkeypatch, *grid)
    assert code == 0, shown[-2000:]
    assert {path: path.read_bytes() for path in finished} == finished
    assert shown.count("was finished before") == len(finished)
    assert len(results(out)) == 11
    for word in ("NOT PRIVATE", "Differences from federated", "Every domain at one epsilon", "would have lost in sum"):
        assert word in " ".join(shown.split())

    table = json.loads((out / "table.json").read_text())
    assert [arm["name"] for arm in table["arms"]] == ["base", "local", "centralized", "federated", "fedmentor"]
    assert {"arm", "against", "metric", "mean", "ci95", "p_value"} <= set(table["differences"][0])
    assert [point["epsilon"] for point in table["frontier"]] == [2.0, None]
    assert (out / "mlflow.db").is_file()

    code, shown, _ = call(capsys, monkeypatch, *grid, "--json")
    assert code == 0
    assert json.loads(shown)["arms"] == table["arms"]

    code, shown, _ = call(capsys, monkeypatch, "--join", out, "-o", tmp_path / "joined", "--json")
    assert code == 0
    assert json.loads(shown)["differences"] == table["differences"]

    other = ["-c", config_file, "-o", tmp_path / "other", "--arms", "base", "--against", "base", "--budgets", "none"]
    code, shown, message = call(
        capsys, monkeypatch, *other, "--set", "data.split_seed=5", "--reuse", out, "--no-tracking", "-q"
    )
    assert code == 2
    assert "splits.one:" in message


def test_wrong_input_is_told_without_a_traceback(config_file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    for arguments, word in (
        (["--arms", "base,federatd"], "Did you mean 'federated'"),
        (["--budgets", "1,many"], "--budgets needs numbers"),
        (["--join", tmp_path], "holds no comparison"),
        (["--join", tmp_path, "--seeds", "2"], "--seeds has no meaning"),
        (["--set", "evaluation.gate_data=private"], "gate_data"),
        (["--set", "privacy.noise_seed=1"], "noise_seed"),
        (["--max-minutes", "0.0001", "--seeds", "1", "--budgets", "none"], "the grid would take about"),
    ):
        code, _, message = call(capsys, monkeypatch, "-c", config_file, "-o", out, *arguments)
        assert code == 2, message
        assert word in message
        assert "Traceback" not in message
    code, _, message = call(capsys, monkeypatch, "-c", config_file, "-o", out, "--budgets", "0.0001", "--seeds", "1")
    assert code == 3
    assert "uniform at epsilon 0.0001" in message
    assert not out.exists(), "nothing was started"


def test_a_dry_run_says_what_would_run_and_writes_nothing(config_file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    code, shown, _ = call(
        capsys, monkeypatch, "-c", config_file, "-o", out, "--dry-run", "--seeds", "1", "--budgets", "2,8"
    )
    assert code == 0
    assert "To run: 9 cells, about" in shown
    assert "in sum: one epsilon" in shown
    assert not out.exists()
