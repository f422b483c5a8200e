"""The comparison as a Prefect flow: cells as mapped tasks, one MLflow run, and what failed said at the end."""

import asyncio
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from fedmentor_core.compare import comparison as comparison_module
from fedmentor_core.compare.records import ComparisonTable
from fedmentor_core.compare.settings import CompareSettings
from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import ConfigError, FedMentorError
from tasks.tracking import mlflow_client

SETTINGS = CompareSettings(arms=("base", "federated", "fedmentor"), seeds=2, budgets=())


@pytest.fixture(scope="module", autouse=True)
def prefect_server():
    """A throw-away Prefect server and database."""
    from prefect_harness import throwaway_prefect

    with throwaway_prefect():
        yield


@pytest.fixture
def study(tiny_study: dict[str, Any]) -> dict[str, Any]:
    tiny_study["rounds"] = 1
    tiny_study["training"] |= {"steps_per_round": 1, "batch_size": 4}
    tiny_study["evaluation"] |= {"max_gate_examples": 2, "max_test_examples": 2, "max_new_tokens": 4}
    return tiny_study


def task_runs() -> list[str]:
    """Names of the cells' task runs, as the UI shows them."""
    from prefect.client.orchestration import get_client

    async def read() -> list[str]:
        async with get_client() as client:
            return [run.name for run in await client.read_task_runs(limit=200) if ", seed " in run.name]

    return asyncio.run(read())


def progress_and_lines(expected_lines: int) -> tuple[list[float], list[str]]:
    """What the progress artifacts show at the end, oldest first, and the log lines about cells.

    Prefect sends its log in batches, after the fact: as long as fewer lines are there, they are waited for.
    """
    from prefect.client.orchestration import get_client

    async def read() -> tuple[list[float], list[str]]:
        async with get_client() as client:
            found = [one for one in await client.read_artifacts() if one.type == "progress"]
            deadline = time.monotonic() + 60
            while True:
                logs = [one for one in await client.read_logs(limit=200) if one.message.startswith("cell ")]
                if len(logs) >= expected_lines or time.monotonic() > deadline:
                    break
                await asyncio.sleep(0.5)
        ordered = sorted(found, key=lambda one: one.created)
        return [float(one.data) for one in ordered], [one.message for one in logs]

    return asyncio.run(read())


@pytest.mark.slow
def test_cells_are_mapped_tasks_and_mlflow_has_one_run(study, tmp_path: Path, monkeypatch, caplog) -> None:
    from flows.compare import comparison

    caplog.set_level(logging.INFO, logger="prefect.flow_runs")  # a command that ran in this process silenced it
    out = tmp_path / "out"
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = validate_config({**study, "tracking": {"uri": uri}})
    failing: dict[str, Any] = {**comparison_module.PROCEDURES, "untrained": _explode}
    with monkeypatch.context() as patch:
        patch.setattr(comparison_module, "PROCEDURES", failing)
        with pytest.raises(FedMentorError, match=r"2 of 6 cells failed.*base, seed 3: failed with ValueError"):
            comparison(config, SETTINGS, str(out))
    partial = ComparisonTable.model_validate_json((out / "table.json").read_text(encoding="utf-8"))
    assert [arm.name for arm in partial.arms] == ["federated", "fedmentor"]
    finished = {path: path.read_bytes() for path in out.rglob("result.json")}
    assert len(finished) == 4

    table = comparison(config, SETTINGS, str(out))
    assert [arm.name for arm in table.arms] == ["base", "federated", "fedmentor"]
    assert {path: path.read_bytes() for path in finished} == finished
    assert json.loads((out / "table.json").read_text(encoding="utf-8")) == json.loads(table.model_dump_json())
    cells = sorted(f"{arm}, seed {seed}" for arm in SETTINGS.arms for seed in (3, 4))
    assert sorted(task_runs()) == sorted(cells * 2), "six cells, two starts"
    shown, lines = progress_and_lines(expected_lines=2 + 4 + 2)
    assert shown == [100.0, 100.0], "untrained cells have no steps; the second start had only those to do"
    assert sum("failed" in line for line in lines) == 2
    assert sum(" done" in line for line in lines) == 4 + 2
    assert "left in all" in " ".join(lines)

    client = mlflow_client(uri)
    experiment = client.get_experiment_by_name("fedmentor")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1, "the second start has the same run"
    assert runs[0].info.status == "FINISHED"
    assert runs[0].data.metrics["fedmentor.rouge_l"] == table.arms[2].metrics["rouge_l"].mean
    assert "base.bertscore_f1.difference" in runs[0].data.metrics
    files = {one.path for one in client.list_artifacts(runs[0].info.run_id)}
    assert files == {"table.json", "table.csv", "table.md", "compare.html"}


def test_a_flow_refuses_what_the_command_refuses(study, tmp_path: Path) -> None:
    from flows.compare import comparison

    private = {**study["evaluation"], "gate_data": "private"}
    with pytest.raises(ConfigError, match="gate_data"):
        comparison(validate_config({**study, "evaluation": private}), SETTINGS, str(tmp_path / "out"))
    hurried = SETTINGS.model_copy(update={"max_minutes": 1e-4})
    with pytest.raises(ConfigError, match="max_minutes"):
        comparison(validate_config(study), hurried, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def _explode(*_: Any) -> Any:
    raise ValueError
