"""A Prefect server and workers as processes of the test, each with an environment and, where it may, rights of its own."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest

from flows.prefect_database import put_database
from flows.stack import provisioning
from flows.stack.settings import SiteSettings, StackSettings
from flows.stack.state import StackFolder

ROOT = Path(__file__).resolve().parents[2]
GROUPS = {"site-a": 30001, "site-b": 30002}
WALLED = os.geteuid() == 0 and shutil.which("setpriv") is not None
"""Processes without capabilities and with a group of their own: then a folder's permissions hold even for root."""

Found = TypeVar("Found")


class PrefectService:
    """Processes of the test by name, and the API of the Prefect server among them."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))
            self.port = held.getsockname()[1]
        self.folder = folder
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        self.client = httpx.Client(timeout=60, trust_env=False)

    def start_server(self) -> None:
        """A server with the work pools and deployments of ``prefect.yaml``, and a worker of the pool 'server'."""
        put_database(Path(self.environment("prefect")["PREFECT_HOME"]))
        self.start("prefect", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port))
        until(lambda: answers(f"http://127.0.0.1:{self.port}/api/health"), 240, "Prefect's server")
        sites = tuple(SiteSettings(name=name) for name in GROUPS)
        settings, stack = StackSettings(prefect_port=self.port, sites=sites), StackFolder(self.folder / "stack")
        for path in (stack.logs, stack.data / "prefect"):
            path.mkdir(parents=True)
        provisioning.make_work_pools(settings)
        provisioning.deploy(settings, stack)
        self.start_worker("server")

    def start_worker(self, name: str, **environment: str) -> None:
        """A worker of the pool of that name."""
        self.start(name, "prefect", "worker", "start", "--type", "process", "--pool", name, **environment)

    def environment(self, name: str, **more: str) -> dict[str, str]:
        home = self.folder / "homes" / name
        home.mkdir(parents=True, exist_ok=True)
        keep = {key: os.environ[key] for key in ("PATH", "LANG", "HF_HUB_OFFLINE", "PYTHONPATH") if key in os.environ}
        return keep | {
            "HOME": str(home),
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "DO_NOT_TRACK": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            **more,
        }

    def command(self, name: str, *arguments: str) -> list[str]:
        line = [sys.executable, *arguments]
        if not WALLED:
            return line
        groups = ["--groups", str(GROUPS[name])] if name in GROUPS else ["--clear-groups"]
        return ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *groups, *line]

    def start(self, name: str, *arguments: str, **more: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.started[name] = subprocess.Popen(
                self.command(name, "-m", *arguments),
                env=self.environment(name, **more),
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-6000:]

    def kill(self, name: str, *, children_only: bool = False) -> None:
        """SIGKILL a process and all its children, or the children alone."""
        try:
            process = psutil.Process(self.started[name].pid)
            found = process.children(recursive=True) + ([] if children_only else [process])
        except psutil.NoSuchProcess:
            return
        for one in found:
            try:
                one.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        if not children_only:
            self.started.pop(name).wait(20)

    def stop(self) -> None:
        """End all, the newest first."""
        for name in reversed(list(self.started)):
            self.kill(name)

    # --- what Prefect says --------------------------------------------------------------------------------------

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """One request to Prefect's API, made again while its SQLite is locked, as Prefect's own client does."""
        url = f"http://127.0.0.1:{self.port}/api{path}"

        def ask() -> httpx.Response | None:
            try:
                answer = self.client.get(url) if body is None else self.client.post(url, json=body)
            except httpx.TimeoutException:
                if path.endswith("/create_flow_run"):
                    raise  # it may have been made
                return None
            return None if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE else answer

        answer = until(ask, 240, f"Prefect's answer to {path}")
        assert answer.is_success, (path, answer.text)
        return json.loads(answer.text)

    def start_deployment(self, name: str, **parameters: Any) -> str:
        """Start a run of a deployment, as the UI does; its id."""
        deployment = self.call(f"/deployments/name/{name}")
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return str(self.call(f"/deployments/{deployment['id']}/create_flow_run", body)["id"])

    def ended(self, run_id: str, seconds: float = 500) -> str:
        """Wait for a run's end; the type of its state."""

        def end() -> str | None:
            state = self.call(f"/flow_runs/{run_id}")["state_type"]
            return state if state in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None

        return until(end, seconds, f"flow run {run_id}", every=1.0)

    def runs_of(self, flow: str, state: str) -> list[str]:
        """Names of a flow's runs that ended so."""
        runs = self.call("/flow_runs/filter", {"flows": {"name": {"any_": [flow]}}})
        return [run["name"] for run in runs if run["state_type"] == state]


def until(what: Callable[[], Found | None], seconds: float, why: str, *, every: float = 0.1) -> Found:
    """Wait for ``what()`` to be something, looking every so many seconds, and give it back."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(every)
    pytest.fail(f"waited {seconds:g} s: {why}")


def answers(url: str) -> bool:
    """Whether something answers there."""
    try:
        return httpx.get(url, timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False
