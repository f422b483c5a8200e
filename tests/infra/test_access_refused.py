"""Real servers, started as infra/ starts them, refuse whoever has no or the wrong credentials.

Prefect and MLflow are the real ones. The store is SeaweedFS with the compose deployment's flags and identities, and moto,
which enforces the very policies of infra/policies once told to.
"""

import json
import os
import random
import runpy
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import yaml
from botocore.config import Config
from botocore.exceptions import ClientError

from fedmentor_core.config import StorageConfig
from fedmentor_core.errors import StorageError
from fedmentor_core.storage.base import open_store
from flows.prefect_database import put_database

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "infra" / "compose"
BOOTSTRAP = runpy.run_path(str(COMPOSE / "bootstrap.py"))
SECRETS = runpy.run_path(str(COMPOSE / "make_secrets.py"))
START_SECONDS = 150
SITES = ["site-a", "site-b"]
WEED = str(Path(sysconfig.get_path("scripts")) / "weed")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@dataclass
class Server:
    """A server with its administrator's ``user:password``."""

    url: str
    credentials: str

    def ask(self, path: str, credentials: str | None = None, method: str = "GET", body: Any = None) -> int:
        auth = None if credentials is None else tuple(credentials.split(":", 1))
        return httpx.request(method, self.url + path, auth=auth, json=body, timeout=30, trust_env=False).status_code


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Iterator[Callable[..., None]]:
    """Starts a process in a session of its own; all of them, children included, end with the tests."""
    running: list[subprocess.Popen] = []
    folder = tmp_path_factory.mktemp("logs")

    def run(name: str, command: list[str], env: dict[str, str], program: str | None = None) -> None:
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_", "AWS_"))
        }
        log = (folder / f"{name}.log").open("wb")
        running.append(
            subprocess.Popen(
                [program, *command] if program else [sys.executable, "-m", *command],
                env=inherited | env,
                cwd=folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        )

    yield run
    for process in running:
        os.killpg(process.pid, signal.SIGTERM)
    for process in running:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def servers(start, tmp_path_factory) -> dict[str, Server]:
    """Prefect and MLflow, started together because each takes a while."""
    home = tmp_path_factory.mktemp("servers")
    prefect_port, mlflow_port = free_port(), free_port()
    prefect_auth, admin_password = f"fedmentor:{secrets.token_urlsafe(16)}", secrets.token_urlsafe(16)
    quiet = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    put_database(home)
    start(
        "prefect",
        ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(prefect_port), "--no-services"],
        quiet | {
            "PREFECT_HOME": str(home / "prefect"),
            "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home / "ui"),
            "PREFECT_SERVER_API_AUTH_STRING": prefect_auth,
            "PREFECT_API_AUTH_STRING": prefect_auth,
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home / 'prefect.db'}",
        },
    )  # fmt: skip
    # as make_secrets.py writes it, but on SQLite
    settings = SECRETS["_mlflow_auth"](type("Made", (), {"read": staticmethod(lambda name: admin_password)})())
    lines = [f"database_uri = sqlite:///{home / 'users.db'}" if line.startswith("database_uri") else line
             for line in settings.splitlines()]  # fmt: skip
    lines.append("auth_cache_ttl_seconds = 60")  # hashing a password at each call is most of the time here
    (home / "mlflow_auth").write_text("\n".join(lines))
    start(
        "mlflow",
        ["mlflow", "server", "--app-name", "basic-auth", "--host", "127.0.0.1", "--port", str(mlflow_port), "--workers", "1"],
        quiet | {
            "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{home / 'mlflow.db'}",
            "MLFLOW_ARTIFACTS_DESTINATION": (home / "artifacts").as_uri(),
            "MLFLOW_AUTH_CONFIG_PATH": str(home / "mlflow_auth"),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_urlsafe(16),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        },
    )  # fmt: skip
    found = {
        "prefect": Server(f"http://127.0.0.1:{prefect_port}", prefect_auth),
        "mlflow": Server(f"http://127.0.0.1:{mlflow_port}", f"admin:{admin_password}"),
    }
    until_it_answers(found["prefect"].url + "/api/health")
    until_it_answers(found["mlflow"].url + "/health")
    return found


