"""Asking each service whether it works: a real request to each server, and Prefect's word on each worker."""

import time
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel, Field

from flows.stack import processes
from flows.stack.services import MLFLOW, PREFECT, S3, Service
from flows.stack.settings import StackError, StackSettings
from flows.stack.state import StackState

_HEALTH_PATH = {PREFECT: "/api/health", MLFLOW: "/health", S3: "/healthz"}
_TIMEOUT_SECONDS = 10.0
_LOG_TAIL_LINES = 15
_TAIL_BYTES = 8192


class ServiceStatus(BaseModel):
    """One row of ``fedmentor status``."""

    name: str
    healthy: bool
    detail: str
    url: str | None = None
    pid: int | None = None
    uptime_seconds: float | None = None
    log: str | None = None


class StackStatus(BaseModel):
    """What ``fedmentor status --json`` prints."""

    directory: str
    healthy: bool = Field(description="Every service answers, and there is at least one.")
    services: tuple[ServiceStatus, ...] = ()
    workers_online: tuple[str, ...] = ()
    work_pools: tuple[str, ...] = ()
    deployments: tuple[str, ...] = Field(default=(), description="FLOW/DEPLOYMENT, as prefect deployment run takes it.")
    prefect_api_url: str | None = None
    mlflow_tracking_uri: str | None = None
    s3_endpoint_url: str | None = None
    s3_credentials_file: str | None = Field(
        default=None, description="NAME=VALUE lines for a program that uses the stack's own S3-compatible server."
    )
    versions: dict[str, str] = {}


class PrefectApi:
    """The few calls of Prefect's API that the stack needs, on the loopback address and around any proxy."""

    def __init__(self, settings: StackSettings) -> None:
        """Talk to the Prefect server of this stack."""
        self._url = settings.prefect_api_url

    def call(self, method: str, path: str, body: object | None = None) -> Any:
        """Return the answer's JSON, or None for a 404.

        Raises:
            StackError: Prefect does not answer, or refuses.
        """
        try:
            answer = httpx.request(method, f"{self._url}{path}", json=body, timeout=_TIMEOUT_SECONDS, trust_env=False)
        except httpx.HTTPError as error:
            raise StackError(f"Prefect does not answer at {self._url}: {type(error).__name__}.") from None
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        if answer.is_error:
            raise StackError(f"Prefect refused {method} {path}: {answer.status_code}.")
        return answer.json() if answer.content else None

    def work_pools(self) -> tuple[str, ...]:
        """Names of all work pools."""
        return tuple(sorted(pool["name"] for pool in self.call("POST", "/work_pools/filter", {})))

    def workers(self, pool: str) -> dict[str, float]:
        """Workers of a pool that Prefect calls online: name and time of their last heartbeat, seconds since epoch."""
        found = self.call("POST", f"/work_pools/{pool}/workers/filter", {}) or []
        return {
            worker["name"]: datetime.fromisoformat(worker["last_heartbeat_time"]).timestamp()
            for worker in found
            if worker["status"] == "ONLINE" and worker["last_heartbeat_time"]
        }

    def deployments(self) -> tuple[str, ...]:
        """FLOW/DEPLOYMENT of everything that is deployed."""
        flows = {flow["id"]: flow["name"] for flow in self.call("POST", "/flows/filter", {})}
        found = self.call("POST", "/deployments/filter", {})
        return tuple(sorted(f"{flows.get(one['flow_id'], '?')}/{one['name']}" for one in found))


def check(service: Service, state: StackState) -> ServiceStatus:
    """Ask one service."""
    record = state.services.get(service.name)
    process = None if record is None else processes.find(record)
    if record is None or process is None:
        detail = "not started" if record is None else f"process {record.pid} ended"
        log = None if record is None else record.log
        return ServiceStatus(name=service.name, healthy=False, detail=detail, url=service.url, log=log)
    trouble = _worker_trouble(service, state, record.started) if service.is_worker else _server_trouble(service)
    return ServiceStatus(
        name=service.name,
        healthy=trouble is None,
        detail=trouble or ("online" if service.is_worker else "answers"),
        url=service.url,
        pid=record.pid,
        uptime_seconds=round(max(0.0, time.time() - record.started), 1),
        log=record.log,
    )


def check_endpoint(settings: StackSettings) -> ServiceStatus:
    """Ask an S3-compatible server that is not ours. That it answers is all this shows, not what it can do."""
    assert settings.s3_url is not None
    try:
        answer = httpx.get(settings.s3_url, timeout=_TIMEOUT_SECONDS, trust_env=False)
        trouble = f"answers {answer.status_code}" if answer.status_code >= httpx.codes.INTERNAL_SERVER_ERROR else None
    except httpx.HTTPError as error:
        trouble = f"does not answer: {type(error).__name__}"
    return ServiceStatus(name=S3, healthy=trouble is None, detail=trouble or "answers (external)", url=settings.s3_url)


def wait_until_healthy(
    waiting: Iterable[Service], state: StackState, say: Callable[[str], None], *, timeout_seconds: float
) -> None:
    """Wait until all of these answer.

    Raises:
        StackError: one ended or did not answer in time; the message ends with the last lines of its log.
    """
    left = list(waiting)
    until = time.monotonic() + timeout_seconds
    while left:
        still: list[Service] = []
        for service in left:
            seen = check(service, state)
            if seen.healthy:
                say(f"{service.name}{f' at {service.url}' if service.url else ''}: {seen.detail}")
            elif seen.pid is None or time.monotonic() > until:
                what = seen.detail if seen.pid is None else f"not healthy after {timeout_seconds:.0f} s ({seen.detail})"
                raise StackError(f"{service.name}: {what}.{_last_lines(seen.log)}")
            else:
                still.append(service)
        left = still
        if left:
            time.sleep(0.3)


def _server_trouble(service: Service) -> str | None:
    try:
        answer = httpx.get(f"{service.url}{_HEALTH_PATH[service.name]}", timeout=_TIMEOUT_SECONDS, trust_env=False)
    except httpx.HTTPError as error:
        return f"does not answer: {type(error).__name__}"
    return None if answer.is_success else f"answers {answer.status_code}"


def _worker_trouble(service: Service, state: StackState, started: float) -> str | None:
    """Prefect must have heard from a worker since it was started: an older heartbeat is of the one before it."""
    assert service.pool is not None
    try:
        heard = PrefectApi(state.settings).workers(service.pool).get(service.name)
    except StackError:
        return "Prefect does not answer"
    return None if heard is not None and heard >= started - 1.0 else "Prefect has not heard from it"


def _last_lines(log: str | None) -> str:
    if log is None or not Path(log).is_file():
        return ""
    with Path(log).open("rb") as handle:
        handle.seek(max(0, handle.seek(0, 2) - _TAIL_BYTES))
        lines = handle.read().decode(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
    return f" Last lines of {log}:\n" + "\n".join(f"  {line}" for line in lines)
