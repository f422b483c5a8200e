"""A real MLflow server behind a TCP proxy that can refuse, swallow, or lose answers; and what a server holds of a study."""

import contextlib
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import httpx
from running_stack import free_ports

from tasks.mlflow_connection import mlflow_client

Mode = Literal["pass", "refuse", "swallow", "lose answers"]
TIMES = ("seconds", "round_seconds", "final/seconds_total")


class FlakyMlflow:
    """One MLflow server on sqlite, reached through a proxy on a port of its own."""

    def __init__(self, folder: Path) -> None:
        (self._port,) = free_ports(1)
        self.database = folder / "mlflow.db"
        self.log = (folder / "mlflow.log").open("w")
        self._server = subprocess.Popen(
            [
                sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port),
                "--workers", "1", "--backend-store-uri", f"sqlite:///{self.database}",
                "--artifacts-destination", (folder / "artifacts").as_uri(),
            ],
            stdout=self.log, stderr=self.log, start_new_session=True, cwd=folder,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
        )  # fmt: skip
        self.mode: Mode = "pass"
        self.connections: Counter[str] = Counter()
        self._answers = 0
        self._held: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def wait(self) -> "FlakyMlflow":
        """Until the server is healthy."""
        for _ in range(600):
            assert self._server.poll() is None, Path(self.log.name).read_text()[-2000:]
            try:
                if httpx.get(f"http://127.0.0.1:{self._port}/health", timeout=5).status_code == 200:
                    return self
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise AssertionError("MLflow did not start")

    def close(self) -> None:
        import signal

        os.killpg(self._server.pid, signal.SIGKILL)  # with its worker
        self._server.wait()
        self._listener.close()
        self.log.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections[self.mode] += 1
            if self.mode == "refuse":  # as a port on which nobody listens: reset at once
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
                client.close()
            elif self.mode == "swallow":
                self._held.append(client)
            else:
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.create_connection(("127.0.0.1", self._port))
        threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
        self._pump(server, client, True)

    def _pump(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        """Pass bytes on; a connection that lives on over a change of mode is cut at its next byte."""
        try:
            while data := source.recv(65536):
                if self.mode in ("refuse", "swallow"):
                    break
                if answers and self.mode == "lose answers":
                    self._answers += 1
                    if self._answers % 7 == 0:
                        break
                target.sendall(data)
        except OSError:
            pass
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def metric_rows(database: Path, run_id: str) -> list[tuple[str, int, float]]:
    """Every row of every metric of a run: name, step, value. One query, where the API takes a request per metric."""
    with contextlib.closing(sqlite3.connect(database)) as opened:
        rows = opened.execute("select key, step, value from metrics where run_uuid = ?", (run_id,)).fetchall()
    return [row for row in rows if row[0] not in TIMES]


def held_by(tracking_uri: str, run_id: str, experiment: str, database: Path) -> dict[tuple[str, ...], Any]:
    """All that MLflow holds of a study, by what each run is of; times and ids left out.

    Two runs of one thing, or two rows of one metric at one step, are an error.
    """
    client = mlflow_client(tracking_uri)
    found: dict[tuple[str, ...], Any] = {}
    number = client.get_experiment_by_name(experiment).experiment_id
    for run in client.search_runs([number], f"tags.`fedmentor.run_id` = '{run_id}'", max_results=1000):
        tags = run.data.tags
        name = tuple(tags.get(f"fedmentor.{key}", "") for key in ("role", "round", "client"))
        assert name not in found, f"two runs of {name}"
        rows = metric_rows(database, run.info.run_id)
        assert len(rows) == len({row[:2] for row in rows}), f"a metric of {name} has two rows at one step"
        found[name] = {
            "metrics": sorted(rows),
            "tags": {key: value for key, value in tags.items() if key not in ("mlflow.parentRunId", "mlflow.user")},
            "params": {key: value for key, value in run.data.params.items() if key != "tracking.uri"},
            "status": run.info.status,
            "files": sorted(one.path for one in client.list_artifacts(run.info.run_id)),
            "data": sorted((one.dataset.name, one.dataset.digest) for one in run.inputs.dataset_inputs),
        }
    return found
