"""The whole stack on one machine, started once: two sites, a flow run through a worker, a killed server, the end."""

import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from running_stack import RunningStack

from fedmentor_core.config import StorageConfig
from fedmentor_core.errors import StorageError
from fedmentor_core.storage.s3_client import S3Client

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    folder = tmp_path_factory.mktemp("stack")
    secrets = folder / "site-b.env"
    secrets.write_text("# site-b only\nSTORE_PASSWORD=swordfish\n")
    config = folder / "stack.yaml"
    config.write_text(
        f"sites:\n  - {{name: site-a, data_root: {folder / 'data-a'}}}\n  - {{name: site-b, env_file: {secrets}}}\n"
    )
    running = RunningStack(folder / "state", env={"PREFECT_API_URL": "http://127.0.0.1:1/api"})  # of another stack
    started = running.up("--config", str(config))
    try:
        assert started.returncode == 0, started.stderr + started.stdout
        yield running
    finally:
        running.command("down")


def environment_of(stack: RunningStack, service: str) -> dict[str, str]:
    return psutil.Process(stack.remembered()["services"][service]["pid"]).environ()


def test_everything_answers_and_the_deployments_are_there(stack):
    status = stack.status()
    assert status["exit_code"] == 0
    assert status["healthy"]
    assert [row["name"] for row in status["services"]] == [
        "prefect", "mlflow", "s3", "worker-server", "worker-site-a", "worker-site-b",
    ]  # fmt: skip
    assert status["workers_online"] == ["worker-server", "worker-site-a", "worker-site-b"]
    assert status["work_pools"] == ["server", "site-a", "site-b"]
    assert "federated-training/train" in status["deployments"]
    assert all(Path(row["log"]).is_file() for row in status["services"])

    answer = httpx.get(f"{status['s3_endpoint_url']}/fedmentor", timeout=30)
    assert answer.status_code == 403  # there, and not for whoever asks
    page = httpx.get(f"http://127.0.0.1:{stack.ports[0]}/ui-settings", timeout=30).json()
    assert page["api_url"] == status["prefect_api_url"]


def test_only_the_loopback_address_listens_and_strangers_are_refused(stack):
    listening = set()
    for pid in stack.processes():
        for connection in psutil.Process(pid).net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                listening.add((connection.laddr.ip, connection.laddr.port))
    assert {port for _, port in listening} >= set(stack.ports)
    assert {address for address, _ in listening} == {"127.0.0.1"}

    stranger = {"Origin": "http://elsewhere.example"}
    for port, path in zip(stack.ports, ("/api/health", "/health", "/fedmentor"), strict=True):
        answer = httpx.get(f"http://127.0.0.1:{port}{path}", headers=stranger, timeout=30)
        assert "access-control-allow-origin" not in answer.headers
    rebound = httpx.get(f"http://127.0.0.1:{stack.ports[1]}/", headers={"Host": "elsewhere.example"}, timeout=30)
    assert rebound.status_code == 403


def test_each_worker_knows_only_its_own_site(stack):
    server, one, two = (environment_of(stack, f"worker-{name}") for name in ("server", "site-a", "site-b"))
    assert one["FEDMENTOR_DATA_ROOT"].endswith("data-a")
    assert two["STORE_PASSWORD"] == "swordfish"
    for environment in (server, environment_of(stack, "prefect"), environment_of(stack, "mlflow"), two):
        assert "FEDMENTOR_DATA_ROOT" not in environment
    assert "STORE_PASSWORD" not in server | one
    assert len({environment["FEDMENTOR_STORE_URL"] for environment in (server, one, two)}) == 3
    assert (one["FEDMENTOR_SITE"], two["FEDMENTOR_SITE"]) == ("site-a", "site-b")
    assert "swordfish" not in (stack.folder / "stack.json").read_text()


