"""The stack's services: what each one is started with. Everything listens on the loopback address only."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fedmentor_core.errors import ConfigError
from flows.stack.object_store import ObjectStore
from flows.stack.settings import (
    HOST,
    POSTGRES_VARIABLE,
    SERVER_POOL,
    SiteSettings,
    StackSettings,
    postgres_database,
)
from flows.stack.state import StackFolder

PREFECT, MLFLOW, S3 = "prefect", "mlflow", "s3"
WORKER = "worker-"

_QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
}
_OF_ANOTHER_STACK = ("PREFECT_", "MLFLOW_", "AWS_ENDPOINT_URL")
_OF_ONE_PROCESS = (
    "FEDMENTOR_SITE",
    "FEDMENTOR_SITE_FILE",
    "FEDMENTOR_DATA_ROOT",
    "FEDMENTOR_STORE_URL",
    POSTGRES_VARIABLE,
)


@dataclass(frozen=True)
class Service:
    """One process to run: its command, its variables, and where it answers."""

    name: str
    command: tuple[str, ...]
    env: dict[str, str] = field(repr=False)
    url: str | None = None
    ports: tuple[int, ...] = ()
    port_option: str = ""
    pool: str | None = None
    env_files: tuple[Path, ...] = ()

    @property
    def is_worker(self) -> bool:
        """Whether this is a worker: it listens nowhere and is asked about through Prefect."""
        return self.pool is not None

    def environment(self) -> dict[str, str]:
        """All its variables, those of ``env_files`` too: they are read when it starts, and never kept or shown.

        Raises:
            ConfigError: a file cannot be read, or a line is no NAME=VALUE; the line is not quoted.
        """
        merged = dict(self.env)
        for path in self.env_files:
            merged |= _read_env_file(path)
        return merged


def services(settings: StackSettings, folder: StackFolder, postgres: str | None) -> tuple[Service, ...]:
    """Return all services of a stack, servers first.

    Args:
        settings: what the stack is made of.
        folder: where it keeps its data.
        postgres: URL of the PostgreSQL server, where that is the database and one of the servers must start.
    """
    servers = [_prefect(settings, folder, postgres), _mlflow(settings, folder, postgres)]
    if settings.starts_s3:
        servers.append(_s3(settings, folder))
    return (*servers, _worker(settings, folder, None), *(_worker(settings, folder, site) for site in settings.sites))


def client_env(settings: StackSettings) -> dict[str, str]:
    """Variables that point a program at the stack; they hold no secret."""
    found = {"PREFECT_API_URL": settings.prefect_api_url, "MLFLOW_TRACKING_URI": settings.mlflow_url}
    if settings.s3_url is not None:
        found["AWS_ENDPOINT_URL_S3"] = settings.s3_url
    return found


def process_env(settings: StackSettings, prefect_home: Path) -> dict[str, str]:
    """Variables of every process of the stack: the user's, less what only one of them, or another stack, may have."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_OF_ANOTHER_STACK) and name not in _OF_ONE_PROCESS
    }
    loopback = ",".join(filter(None, [os.environ.get("NO_PROXY"), HOST, "localhost"]))
    return {
        **inherited,
        **_QUIET,
        **client_env(settings),
        "PREFECT_HOME": str(prefect_home),
        "NO_PROXY": loopback,
        "no_proxy": loopback,
    }


def object_store(settings: StackSettings, folder: StackFolder) -> ObjectStore:
    """The stack's own S3-compatible server."""
    return ObjectStore(folder.data / "s3", settings)


