"""Settings, processes and templates of the stack, without starting one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmentor_core.errors import ConfigError
from flows.deployment_parameters import read_studies, study_variable
from flows.stack import processes
from flows.stack.interruption import Interruptions
from flows.stack.provisioning import POOL_TEMPLATE, deployment_digest
from flows.stack.services import object_store, process_env, services
from flows.stack.settings import (
    SiteSettings,
    StackError,
    StackSettings,
    checked_settings,
    load_settings,
    parse_site,
    parse_study,
    postgres_database,
    postgres_url,
)
from flows.stack.state import StackFolder, StackState

ROOT = Path(__file__).resolve().parents[3]


def living(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


FAMILY = """
import subprocess, sys, time, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "300"])
stray = subprocess.Popen(["sleep", "300"], start_new_session=True)
print(child.pid, stray.pid, flush=True)
time.sleep(300)
"""


@pytest.fixture
def family(tmp_path):
    """A stubborn leader, a child in its group and one in a group of its own: their record and three pids."""
    log = tmp_path / "log"
    record = processes.start(
        "x", [sys.executable, "-c", FAMILY], dict(os.environ), stack_id="mine", cwd=tmp_path, log=log
    )
    while not log.read_text().endswith("\n"):
        assert processes.find(record), log.read_text()
        time.sleep(0.01)
    pids = log.read_text().split()
    yield record, [record.pid, *map(int, pids)]
    processes.stop("mine", {"x": record}, grace_seconds=0.1)


def test_stop_ends_the_whole_family_even_where_it_ignores_term(family):
    record, pids = family
    assert len(living(pids)) == 3
    processes.stop("mine", {"x": record}, grace_seconds=0.3)
    assert living(pids) == []


def test_stop_ends_the_children_of_a_leader_that_was_killed(family):
    record, pids = family
    psutil.Process(record.pid).kill()
    assert processes.find(record) is None or processes._gone([psutil.Process(record.pid)], 5.0) is None
    processes.stop("mine", {"x": record}, grace_seconds=0.3)
    assert living(pids) == []


def test_stop_ends_a_service_that_nobody_wrote_down(family):
    _, pids = family
    processes.stop("mine", {"x": None}, grace_seconds=0.3)
    assert living(pids) == []


def test_a_process_of_the_same_number_or_another_stack_is_left_alone(family):
    record, pids = family
    reused = record.model_copy(update={"started": record.started - 1000.0})
    assert processes.find(reused) is None
    processes.stop("another", {"x": reused}, grace_seconds=0.1)
    processes.stop("mine", {"y": reused}, grace_seconds=0.1)
    assert len(living(pids)) == 3


def test_two_commands_never_hold_one_folder(tmp_path):
    folder = StackFolder(tmp_path / "stack")
    with folder.locked(), pytest.raises(StackError, match="another up or down"), folder.locked():
        pass
    assert folder.path.stat().st_mode & 0o077 == 0, "other users may not read logs and data"


def test_state_survives_a_round_trip_and_rubbish_is_named(tmp_path):
    folder = StackFolder(tmp_path)
    state = StackState(settings=StackSettings(sites=(SiteSettings(name="a", data_root=Path("x")),)))
    folder.save(state)
    assert folder.load() == state
    folder.file.write_text("{")
    with pytest.raises(StackError, match=r"stack\.json"):
        folder.load()


@pytest.mark.parametrize(
    "values",
    [
        {"prefect_port": 0},
        {"prefect_port": 5000},
        {"host": "0.0.0.0"},
        {"database": "mysql"},
        {"s3_port": 65_530},
        {"s3_port": 4195},
        {"store": "tape"},
        {"store": "folder", "s3_endpoint": "https://objects.example"},
        {"s3_endpoint": "http://user:password@host"},
        {"sites": [{"name": "server"}]},
        {"sites": [{"name": "a"}, {"name": "a"}]},
        {"sites": [{"name": "A b"}]},
    ],
)
def test_impossible_settings_are_refused(values):
    with pytest.raises(ConfigError, match="Allowed keys"):
        checked_settings(values, "here")


def test_shipped_settings_are_valid():
    assert [site.name for site in load_settings(ROOT / "infra" / "stack" / "stack.yaml").sites] == ["site-a", "site-b"]


def test_sites_from_the_command_line(tmp_path):
    assert parse_site("a").data_root is None
    assert parse_site(f"a={tmp_path}").data_root == tmp_path
    with pytest.raises(ConfigError, match="NAME=DATA_FOLDER"):
        parse_site("A=x")


def test_a_postgres_url_is_checked_without_being_repeated():
    with pytest.raises(ConfigError) as refused:
        postgres_url("mysql://me:secret@host/x")
    assert "secret" not in str(refused.value)
    assert postgres_url("postgres://me@host") == "postgresql://me@host"


@given(password=st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1), port=st.integers(1, 65535))
def test_each_server_gets_its_own_database_on_the_same_postgresql(password, port):
    url = f"postgresql://me:{password}@host:{port}/postgres?sslmode=require"
    assert postgres_database(url, "asyncpg", "p") == f"postgresql+asyncpg://me:{password}@host:{port}/p?ssl=require"
    assert postgres_database(url, "psycopg2", "m").endswith(f"@host:{port}/m?sslmode=require")


def test_no_secret_is_in_a_command_line(tmp_path):
    """Every user of a machine may read every command line."""
    settings = StackSettings(database="postgresql", sites=(SiteSettings(name="a"),))
    made = services(settings, StackFolder(tmp_path), "postgresql://me:swordfish@host/postgres")
    assert not [service.name for service in made if "swordfish" in " ".join(service.command)]
    assert {service.name for service in made if "swordfish" in str(service.env)} == {"prefect", "mlflow"}
    assert "swordfish" not in repr(made)


def test_processes_do_not_inherit_what_belongs_to_others(tmp_path, monkeypatch):
    for name in ("PREFECT_API_KEY", "MLFLOW_TRACKING_TOKEN", "FEDMENTOR_DATA_ROOT", "FEDMENTOR_POSTGRES_URL"):
        monkeypatch.setenv(name, "of another")
    monkeypatch.setenv("NO_PROXY", "inside.example")
    environment = process_env(StackSettings(), tmp_path)
    assert "of another" not in environment.values()
    assert environment["NO_PROXY"] == "inside.example,127.0.0.1,localhost"


def test_env_files_are_read_and_their_content_never_quoted(tmp_path):
    file = tmp_path / "env"
    settings = StackSettings(store="folder", sites=(SiteSettings(name="a", env_file=file),))
    file.write_text("# remark\n\nKEY = a=b\n")
    worker = services(settings, StackFolder(tmp_path), None)[-1]
    assert worker.environment()["KEY"] == "a=b"
    assert "KEY" not in worker.env, "read only when it starts"
    file.write_text("KEY=1\nsecret\n")
    with pytest.raises(ConfigError, match="line 2") as refused:
        worker.environment()
    assert "secret" not in str(refused.value)


def test_an_own_s3_server_starts_nothing_and_gives_each_site_its_prefix(tmp_path):
    settings = StackSettings(s3_endpoint="https://objects.example", sites=(SiteSettings(name="a"),))
    made = {service.name: service for service in services(settings, StackFolder(tmp_path), None)}
    assert "s3" not in made
    assert made["worker-a"].env["FEDMENTOR_STORE_URL"] == "s3://fedmentor/sites/a"
    assert made["worker-a"].env["AWS_ENDPOINT_URL_S3"] == "https://objects.example"
    assert made["worker-a"].env.get("AWS_ACCESS_KEY_ID") == os.environ.get("AWS_ACCESS_KEY_ID")


def test_a_deployment_takes_the_study_it_is_given(tmp_path, monkeypatch):
    file = tmp_path / "mine.yaml"
    text = (ROOT / "infra" / "configs" / "quickstart.yaml").read_text()
    file.write_text(text.replace("name: quickstart", "name: mine"))
    assert parse_study(f"nightly={file}") == ("nightly", file)
    plain, given = StackSettings(), StackSettings(studies={"nightly": file})
    assert deployment_digest(plain) != deployment_digest(given)
    monkeypatch.setenv(study_variable("nightly"), str(file))
    shipped = {"nightly": "infra/configs/nightly.yaml", "train": "infra/configs/quickstart.yaml"}
    monkeypatch.chdir(ROOT)
    assert {name: study["name"] for name, study in read_studies(**shipped).items()} == {
        "nightly": "mine", "train": "quickstart",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="Allowed: train, nightly, compare"):
        deployment_digest(StackSettings(studies={"rollback": file}))
    with pytest.raises(ConfigError, match="no such file"):
        parse_study("nightly=nowhere.yaml")


def test_artifacts_may_stay_in_folders(tmp_path):
    settings = StackSettings(store="folder", sites=(SiteSettings(name="a"),))
    made = {service.name: service for service in services(settings, StackFolder(tmp_path), None)}
    assert "s3" not in made
    assert made["worker-a"].env["FEDMENTOR_STORE_URL"] == (tmp_path / "data/store/sites/a").as_uri()
    assert "AWS_ENDPOINT_URL_S3" not in made["worker-a"].env


def test_each_pool_has_credentials_of_its_own_that_stay(tmp_path):
    store = object_store(StackSettings(sites=(SiteSettings(name="a"),)), StackFolder(tmp_path))
    store.prepare()
    before = {pool: store.read_credentials(pool) for pool in ("server", "a")}
    wider = object_store(StackSettings(sites=(SiteSettings(name="a"), SiteSettings(name="b"))), StackFolder(tmp_path))
    wider.prepare()
    assert {pool: wider.read_credentials(pool) for pool in ("server", "a")} == before
    identities = json.loads((wider.home / "identities.json").read_text())["identities"]
    assert [one["name"] for one in identities] == ["server", "a", "b"]
    secrets = [one["credentials"][0]["secretKey"] for one in identities]
    assert len(set(secrets)) == 3
    assert not [path for path in wider.home.glob("*.*") if path.is_file() and path.stat().st_mode & 0o077]
    assert not [secret for secret in secrets if secret in " ".join(wider.command())]


@pytest.mark.slow
def test_the_pool_template_is_prefects_own(tmp_path):
    """It is kept in git, so that making a pool needs no import of Prefect; this notices when Prefect's changes."""
    program = "import json; from prefect.workers.process import ProcessWorker as W; print(json.dumps(W.get_default_base_job_template()))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PREFECT_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(POOL_TEMPLATE.read_text(encoding="utf-8")) == json.loads(done.stdout)


def test_an_interruption_waits_until_a_process_is_written_down():
    written = []

    def interrupted(interruptions: Interruptions) -> None:
        with interruptions.held():
            signal.raise_signal(signal.SIGTERM)
            written.append("down")
        written.append("too far")

    with Interruptions() as interruptions:
        with pytest.raises(KeyboardInterrupt):
            interrupted(interruptions)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert written == ["down"]
