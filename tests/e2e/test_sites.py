"""A study over two sites as it is in production: a Prefect server, two workers with environments of their own.

The server is told no path of a site's data and may not read it. One site is killed in the middle of its training: the
round goes on with the other one, and the candidate, which nobody evaluated at the dead site, does not pass its gate.
"""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from fedmentor_core.data import invented
from fedmentor_core.site.signing import make_key_file
from flows.stack import provisioning
from flows.stack.settings import SiteSettings, StackSettings
from flows.stack.state import StackFolder

ROOT = Path(__file__).resolve().parents[2]
MARK = "QZXJ-unmistakable-words"
GROUPS = {"site-a": 30001, "site-b": 30002}
WALLED = os.geteuid() == 0 and shutil.which("setpriv") is not None
"""Processes without capabilities and with a group of their own: then a folder's permissions hold even for root."""


class Running:
    """Processes of the test, each with its own environment; all are ended at the end, children included."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port, self.started = folder, port, {}

    def environment(self, name: str, **more: str) -> dict[str, str]:
        home = self.folder / "homes" / name
        home.mkdir(parents=True, exist_ok=True)
        keep = {key: os.environ[key] for key in ("PATH", "LANG", "HF_HUB_OFFLINE") if key in os.environ}
        return keep | {
            "HOME": str(home),
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "DO_NOT_TRACK": "1",
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

    def start(self, name: str, *arguments: str, **more: str) -> subprocess.Popen:
        log = (self.folder / f"{name}.log").open("wb")
        self.started[name] = subprocess.Popen(
            self.command(name, "-m", *arguments), env=self.environment(name, **more), cwd=ROOT, stdout=log, stderr=log
        )
        return self.started[name]

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def kill(self, name: str, *, children_only: bool = False) -> None:
        process = psutil.Process(self.started[name].pid)
        found = process.children(recursive=True) + ([] if children_only else [process])
        for one in found:
            one.send_signal(signal.SIGKILL)

    def stop(self) -> None:
        for process in reversed(self.started.values()):
            try:
                tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
            for one in tree:
                try:
                    one.kill()
                except psutil.NoSuchProcess:
                    continue
            process.wait(20)


def until(what, seconds: float, why: str):
    """Wait for ``what()`` to be something, and give it back."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.05)
    pytest.fail(f"waited {seconds:g} s: {why}")