def _read_env_file(path: Path) -> dict[str, str]:
    """Read one NAME=VALUE a line; ``#`` begins a remark."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read env_file {path}: {type(error).__name__}.") from None
    found = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, separator, value = line.partition("=")
        if not separator or not name.strip().isidentifier():
            raise ConfigError(f"env_file {path}: line {number} must be NAME=VALUE.")
        found[name.strip()] = value.strip()
    return found


def _prefect(settings: StackSettings, folder: StackFolder, postgres: str | None) -> Service:
    page = f"http://{HOST}:{settings.prefect_port}"
    home = folder.data / "prefect"
    if settings.database == "sqlite":
        database = f"sqlite+aiosqlite:///{home / 'prefect.db'}"
    else:
        database = _postgres(settings, postgres, "asyncpg", "prefect")
    return Service(
        name=PREFECT,
        command=(
            sys.executable, "-m", "prefect", "server", "start", "--host", HOST,
            "--port", str(settings.prefect_port), "--analytics-off",
        ),
        env=process_env(settings, home) | {
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
            "PREFECT_SERVER_UI_API_URL": settings.prefect_api_url,
            "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home / "ui"),  # two stacks must not share one copy of the pages
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{page},http://localhost:{settings.prefect_port}",
        },
        url=page,
        ports=(settings.prefect_port,),
        port_option="--prefect-port",
    )  # fmt: skip


def _mlflow(settings: StackSettings, folder: StackFolder, postgres: str | None) -> Service:
    home = folder.data / "mlflow"
    if settings.database == "sqlite":
        database = f"sqlite:///{home / 'mlflow.db'}"
    else:
        database = _postgres(settings, postgres, "psycopg2", "mlflow")
    port = settings.mlflow_port
    return Service(
        name=MLFLOW,
        command=(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"),
        env=process_env(settings, home) | {
            "MLFLOW_BACKEND_STORE_URI": database,  # here and not in the command: it may hold a password
            "MLFLOW_ARTIFACTS_DESTINATION": (home / "artifacts").as_uri(),
            "MLFLOW_SERVER_ALLOWED_HOSTS": f"{HOST}:{port},localhost:{port}",
            "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": f"http://{HOST}:{port},http://localhost:{port}",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # judges and optimisers, which we do not use
        },
        url=settings.mlflow_url,
        ports=(port,),
        port_option="--mlflow-port",
    )  # fmt: skip


def _s3(settings: StackSettings, folder: StackFolder) -> Service:
    return Service(
        name=S3,
        command=object_store(settings, folder).command(),
        env=process_env(settings, folder.data / "s3"),
        url=settings.s3_url,
        ports=settings.s3_ports,
        port_option="--s3-port",
    )


def _worker(settings: StackSettings, folder: StackFolder, site: SiteSettings | None) -> Service:
    """A worker asks Prefect for work and opens no port. Only a site's own worker is told where its data is."""
    pool = SERVER_POOL if site is None else site.name
    env = process_env(settings, folder.data / "workers" / pool)
    env["FEDMENTOR_STORE_URL"] = _store(settings, folder, site)
    env_files = []
    if settings.starts_s3:
        env_files.append(object_store(settings, folder).credentials_file(pool))
    if site is not None:
        if site.env_file is not None:
            env_files.append(site.env_file)
        env |= {"FEDMENTOR_SITE": site.name, **site.env}
        if site.site_file is not None:
            env["FEDMENTOR_SITE_FILE"] = str(site.site_file.resolve())
        if site.data_root is not None:
            env["FEDMENTOR_DATA_ROOT"] = str(site.data_root.resolve())
    return Service(
        name=f"{WORKER}{pool}",
        command=(
            sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process",
            "--name", f"{WORKER}{pool}",
        ),
        env=env,
        pool=pool,
        env_files=tuple(env_files),
    )  # fmt: skip


def _store(settings: StackSettings, folder: StackFolder, site: SiteSettings | None) -> str:
    """A store of its own for each site."""
    place = SERVER_POOL if site is None else f"sites/{site.name}"
    if settings.store == "s3":
        return f"s3://{settings.s3_bucket}/{place}"
    return (folder.data / "store" / place).as_uri()


def _postgres(settings: StackSettings, url: str | None, driver: Literal["asyncpg", "psycopg2"], suffix: str) -> str:
    if url is None:
        return ""  # neither server starts now: ``lifecycle`` asks for the URL where one does
    return postgres_database(url, driver, f"{settings.database_prefix}_{suffix}")
