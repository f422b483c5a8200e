"""What the servers must hold before there is work: databases, a bucket, work pools, deployments."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fedmentor_core.config import StorageConfig
from fedmentor_core.config_io import load_config
from fedmentor_core.errors import ConfigError, StorageError
from flows.deployment_parameters import study_variable
from flows.stack.health import PrefectApi
from flows.stack.services import process_env
from flows.stack.settings import POSTGRES_VARIABLE, StackError, StackSettings
from flows.stack.state import StackFolder

CHECKOUT = Path(__file__).resolve().parents[2]
PREFECT_FILE = CHECKOUT / "prefect.yaml"
PARAMETER_MODELS = (CHECKOUT / "fedmentor_core" / "config.py", CHECKOUT / "fedmentor_core" / "site" / "requests.py")
PARAMETER_FILES = CHECKOUT / "infra" / "configs"
SITE_ENTRYPOINT = "flows/client_site.py:client_site"
POOL_TEMPLATE = CHECKOUT / "infra" / "stack" / "process_pool.json"
_DEPLOY_TIMEOUT_SECONDS = 300.0


def make_databases(settings: StackSettings, url: str) -> None:
    """Create Prefect's and MLflow's PostgreSQL databases where they are missing.

    Two databases, because both keep the revision of their schema in a table of the same name.

    Raises:
        ConfigError: the driver is not installed.
        StackError: the server cannot be reached, or the user may not create databases.
    """
    try:
        import psycopg2
        from psycopg2 import sql
    except ImportError:
        raise ConfigError("PostgreSQL needs its driver. Run: pip install 'fedmentor[postgres]'.") from None
    names = [f"{settings.database_prefix}_{suffix}" for suffix in ("prefect", "mlflow")]
    try:
        connection = psycopg2.connect(url, connect_timeout=10)
    except psycopg2.OperationalError:  # its text names the host and the user
        raise StackError(f"cannot connect to PostgreSQL. Check --postgres-url or {POSTGRES_VARIABLE}.") from None
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            for name in names:
                cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,))
                if cursor.fetchone() is None:
                    cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    except psycopg2.Error as error:
        raise StackError(
            f"PostgreSQL refused to create {' and '.join(names)} ({type(error).__name__}). Create them by hand."
        ) from None
    finally:
        connection.close()


def make_bucket(settings: StackSettings, credentials: Mapping[str, str]) -> None:
    """Create the bucket on the stack's own S3-compatible server.

    Args:
        settings: of the stack.
        credentials: AWS variables of the server's own identity.

    Raises:
        StackError: the server refused.
    """
    from fedmentor_core.storage.s3_client import create_bucket

    try:
        create_bucket(
            settings.s3_bucket,
            StorageConfig(endpoint_url=settings.s3_url, deadline_seconds=60.0),
            access_key=credentials["AWS_ACCESS_KEY_ID"],
            secret_key=credentials["AWS_SECRET_ACCESS_KEY"],
        )
    except StorageError as error:
        raise StackError(str(error)) from None


def make_work_pools(settings: StackSettings) -> None:
    """Create the process work pools that are missing; those that exist keep what an operator changed in them.

    Raises:
        StackError: Prefect refused.
    """
    api = PrefectApi(settings)
    template = json.loads(POOL_TEMPLATE.read_text(encoding="utf-8"))
    there = api.work_pools()
    for pool in dict.fromkeys((*settings.pools, *(one["work_pool"]["name"] for one in _described()["deployments"]))):
        if pool not in there:
            description = "Flows of the server." if pool == settings.pools[0] else f"Work that runs at site {pool}."
            body = {"name": pool, "type": "process", "description": description, "base_job_template": template}
            api.call("POST", "/work_pools/", body)


def deployment_digest(settings: StackSettings) -> str:
    """sha256 of what ``deploy`` applies: prefect.yaml, its flows, the models of their parameters, sites and studies.

    Raises:
        ConfigError: there is no prefect.yaml: the package runs from somewhere else than a checkout; or a study is given
            for a deployment that has none, or cannot be read.
    """
    _check_studies(settings)
    flows = sorted({CHECKOUT / one["entrypoint"].split(":")[0] for one in _described()["deployments"]})
    made = hashlib.sha256()
    for path in (PREFECT_FILE, *flows, *PARAMETER_MODELS, *sorted(PARAMETER_FILES.glob("*.yaml"))):
        made.update(hashlib.sha256(path.read_bytes()).digest())
    made.update("\0".join(site.name for site in settings.sites).encode())
    for name, path in sorted(settings.studies.items()):
        made.update(name.encode())
        made.update(hashlib.sha256(path.read_bytes()).digest())
    return made.hexdigest()


def _check_studies(settings: StackSettings) -> None:
    known = [name for step in _described()["build"] for name in next(iter(step.values())) if name != "id"]
    for name, path in settings.studies.items():
        if name not in known:
            raise ConfigError(f"studies: no deployment {name!r} takes a study. Allowed: {', '.join(known)}.")
        load_config(path)


def _described() -> dict[str, Any]:
    """What prefect.yaml says.

    Raises:
        ConfigError: there is none: the package runs from somewhere else than a checkout.
    """
    if not PREFECT_FILE.is_file():
        raise ConfigError(f"no prefect.yaml in {CHECKOUT}. Start the stack from a checkout of the repository.")
    found: dict[str, Any] = yaml.safe_load(PREFECT_FILE.read_text(encoding="utf-8"))
    return found


def _of_other_sites(settings: StackSettings) -> dict[str, Any] | None:
    """A prefect.yaml with the deployments of sites that the checkout's own does not name; None: there are none."""
    described = _described()
    named = {one["work_pool"]["name"] for one in described["deployments"]}
    like = next(one for one in described["deployments"] if one["entrypoint"] == SITE_ENTRYPOINT)
    made = [
        {**like, "name": site.name, "work_pool": {"name": site.name}}
        for site in settings.sites
        if site.name not in named
    ]
    return {**described, "deployments": made} if made else None


def deploy(settings: StackSettings, folder: StackFolder) -> None:
    """Apply every deployment of prefect.yaml, by the command that its documentation gives, and those of other sites.

    Raises:
        StackError: the command failed; its output is in ``logs/deploy.log``.
    """
    _deploy_all(settings, folder, PREFECT_FILE)
    others = _of_other_sites(settings)
    if others is not None:
        path = folder.data / "prefect-sites.yaml"
        path.write_text(yaml.safe_dump(others), encoding="utf-8")
        _deploy_all(settings, folder, path)


def _deploy_all(settings: StackSettings, folder: StackFolder, described: Path) -> None:
    log = folder.logs / "deploy.log"
    with log.open("ab") as output:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(described)],
                env=process_env(settings, folder.data / "prefect")
                | {study_variable(name): str(path) for name, path in settings.studies.items()},
                cwd=CHECKOUT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=_DEPLOY_TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise StackError(f"prefect deploy took over {_DEPLOY_TIMEOUT_SECONDS:.0f} s. See {log}.") from None
    if done.returncode != 0:
        raise StackError(f"prefect deploy failed ({done.returncode}). See {log}.")