def until_it_answers(url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            if httpx.get(url, timeout=5, trust_env=False).is_success:
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < deadline, f"{url} did not answer in {START_SECONDS} s"
        time.sleep(0.3)


# --- Prefect -----------------------------------------------------------------------------------------------------------


def test_prefect_refuses_whoever_has_no_or_a_wrong_secret(servers):
    server = servers["prefect"]
    calls = [
        ("POST", "/api/flow_runs/filter", {}),
        ("POST", "/api/work_pools/", {"name": "mine", "type": "process"}),
        ("POST", "/api/deployments/filter", {}),
        ("GET", "/api/admin/version", None),
    ]
    for method, path, body in calls:
        assert server.ask(path, None, method, body) == 401, path
        assert server.ask(path, "fedmentor:wrong", method, body) == 401, path
        assert server.ask(path, f"someone:{server.credentials.split(':')[1]}", method, body) == 401, path
        assert server.ask(path, server.credentials, method, body) in (200, 201), path
    assert server.ask("/api/health") == 200, "health is asked by whoever restarts it"


def test_prefect_takes_what_bootstrap_makes_twice(servers):
    server = servers["prefect"]
    api = BOOTSTRAP["Api"](server.url + "/api", server.credentials)
    for _ in range(2):
        BOOTSTRAP["make_pools_and_limits"](api, SITES)
        BOOTSTRAP["make_zombie_automation"](api)
    pools = {one["name"]: one["concurrency_limit"] for one in api.call("POST", "/work_pools/filter", {}).json()}
    assert {name: pools[name] for name in ("server", *SITES)} == {"server": None, "site-a": 1, "site-b": 1}
    limits = api.call("POST", "/v2/concurrency_limits/filter", {}).json()
    assert {one["name"]: one["limit"] for one in limits} == {"gpu-site-a": 1, "gpu-site-b": 1}
    automations = api.call("POST", "/automations/filter", {}).json()
    assert [one["name"] for one in automations] == ["crash-silent-flow-runs"]


def test_prefect_takes_the_gpu_job_template(servers):
    server = servers["prefect"]
    template = json.loads((ROOT / "infra" / "kubernetes" / "site" / "gpu_base_job_template.json").read_text())
    body = {"name": "site-k8s", "type": "kubernetes", "base_job_template": template}
    assert server.ask("/api/work_pools/", server.credentials, "POST", body) == 201


def test_a_worker_without_the_secret_gets_no_work(servers):
    server = servers["prefect"]
    poll = ("/api/work_pools/site-a/get_scheduled_flow_runs", "POST", {})
    assert server.ask(poll[0], None, *poll[1:]) == 401
    assert server.ask("/api/work_pools/site-a/workers/heartbeat", None, "POST", {"name": "worker-site-a"}) == 401


# --- MLflow ------------------------------------------------------------------------------------------------------------


def test_mlflow_refuses_whoever_is_no_user(servers):
    server = servers["mlflow"]
    search = ("/api/2.0/mlflow/experiments/search", "POST", {"max_results": 1})
    for path, method, body in (search, ("/api/2.0/mlflow/registered-models/search", "GET", None), ("/", "GET", None)):
        assert server.ask(path, None, method, body) == 401, path
        assert server.ask(path, "admin:wrong", method, body) == 401, path
        assert server.ask(path, "admin:password1234", method, body) == 401, "no default password"
        assert server.ask(path, server.credentials, method, body) == 200, path


def test_mlflow_users_may_do_what_their_role_says_and_no_more(servers):
    server = servers["mlflow"]
    passwords = {"trainer": secrets.token_urlsafe(16), "consumer": secrets.token_urlsafe(16)}
    api = BOOTSTRAP["Api"](server.url, server.credentials)
    for _ in range(2):
        BOOTSTRAP["make_mlflow_users"](api, passwords)
    trainer, consumer = (f"{name}:{password}" for name, password in passwords.items())
    name = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=fedmentor"
    assert server.ask(name, trainer) == server.ask(name, consumer) == 200
    experiment = api.call("GET", name).json()["experiment"]["experiment_id"]
    run = {"experiment_id": experiment}
    assert server.ask("/api/2.0/mlflow/runs/create", trainer, "POST", run) == 200
    assert server.ask("/api/2.0/mlflow/runs/create", consumer, "POST", run) == 403
    version = {"name": "fedmentor-adapter", "source": "s3://fedmentor-mlflow/x"}
    alias = {"name": "fedmentor-adapter", "alias": "champion", "version": "1"}
    assert server.ask("/api/2.0/mlflow/model-versions/create", consumer, "POST", version) == 403
    assert server.ask("/api/2.0/mlflow/registered-models/alias", consumer, "POST", alias) == 403
    assert server.ask("/api/2.0/mlflow/registered-models/get?name=fedmentor-adapter", consumer) == 200
    other = api.call("POST", "/api/2.0/mlflow/experiments/create", {"name": f"other-{secrets.token_hex(4)}"}).json()
    hidden = f"/api/2.0/mlflow/experiments/get?experiment_id={other['experiment_id']}"
    assert server.ask(hidden, consumer) == server.ask(hidden, trainer) == 403
    user = {"username": "mine", "password": secrets.token_urlsafe(16)}
    assert server.ask("/api/2.0/mlflow/users/create", trainer, "POST", user) == 403


# --- store ---------------------------------------------------------------------------------------------------------------


@dataclass
class Bucket:
    """The store with a key for each of its users."""

    url: str
    keys: dict[str, tuple[str, str]]
    prefixes_only: bool = False

    def client(self, user: str | None = None, key: tuple[str, str] = ("", "")) -> Any:
        access, secret = self.keys[user] if user else key
        return boto3.client(
            "s3", endpoint_url=self.url, region_name="us-east-1", aws_access_key_id=access, aws_secret_access_key=secret,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, proxies={}),
        )  # fmt: skip