def make_site(folder: Path, site: str, domain: str, corpus: str, store: str) -> tuple[Path, str]:
    """A site's folder: posts, policy, key, ledger and file; only its group may look into its data."""
    place = folder / site
    data = place / f"data-of-{site}"
    data.mkdir(parents=True)
    with (data / "posts.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["text", "question", "answer"])
        for row in invented.generate(corpus, 90, 3):
            writer.writerow([f"{MARK} {row['post']}", row["question"], row["response"]])
    policy = {"domain": domain, "epsilon": 8.0, "validation_epsilon": 60.0}
    (place / "policy.yaml").write_text(yaml.safe_dump(policy))
    public_key = make_key_file(place / "site.key")
    columns = {"post": "text", "question": "question", "response": "answer"}
    described = {
        "site": site,
        "store": {"url": store},
        "ledger_url": (place / "ledger").as_uri(),
        "signing_key_file": "site.key",
        "domains": {
            domain: {
                "source": {"kind": "csv", "path": "posts.csv", "columns": columns},
                "data_root": data.name,
                "policy_file": "policy.yaml",
            }
        },
    }
    (place / "site.yaml").write_text(yaml.safe_dump(described))
    if WALLED:
        for path in (data, data / "posts.csv"):
            os.chown(path, 40000, GROUPS[site])
            path.chmod(0o750 if path.is_dir() else 0o640)
    return place, public_key


@pytest.fixture
def running(tmp_path):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    made = Running(tmp_path, port)
    yield made
    made.stop()


def runs(running: Running, state: str) -> list[str]:
    """Names of the runs of client-site that ended so."""
    answer = httpx.post(
        f"http://127.0.0.1:{running.port}/api/flow_runs/filter",
        json={"flows": {"name": {"any_": ["client-site"]}}},
        timeout=30,
        trust_env=False,
    )
    return [run["name"] for run in answer.json() if run["state_type"] == state]


@pytest.mark.slow
def test_a_study_over_two_sites_survives_the_death_of_one(running, tmp_path, tiny_study):
    store = (tmp_path / "store").as_uri()
    corpora = [domain["source"]["corpus"] for domain in tiny_study["domains"]]
    place_a, key_a = make_site(tmp_path / "sites", "site-a", "one", corpora[0], store)
    place_b, key_b = make_site(tmp_path / "sites", "site-b", "two", corpora[1], store)
    study = tiny_study | {
        "rounds": 1,
        "domains": [
            {"name": "one", "source": {"kind": "site"}, "site": "site-a", "epsilon": 8.0},
            {"name": "two", "source": {"kind": "site"}, "site": "site-b", "epsilon": 8.0},
        ],
        "sites": {
            name: {"public_key": key, "start_within_seconds": 15, "deadline_seconds": 600, "poll_seconds": 0.5}
            for name, key in (("site-a", key_a), ("site-b", key_b))
        },
        "training": tiny_study["training"] | {"steps_per_round": 40},
        "evaluation": tiny_study["evaluation"] | {"gate_data": "private", "private": {"epsilon": 50.0}},
        "execution": {"client_retries": 0},
        "storage": {"url": store},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))

    running.start("prefect", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(running.port))
    health = f"http://127.0.0.1:{running.port}/api/health"
    until(lambda: answers(health), 240, "Prefect's server")
    settings = StackSettings(
        prefect_port=running.port, sites=(SiteSettings(name="site-a"), SiteSettings(name="site-b"))
    )
    folder = StackFolder(tmp_path / "stack")
    for path in (folder.logs, folder.data / "prefect"):
        path.mkdir(parents=True)
    provisioning.make_work_pools(settings)
    provisioning.deploy(settings, folder)
    worker = ("prefect", "worker", "start", "--type", "process", "--pool")
    running.start("site-a", *worker, "site-a", FEDMENTOR_SITE_FILE=str(place_a / "site.yaml"))
    running.start("site-b", *worker, "site-b", FEDMENTOR_SITE_FILE=str(place_b / "site.yaml"))

    out = tmp_path / "out"
    arguments = ("flows.cli", "run", "--config", str(tmp_path / "study.yaml"), "--out", str(out), "--json")
    if WALLED:
        for name in ("server", "site-b"):
            assert "PermissionError" in look_into(running, name, place_a / "data-of-site-a")
        assert look_into(running, "site-a", place_a / "data-of-site-a") == ""
    server = running.start("server", *arguments)

    until(lambda: charged(place_b) or server.poll() is not None, 600, "site-b's training")
    assert server.poll() is None, running.log("server")
    running.kill("site-b", children_only=True)
    crashed = until(lambda: runs(running, "CRASHED"), 120, "the crash")
    assert crashed[0].startswith("train two for tiny-")
    running.kill("site-b")
    server.wait(400)

    summary = json.loads((out / "summary.json").read_text())
    clients = {client["domain"]: client for client in summary["rounds"][0]["clients"]}
    assert clients["one"]["status"] == "trained"
    assert clients["two"]["status"] == "failed"
    assert "site-b" in clients["two"]["reason"]
    assert clients["two"]["epsilon_spent"] > 0, "a charge that may stand is counted"
    assert summary["status"] == "held"
    assert any("'two' was not evaluated" in reason for reason in summary["rounds"][0]["gate"]["reasons"])
    assert set(summary["final"]["by_domain"]) == {"one"}
    assert server.returncode == 3

    withdrawn = runs(running, "CANCELLED")
    assert len(withdrawn) == 2
    assert all(name.startswith("evaluate two") for name in withdrawn)
    kept_apart(running, tmp_path, (place_a, place_b))


def kept_apart(running: Running, folder: Path, places: tuple[Path, ...]) -> None:
    """No post and no path of a site is in anything that the server holds: store, outputs, Prefect's database, logs."""
    held = [folder / "store", folder / "out", folder / "homes" / "prefect", folder / "homes" / "server"]
    files = [path for place in held for path in place.rglob("*") if path.is_file()]
    files += [folder / "prefect.log", folder / "server.log"]
    assert any(path.name.startswith("train-") for path in files), "the answers are among what is searched"
    private = [MARK.encode(), *(str(place).encode() for place in places), b"data-of-site"]
    for path in files:
        content = path.read_bytes()
        assert not [text for text in private if text in content], path


def look_into(running: Running, name: str, folder: Path) -> str:
    """What stops a process like that one from listing a folder."""
    line = running.command(name, "-c", f"import os; os.listdir({str(folder)!r})")
    return subprocess.run(line, env=running.environment(name), capture_output=True, text=True, check=False).stderr


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def charged(place: Path) -> bool:
    """Whether a site's ledger holds a charge for training."""
    return any('"charge"' in path.read_text() for path in (place / "ledger" / "ledgers" / "two").glob("*.json"))