def credentials_of(stack: RunningStack, pool: str) -> dict[str, str]:
    lines = (stack.folder / "data" / "s3" / f"{pool}.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


def bucket_as(stack: RunningStack, pool: str) -> S3Client:
    found = credentials_of(stack, pool)
    settings = StorageConfig(endpoint_url=f"http://127.0.0.1:{stack.ports[2]}", deadline_seconds=60)
    return S3Client.connect("fedmentor", settings, (found["AWS_ACCESS_KEY_ID"], found["AWS_SECRET_ACCESS_KEY"]))


def test_a_site_writes_below_its_own_prefix_and_reads_no_other_sites(stack):
    server, site = bucket_as(stack, "server"), bucket_as(stack, "site-a")
    server.call("write", "put_object", Key="server/x", Body=b"from the server")
    server.call("write", "put_object", Key="sites/site-b/x", Body=b"of site b")
    site.call("write", "put_object", Key="sites/site-a/x", Body=b"of site a", IfNoneMatch="*")
    assert site.call("read", "get_object", Key="server/x")["Body"].read() == b"from the server"
    assert server.call("read", "get_object", Key="sites/site-a/x")["Body"].read() == b"of site a"
    for what, operation, parameters in (
        ("write", "put_object", {"Key": "server/y", "Body": b""}),
        ("write", "put_object", {"Key": "sites/site-b/y", "Body": b""}),
        ("write", "put_object", {"Key": "sites/site-ab/y", "Body": b""}),
        ("read", "get_object", {"Key": "sites/site-b/x"}),
        ("delete", "delete_object", {"Key": "server/x"}),
        ("list", "list_objects_v2", {"Prefix": "sites/site-b/"}),
    ):
        with pytest.raises(StorageError, match="AccessDenied"):
            site.call(what, operation, **parameters)
    assert stat.S_IMODE((stack.folder / "data" / "s3" / "site-a.env").stat().st_mode) == 0o600
    assert credentials_of(stack, "site-a")["AWS_SECRET_ACCESS_KEY"] not in (stack.folder / "stack.json").read_text()


def test_the_doctor_finds_all_we_rely_on_in_the_stacks_store(stack):
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "doctor", "--store", "s3://fedmentor/server", "--json",
         "--endpoint-url", f"http://127.0.0.1:{stack.ports[2]}"],
        env={**stack.environment(), **credentials_of(stack, "server")}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_telemetry_is_off_everywhere(stack):
    for service in stack.remembered()["services"]:
        environment = environment_of(stack, service)
        assert environment["DO_NOT_TRACK"] == "1"
        assert environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
        assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    store = psutil.Process(stack.remembered()["services"]["s3"]["pid"])
    assert "-master.telemetry=false" in store.cmdline()
    pages = f"http://127.0.0.1:{stack.ports[1]}/ajax-api/3.0/mlflow/ui-telemetry"
    assert httpx.get(pages, timeout=30).json()["disable_ui_telemetry"] is True
    assert httpx.post(pages, json={"records": []}, timeout=30).json() == {"status": "disabled"}


def test_up_again_changes_nothing(stack):
    before = stack.processes()
    again = stack.command("up")
    assert again.returncode == 0, again.stderr
    assert "up already" in again.stderr
    assert stack.processes() == before


def test_other_ports_are_refused_while_it_is_up(stack):
    refused = stack.command("up", "--mlflow-port", "1024")
    assert refused.returncode == 2
    assert "mlflow_port" in refused.stderr
    assert "fedmentor down" in refused.stderr


def test_a_run_goes_through_a_worker_to_the_registry(stack):
    """The ``rollback`` deployment, on two versions: Prefect, worker, pull step, flow and MLflow in one go."""
    with httpx.Client(timeout=60) as http:
        mlflow = f"http://127.0.0.1:{stack.ports[1]}/api/2.0/mlflow"

        def tell(method: str, **body: object) -> None:
            http.post(f"{mlflow}/{method}", json={"name": "m", **body}).raise_for_status()

        tell("registered-models/create")
        for number in ("1", "2"):
            tell("model-versions/create", source=f"s3://nowhere/{number}")
        tell("model-versions/set-tag", version="2", key="previous_champion", value="1")
        tell("registered-models/alias", alias="champion", version="2")

        api = stack.status()["prefect_api_url"]
        deployment = http.get(f"{api}/deployments/name/rollback/rollback").json()
        made = http.post(
            f"{api}/deployments/{deployment['id']}/create_flow_run",
            json={
                "state": {"type": "SCHEDULED"},
                "parameters": {"tracking_uri": f"http://127.0.0.1:{stack.ports[1]}", "name": "m", "reason": "a test"},
            },
        ).json()
        state = ended(http, f"{api}/flow_runs/{made['id']}")
        assert state["type"] == "COMPLETED", state.get("message")
        champion = http.get(f"{mlflow}/registered-models/alias", params={"name": "m", "alias": "champion"}).json()
        assert champion["model_version"]["version"] == "1"