@pytest.fixture(scope="module", params=["moto", "seaweedfs"])
def bucket(request, start, tmp_path_factory) -> Bucket:
    """The buckets that bootstrap makes, and the users and policies of infra/, enforced by each of two servers."""
    return _moto(start) if request.param == "moto" else _seaweedfs(start, tmp_path_factory.mktemp("seaweedfs"))


def _moto(start: Callable[..., None]) -> Bucket:
    """Enforces the very policies of infra/policies."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    start("s3", ["moto.server", "-H", "127.0.0.1", "-p", str(port)], {})
    until_it_answers(url + "/moto-api/")
    anyone = {"endpoint_url": url, "region_name": "us-east-1", "aws_access_key_id": "x", "aws_secret_access_key": "x"}
    s3, iam = boto3.client("s3", **anyone), boto3.client("iam", **anyone)
    users = {"server": ("store_server", SITES), "monitor-a": ("store_monitor", ["site-a"])}
    users |= {site: ("store_site", [site]) for site in SITES}
    keys = {}
    for user, (policy, sites) in users.items():
        iam.create_user(UserName=user)
        document = json.dumps(SECRETS["rendered_policy"](policy, sites))
        iam.put_user_policy(UserName=user, PolicyName=policy, PolicyDocument=document)
        made = iam.create_access_key(UserName=user)["AccessKey"]
        keys[user] = (made["AccessKeyId"], made["SecretAccessKey"])
    _fill(s3, s3)
    assert httpx.post(url + "/moto-api/reset-auth", content=b"0", trust_env=False).status_code == 200
    return Bucket(url, keys)


def _seaweedfs(start: Callable[..., None], folder: Path) -> Bucket:
    """The compose deployment's own server, with its flags and the identities that make_secrets.py writes."""
    SECRETS["make_secrets"](folder / "secrets", SITES, [])
    read = {name: (folder / "secrets" / name).read_text() for name in os.listdir(folder / "secrets")}
    names = {"server": "store_server", "monitor-a": "store_monitor_site_a", "bootstrap": "store_bootstrap"}
    names |= {site: f"store_{site.replace('-', '_')}" for site in SITES}
    keys = {}
    for user, name in names.items():
        found = dict(line.split(" = ") for line in read[name].splitlines()[1:])
        keys[user] = (found["aws_access_key_id"], found["aws_secret_access_key"])
    flags = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]["store"]["command"]
    first = _ports_in_a_row(8)
    own = {
        "-dir": folder / "data", "-s3.ip.bind": "127.0.0.1", "-s3.port": first, "-s3.port.grpc": first + 1,
        "-s3.config": folder / "secrets" / "store_identities", "-master.port": first + 2, "-master.port.grpc": first + 3,
        "-volume.port": first + 4, "-volume.port.grpc": first + 5, "-filer.port": first + 6,
        "-filer.port.grpc": first + 7, "-filer.localSocket": folder / "filer.sock", "-s3.localSocket": folder / "s3.sock",
    }  # fmt: skip
    (folder / "data").mkdir()
    kept = [flag for flag in flags if flag.split("=")[0] not in own]
    start("weed", [*kept, "-filer", *(f"{name}={value}" for name, value in own.items())], {}, program=WEED)
    url = f"http://127.0.0.1:{first}"
    until_it_answers(url + "/healthz")
    made = Bucket(url, keys, prefixes_only=True)
    for attempt in range(60):
        try:
            _fill(made.client("bootstrap"), None)
            break
        except ClientError:  # its parts find each other a moment after it answers
            assert attempt < 59
            time.sleep(0.5)
    server, site = made.client("server"), made.client("site-a")
    server.put_object(Bucket="fedmentor-server", Key=ADAPTERS["fedmentor-server"], Body=b"bytes")
    site.put_object(Bucket="fedmentor-site-a", Key=UPDATE, Body=b"bytes")
    site.put_object(Bucket="fedmentor-site-a", Key=LEDGER, Body=b"{}")
    return made


def _fill(s3: Any, writer: Any) -> None:
    for _ in range(2):
        BOOTSTRAP["make_buckets"](s3, "fedmentor", SITES)
    if writer is None:
        return
    for name, key in ADAPTERS.items():
        writer.put_object(Bucket=name, Key=key, Body=b"bytes")
    writer.put_object(Bucket="fedmentor-site-a", Key=LEDGER, Body=b"{}")


