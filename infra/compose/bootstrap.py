"""Prepare an empty deployment, or mend one: buckets, pools, limits, the zombie automation, MLflow's users, deployments.

Runs as a one-shot container; safe to repeat. What exists is kept, except for bucket policies and limits, which are set
to what this says. Secrets come from the environment (see ``with_secrets.py``) and are never printed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from string import Template
from typing import Any

import httpx
import yaml

INFRA = Path(__file__).resolve().parents[1]
POLICIES = INFRA / "policies"
SERVER_POOL = "server"


class Api:
    """A server's JSON API with basic authentication."""

    def __init__(self, url: str, credentials: str) -> None:
        """``credentials`` are ``user:password``."""
        user, _, password = credentials.partition(":")
        self._client = httpx.Client(base_url=url, auth=(user, password), timeout=30.0, trust_env=False)

    def call(self, method: str, path: str, body: Any = None, *, allowed: Sequence[int] = ()) -> httpx.Response:
        """Ask, and return the answer.

        Raises:
            SystemExit: it is an error of another kind than ``allowed``; its text is not shown.
        """
        answer = self._client.request(method, path, json=body)
        if answer.is_error and answer.status_code not in allowed:
            raise SystemExit(f"bootstrap: {method} {path}: {answer.status_code}")
        return answer


def make_buckets(client: Any, bucket: str, sites: Sequence[str]) -> None:
    """A bucket for the server, for MLflow and for each site; nothing is deleted from any but MLflow's.

    Args:
        client: boto3's S3 client with the bootstrap user's key.
        bucket: the common part of their names.
        sites: names of the sites.
    """
    lifecycle = json.loads((POLICIES / "bucket_lifecycle.json").read_text(encoding="utf-8"))
    undeleted = Template((POLICIES / "bucket_nothing_deleted.json").read_text(encoding="utf-8"))
    for part in ("server", "mlflow", *sites):
        name = f"{bucket}-{part}"
        with suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
            client.create_bucket(Bucket=name)
        client.put_bucket_lifecycle_configuration(Bucket=name, LifecycleConfiguration=lifecycle)
        if part != "mlflow":
            client.put_bucket_policy(Bucket=name, Policy=undeleted.substitute(name=name))


def make_pools_and_limits(prefect: Api, sites: Sequence[str]) -> None:
    """A process pool for the server and one for each site, where one run at a time has the GPU."""
    template = json.loads((INFRA / "stack" / "process_pool.json").read_text(encoding="utf-8"))
    for pool in (SERVER_POOL, *sites):
        body = {"name": pool, "type": "process", "base_job_template": template}
        prefect.call("POST", "/work_pools/", body, allowed=(409,))
    for site in sites:
        prefect.call("PATCH", f"/work_pools/{site}", {"concurrency_limit": 1})
        limit = {"name": f"gpu-{site}", "limit": 1, "active": True}
        if prefect.call("POST", "/v2/concurrency_limits/", limit, allowed=(409,)).status_code == 409:
            prefect.call("PATCH", f"/v2/concurrency_limits/{limit['name']}", {"limit": 1, "active": True})


def make_zombie_automation(prefect: Api) -> None:
    """The automation that marks silent flow runs as crashed; Prefect's own one is for its cloud only."""
    wanted = json.loads((INFRA / "compose" / "zombie_automation.json").read_text(encoding="utf-8"))
    there = prefect.call("POST", "/automations/filter", {}).json()
    if wanted["name"] not in {one["name"] for one in there}:
        prefect.call("POST", "/automations/", wanted)


def make_mlflow_users(mlflow: Api, passwords: dict[str, str]) -> None:
    """The experiment, the registered model, and the users of ``mlflow_roles.yaml`` with their permissions.

    Args:
        mlflow: its API, as administrator.
        passwords: of each user.
    """
    roles = yaml.safe_load((POLICIES / "mlflow_roles.yaml").read_text(encoding="utf-8"))
    name, model = roles["experiment"], roles["registered_model"]
    _create(mlflow, "/api/2.0/mlflow/experiments/create", {"name": name})
    _create(mlflow, "/api/2.0/mlflow/registered-models/create", {"name": model})
    found = mlflow.call("GET", f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}").json()
    ids = {"experiment": found["experiment"]["experiment_id"], "registered_model": model}
    for user, permissions in roles["users"].items():
        _create(mlflow, "/api/2.0/mlflow/users/create", {"username": user, "password": passwords[user]})
        for kind, permission in permissions.items():
            grant = {"username": user, "resource_type": kind, "resource_id": ids[kind], "permission": permission}
            _create(mlflow, "/api/3.0/mlflow/users/permissions/grant", grant)


def _create(mlflow: Api, path: str, body: dict[str, str]) -> None:
    """Create what may be there already: MLflow says so with a 400, as it says many other things."""
    answer = mlflow.call("POST", path, body, allowed=(400, 409))
    if answer.is_error and answer.json().get("error_code") != "RESOURCE_ALREADY_EXISTS":
        raise SystemExit(f"bootstrap: POST {path}: {answer.json().get('error_code')}")


def deploy() -> None:
    """Apply every deployment of prefect.yaml.

    Raises:
        SystemExit: it failed; Prefect's own output says why.
    """
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"], cwd=INFRA.parent, check=False
    )
    if done.returncode != 0:
        raise SystemExit("bootstrap: prefect deploy failed")


def main() -> None:
    """Everything, in order."""
    import boto3
    from botocore.config import Config

    sites = [site.strip() for site in os.environ["FEDMENTOR_SITES"].split(",") if site.strip()]
    settings = Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required")
    make_buckets(boto3.client("s3", config=settings), os.environ.get("FEDMENTOR_BUCKET", "fedmentor"), sites)
    print("buckets: done", flush=True)
    prefect = Api(os.environ["PREFECT_API_URL"], os.environ["PREFECT_API_AUTH_STRING"])
    make_pools_and_limits(prefect, sites)
    make_zombie_automation(prefect)
    print("prefect: done", flush=True)
    mlflow = Api(os.environ["MLFLOW_TRACKING_URI"], f"admin:{os.environ['MLFLOW_ADMIN_PASSWORD']}")
    users = ("trainer", "consumer")
    make_mlflow_users(mlflow, {user: os.environ[f"MLFLOW_{user.upper()}_PASSWORD"] for user in users})
    print("mlflow: done", flush=True)
    deploy()


if __name__ == "__main__":
    main()
