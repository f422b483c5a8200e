"""A study over two machines: a local Ray cluster of two nodes with one core each, and one Prefect server.

Each client needs a core, so each node takes one client.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
import yaml
from running_stack import free_ports

from fedmentor_core.config_io import validate_config
from fedmentor_core.rounds import find_manifest
from fedmentor_core.study import run_study
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import workspace_of

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """For everything that is started: one thread each, and a home of Prefect by which its servers are known."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PREFECT_LOGGING_LEVEL", "INFO")  # whatever an earlier test has made of it
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # here too: an adapter is compared by its bits
    try:
        yield dict(os.environ)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def two_nodes(environment: dict[str, str]) -> Iterator[str]:
    """The address of a cluster of two nodes; a client needs all that one of them has."""
    pytest.importorskip("prefect_ray", reason="Ray is not installed: pip install 'fedmentor[ray]'")
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **small})
    try:
        cluster.add_node(num_cpus=1, **small)
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        cluster.shutdown()


@contextmanager
def prefect_server(environment: dict[str, str], log: Path) -> Iterator[str]:
    """A real server process; its API's URL."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}/api"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            env=environment, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        _wait_until_healthy(server, url)
        yield url
    finally:
        family = [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]
        for one in family:
            one.terminate()
        for one in psutil.wait_procs(family, timeout=20)[1]:
            one.kill()


def _wait_until_healthy(server: subprocess.Popen, url: str) -> None:
    for _ in range(600):
        assert server.poll() is None
        try:
            if httpx.get(f"{url}/health", trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    pytest.fail("the Prefect server did not start")


def test_two_clients_on_two_nodes_give_the_adapter_of_one_process(tiny_study, tmp_path, environment, two_nodes):
    tiny_study["rounds"] = 2
    tiny_study["privacy"] = {"noise_seed": 5}
    tiny_study["adaptation"] = {"rule": "fixed"}  # so the second round trains while the first is evaluated
    plain = run_study(open_study(validate_config(tiny_study), tmp_path / "plain"))

    tiny_study["execution"] = {
        "task_runner": "ray", "ray_address": two_nodes, "cpus_per_client": 1, "shared_folders": True,
    }  # fmt: skip
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(tiny_study))
    out = tmp_path / "out"
    with prefect_server(environment, tmp_path / "server.log") as url:
        code, said, servers = _run(file, out, {**environment, "PREFECT_API_URL": url})
        assert code == 0, said[-2000:]
        trained = _task_runs(url, "train-client")
        evaluated = _task_runs(url, "evaluate")
        logs = httpx.post(f"{url}/logs/filter", json={"limit": 200}, trust_env=False).json()

    summary = json.loads((out / "summary.json").read_text())
    assert [c["status"] for one in summary["rounds"] for c in one["clients"]] == ["trained"] * 4
    assert _adapters(tiny_study, out) == _adapters(tiny_study, tmp_path / "plain")
    assert_same_scores(summary["final"], json.loads(plain.model_dump_json(by_alias=True))["final"])

    nodes = {line["message"].rsplit(" ", 1)[1] for line in logs if "trains on Ray node" in line["message"]}
    assert len(nodes) == 2, "each node took a client"
    assert [run["state_type"] for run in trained] == ["COMPLETED"] * 4
    assert len({run["flow_run_id"] for run in trained}) == 1, "both rounds' clients were started in the first"
    assert [run["state_type"] for run in evaluated] == ["COMPLETED"] * 10, "two sets before, one a round, one after"
    assert len(servers) == 1, "all machines talk to one server"
    assert "Traceback" not in said


def assert_same_scores(one: Any, other: Any) -> None:
    """Equal, numbers within 1e-5: sums of another process may be split over another number of threads."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same_scores(one[name], other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same_scores(left, right)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
    else:
        assert one == other


def _run(file: Path, out: Path, environment: dict[str, str]) -> tuple[int, str, set[int]]:
    """``fedmentor run`` to its end: exit code, what it said, and all Prefect servers that were seen meanwhile."""
    log = out.parent / "run.log"
    command = [sys.executable, "-m", "flows.cli", "run", "-c", str(file), "-o", str(out), "--plain"]
    servers: set[int] = set()
    with log.open("wb") as output:
        run = subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=ROOT)
    try:
        while run.poll() is None:
            servers |= _prefect_servers(environment["PREFECT_HOME"])
            time.sleep(0.5)
    finally:
        run.kill()
    return run.returncode, log.read_text(), servers


def _prefect_servers(home: str) -> set[int]:
    found = set()
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            if "prefect server start" in line or "prefect.server.api.server:create_app" in line:
                found |= {process.pid} if process.environ().get("PREFECT_HOME") == home else set()
        except psutil.Error:
            continue
    return found


def _task_runs(url: str, name: str) -> list[dict]:
    found = httpx.post(f"{url}/task_runs/filter", json={"limit": 200}, trust_env=False).json()
    return [run for run in found if run["task_key"].startswith(f"{name.replace('-', '_')}") or name in run["name"]]


def _adapters(study: dict, out: Path) -> list[str]:
    workspace = workspace_of(open_study(validate_config(study), out))
    manifests = [find_manifest(workspace, index) for index in range(study["rounds"])]
    return [manifest.adapter.sha256 for manifest in manifests if manifest is not None]