def _ports_in_a_row(count: int) -> int:
    for first in random.SystemRandom().sample(range(30_000, 32_000, count), 200):
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


UPDATE = "store/sites/site-a/crisis-line/runs/r-1/rounds/0000/update-000.safetensors"
LEDGER = "ledger/ledgers/a/00000000.json"
ADAPTERS = {"fedmentor-server": "store/runs/r-1/adapters/0.safetensors", "fedmentor-site-a": UPDATE}


def outcome(call: Callable[..., Any], **arguments: Any) -> int:
    try:
        return call(**arguments)["ResponseMetadata"]["HTTPStatusCode"]
    except ClientError as error:
        return error.response["ResponseMetadata"]["HTTPStatusCode"]


def test_the_store_refuses_wrong_credentials(bucket):
    access, _ = bucket.keys["site-a"]
    for key in ((access, "wrong"), ("AKIDUNKNOWN", "wrong")):
        client = bucket.client(key=key)
        assert outcome(client.get_object, Bucket="fedmentor-site-a", Key=UPDATE) == 403
        assert outcome(client.put_object, Bucket="fedmentor-site-a", Key="x", Body=b"") == 403
        assert outcome(client.list_objects_v2, Bucket="fedmentor-site-a") == 403


@pytest.mark.parametrize(
    ("user", "name", "key", "may_read", "may_write"),
    [
        ("site-a", "fedmentor-site-a", UPDATE, True, True),
        ("site-a", "fedmentor-site-a", LEDGER, True, True),
        ("site-a", "fedmentor-server", ADAPTERS["fedmentor-server"], True, False),
        ("site-a", "fedmentor-server", "store/runs/r-1/plan.json", False, False),
        ("site-a", "fedmentor-site-b", UPDATE, False, False),
        ("site-b", "fedmentor-site-a", UPDATE, False, False),
        ("site-b", "fedmentor-site-a", LEDGER, False, False),
        ("site-a", "fedmentor-mlflow", "artifacts/x", False, False),
        ("server", "fedmentor-server", ADAPTERS["fedmentor-server"], True, True),
        ("server", "fedmentor-site-a", UPDATE, True, False),
        ("server", "fedmentor-site-a", LEDGER, False, False),
        ("server", "fedmentor-site-a", "ledger/ledger-posts/a/x/y.json", False, False),
        ("monitor-a", "fedmentor-site-a", LEDGER, True, False),
        ("monitor-a", "fedmentor-site-a", UPDATE, False, False),
        ("monitor-a", "fedmentor-site-a", "ledger/ledger-posts/a/x/y.json", False, False),
    ],
)
def test_each_user_of_the_store_may_do_what_its_policy_says(bucket, user, name, key, may_read, may_write):
    client = bucket.client(user)
    read = outcome(client.get_object, Bucket=name, Key=key)
    if key.endswith("plan.json") and bucket.prefixes_only:
        assert read == 404, "SeaweedFS ends a prefix at its first wildcard: docs/security.md says so"
        return
    assert (read in (200, 404)) == may_read, read
    assert may_read or read == 403
    # to a place of its own beside the object, so that the cases do not depend on their order
    written = outcome(client.put_object, Bucket=name, Key=f"{key}.{user}", Body=b"x")
    assert written == (200 if may_write else 403)
    assert outcome(client.delete_object, Bucket=name, Key=key) == 403, "nobody deletes"


def test_fedmentor_says_what_to_do_when_the_store_refuses_it(bucket, monkeypatch):
    for name, value in zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), bucket.keys["site-b"], strict=True):
        monkeypatch.setenv(name, value)
    store = open_store("s3://fedmentor-site-a/ledger", StorageConfig(endpoint_url=bucket.url, deadline_seconds=5))
    with pytest.raises(StorageError) as error:
        store.get_bytes("ledgers/a/00000000.json")
    assert bucket.keys["site-b"][1] not in str(error.value)


def test_metrics_need_the_monitor_key_only(bucket, monkeypatch):
    from prometheus_client import CollectorRegistry

    from flows.metrics_exporter import StudyMetrics

    for name, value in zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), bucket.keys["monitor-a"], strict=True):
        monkeypatch.setenv(name, value)
    url = "s3://fedmentor-site-a/ledger"
    registry = CollectorRegistry()
    registry.register(StudyMetrics([open_store(url, StorageConfig(endpoint_url=bucket.url, deadline_seconds=5))]))
    assert registry.get_sample_value("fedmentor_store_up", {"store": url}) == 1.0
    assert registry.get_sample_value("fedmentor_ledger_verified", {"domain": "a"}) == 0.0, (
        "the entry is no ledger entry"
    )