def ended(http: httpx.Client, url: str) -> dict:
    """The last state of a flow run; None within four minutes fails."""
    for _ in range(240):
        state = http.get(url).json()["state"]
        if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            return state
        time.sleep(1)
    raise AssertionError(f"still {state}")


def test_killed_servers_are_noticed_and_mended_and_the_rest_left_alone(stack):
    """MLflow's child goes on holding the port when its parent is killed: mending must end that first.

    Workers live through the loss of Prefect: one that trains would lose its work if it were started again.
    """
    services = stack.remembered()["services"]
    psutil.Process(services["mlflow"]["pid"]).kill()
    status = stack.status()
    assert status["exit_code"] == 1
    assert {row["name"] for row in status["services"] if not row["healthy"]} == {"mlflow"}
    assert "ended" in next(row["detail"] for row in status["services"] if row["name"] == "mlflow")

    psutil.Process(services["prefect"]["pid"]).kill()
    status = stack.status()
    assert status["workers_online"] == [], "nobody can tell without Prefect"
    assert status["deployments"] == []

    psutil.Process(services["s3"]["pid"]).kill()
    mending = stack.command("up")
    assert mending.returncode == 0, mending.stderr
    mended = stack.remembered()["services"]
    assert {name for name in services if mended[name] != services[name]} == {"mlflow", "prefect", "s3"}
    assert stack.status()["healthy"]
    kept = bucket_as(stack, "site-a").call("read", "get_object", Key="sites/site-a/x")["Body"].read()
    assert kept == b"of site a", "the store keeps what it holds when it is killed"


def test_down_leaves_no_process_and_keeps_the_data(stack):
    mine = stack.processes()
    assert set(mine.values()) == set(stack.remembered()["services"])
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        done = stack.command("down")
        assert done.returncode == 0, done.stderr
        assert stack.processes() == {}
        assert not [pid for pid in mine if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    for port in stack.ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0

    status = stack.status()
    assert status["exit_code"] == 1
    assert not status["healthy"]
    assert (stack.folder / "data" / "prefect" / "prefect.db").is_file()
    assert (stack.folder / "data" / "mlflow" / "mlflow.db").is_file()
    assert stack.command("down").returncode == 0, "down twice is fine"


def test_a_taken_port_is_refused_before_anything_starts(tmp_path):
    stack = RunningStack(tmp_path / "state")
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", stack.ports[1]))
        holder.listen()
        refused = stack.up()
    assert refused.returncode == 1
    assert str(stack.ports[1]) in refused.stderr
    assert "--mlflow-port" in refused.stderr
    assert stack.processes() == {}


def half_started(stack: RunningStack) -> subprocess.Popen[str]:
    """An ``up`` that has started its servers and waits for them."""
    starting = subprocess.Popen(
        stack.line("up", *stack.port_options()), env=stack.environment(), stderr=subprocess.PIPE, text=True
    )
    assert starting.stderr is not None
    for line in starting.stderr:
        if "starting s3" in line:
            break
    return starting


@pytest.mark.parametrize("interruption", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_up_stops_what_it_started(tmp_path, interruption):
    stack = RunningStack(tmp_path / "state")
    starting = half_started(stack)
    starting.send_signal(interruption)
    _, rest = starting.communicate(timeout=120)
    assert starting.returncode == 1
    assert "interrupted" in rest
    assert stack.processes() == {}


def test_down_finds_what_a_killed_up_left(tmp_path):
    stack = RunningStack(tmp_path / "state")
    starting = half_started(stack)
    starting.kill()
    starting.communicate(timeout=120)
    assert set(stack.processes().values()) >= {"prefect", "mlflow"}
    assert stack.command("down").returncode == 0
    assert stack.processes() == {}


def test_a_service_that_does_not_come_up_shows_its_log_and_is_stopped(tmp_path):
    stack = RunningStack(tmp_path / "state")
    failed = stack.up("--timeout", "0.01")
    assert failed.returncode == 1
    assert "not healthy after" in failed.stderr
    assert "Last lines of" in failed.stderr
    assert stack.processes() == {}
