"""Runs ``fedmentor up``, ``status`` and ``down`` as a user does, and looks for what they leave behind."""

import json
import os
import random
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now. They are held together, so that they differ."""
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def free_block(count: int = 8) -> int:
    """The first of ``count`` ports in a row that nobody listens on now, below those that the system hands out."""
    for first in random.SystemRandom().sample(range(15_000, 30_000, count), 200):
        held = [socket.socket() for _ in range(count)]
        try:
            for offset, one in enumerate(held):
                one.bind(("127.0.0.1", first + offset))
            return first
        except OSError:
            continue
        finally:
            for one in held:
                one.close()
    raise RuntimeError("no free ports in a row")


@dataclass
class RunningStack:
    """One stack folder with ports of its own."""

    folder: Path
    ports: list[int] = field(default_factory=lambda: [*free_ports(2), free_block()])
    env: dict[str, str] = field(default_factory=dict)

    def command(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command on this stack's folder to its end."""
        return subprocess.run(
            self.line(name, *arguments), env=self.environment(), capture_output=True, text=True, cwd=ROOT, timeout=500
        )

    def up(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``fedmentor up`` on this stack's ports."""
        return self.command("up", *self.port_options(), *arguments)

    def status(self) -> dict:
        """``fedmentor status --json``, with its exit code under ``exit_code``."""
        done = self.command("status", "--json")
        return {**json.loads(done.stdout), "exit_code": done.returncode}

    def line(self, name: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "flows.cli", name, "--dir", str(self.folder), *arguments]

    def port_options(self) -> list[str]:
        names = ("--prefect-port", "--mlflow-port", "--s3-port")
        return [text for name, port in zip(names, self.ports, strict=True) for text in (name, str(port))]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "COLUMNS": "160", **self.env}

    def remembered(self) -> dict:
        return json.loads((self.folder / "stack.json").read_text())

    def processes(self) -> dict[int, str]:
        """Every living process that carries this stack's mark, children included: pid and service."""
        if not (self.folder / "stack.json").exists():
            return {}  # written before the first process is waited for
        stack_id = self.remembered()["stack_id"]
        found = {}
        for process in psutil.process_iter():
            try:
                mark = process.environ().get("FEDMENTOR_STACK", "")
                if mark.startswith(stack_id) and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = mark.split("/")[1]
            except (psutil.Error, OSError):
                continue
        return found
