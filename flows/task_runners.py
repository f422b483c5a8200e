"""Where mapped tasks run: in threads of this process, or on the machines of a Ray cluster, as the configuration says.

Ray is connected to once a study, so that its processes, which have loaded torch and the backbone, serve all rounds. All
of them talk to the one Prefect API that the flow talks to: left alone, each would start a server of its own.
"""

import os
from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlparse

import psutil
from prefect import flow, unmapped
from prefect.context import FlowRunContext
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_SERVER_EPHEMERAL_ENABLED,
    get_current_settings,
    temporary_settings,
)
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.utilities.annotations import quote

from fedmentor_core.config import ExecutionConfig
from fedmentor_core.errors import ConfigError
from fedmentor_core.slots import visible_gpus
from fedmentor_core.workspace import Workspace

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_OBJECT_STORE_BYTES = 100 * 2**20  # what crosses is kilobytes; Ray would take a third of the memory


def thread_runner(execution: ExecutionConfig, *, waiting: int = 0) -> Any:
    """The task runner of a round.

    Args:
        execution: says how many clients train at the same time.
        waiting: more threads, for tasks that only wait for a site.
    """
    return ThreadPoolTaskRunner(max_workers=execution.max_parallel_clients + waiting)


def overlaps(workspace: Workspace) -> bool:
    """Whether the next round's clients may train beside an evaluation: where that takes no machine from it.

    Never with sites: a site does one thing at a time, and what it is asked meanwhile would wait on its deadline's time.
    """
    execution = workspace.config.execution
    if workspace.domains_at_sites or execution.overlap_rounds == "never":
        return False
    if execution.overlap_rounds == "always" or execution.task_runner == "ray":
        return True
    return len(visible_gpus(workspace.config.backbone.device)) > 1


def same_for_all(value: Any, execution: ExecutionConfig) -> Any:
    """An argument that every mapped task gets as it is.

    Prefect would search it for futures, several times a task: for a study's whole configuration that is the larger part
    of what mapping a client costs. Ray's task runner hands a task the quoted value itself, so there the search stays.
    """
    return unmapped(value if execution.task_runner == "ray" else quote(value))


@contextmanager
def machines(execution: ExecutionConfig) -> Iterator[None]:
    """The machines of a study are at hand while the block runs. Does nothing where the configuration names no cluster.

    Raises:
        ConfigError: Ray is not installed or cannot be reached, or its machines could not reach the Prefect server.
    """
    if execution.task_runner != "ray":
        yield
        return
    if find_spec("prefect_ray") is None:
        raise ConfigError("execution.task_runner 'ray' needs Ray. Run: pip install 'fedmentor[ray]'.")
    api_url = _api_url()
    with temporary_settings({PREFECT_API_URL: api_url, PREFECT_SERVER_EPHEMERAL_ENABLED: False}):
        _connect(execution)
        import ray

        try:
            _check_reach(api_url, {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]})
            yield
        finally:
            ray.shutdown()


@contextmanager
def mapped_to_machines(execution: ExecutionConfig) -> Iterator[None]:
    """Tasks that are mapped in the block, in a flow, go to the study's machines; their results must be read in it."""
    if execution.task_runner != "ray":
        yield
        return
    from prefect_ray import RayTaskRunner
    from prefect_ray.context import remote_options

    context = FlowRunContext.get()
    assert context is not None
    assert context.flow is not None
    with ExitStack() as stack:
        runner = stack.enter_context(RayTaskRunner())  # uses the connection that ``machines`` made
        shown = _empty.with_options(name=context.flow.name)
        stack.enter_context(context.model_copy(update={"task_runner": runner, "flow": shown}))
        stack.enter_context(
            remote_options(
                num_cpus=execution.cpus_per_client,
                num_gpus=execution.gpus_per_client,  # with one, Ray ends the worker after each task: memory comes back
                max_retries=0,  # who tries again, and pays for it, is decided by execution.client_retries alone
            )
        )
        yield


@flow(persist_result=False, log_prints=False, validate_parameters=False)
def _empty() -> None:
    """Goes to the machines in the place of the real flow, whose function holds what only this process can."""


def _connect(execution: ExecutionConfig) -> None:
    """Connect to the cluster, or start one of this machine alone. Workers' output stays in Ray's logs where they run.

    Raises:
        ConfigError: the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    own: dict[str, Any] = {}
    if execution.ray_address is None:
        own = {
            "num_cpus": execution.max_parallel_clients * execution.cpus_per_client,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    try:
        ray.init(
            execution.ray_address or "local", namespace="fedmentor", log_to_driver=False, logging_level="ERROR", **own
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the Ray cluster {execution.ray_address or 'of this machine'!r} cannot be used "
            f"({type(error).__name__}). Check execution.ray_address, that 'ray status' lists its machines there, and "
            "that they run the same versions of Python and Ray."
        ) from None


def _api_url() -> str:
    """The Prefect API that this flow talks to; an embedded server has an address too, which this machine reaches."""
    url = get_current_settings().api.url
    if url is not None:
        return url
    from prefect.server.api.server import SubprocessASGIServer  # slow to import

    return SubprocessASGIServer().api_url  # the one that serves this process


def _check_reach(api_url: str, addresses: Set[str]) -> None:
    """Refuse a Prefect server that only this machine reaches, where the cluster has other machines.

    Args:
        api_url: of the server's API.
        addresses: of the cluster's machines.

    Raises:
        ConfigError: they could not report to it.
    """
    host = urlparse(api_url).hostname
    others = addresses - _own_addresses()
    if host in _LOOPBACK and others:
        raise ConfigError(
            f"the Prefect server is at {api_url}, which only this machine reaches, and the Ray cluster has other "
            f"machines ({', '.join(sorted(others))}). Start one that all of them reach ('prefect server start --host "
            "ADDRESS'), set PREFECT_API_URL to it, and start the study again."
        )


def _own_addresses() -> set[str]:
    return {one.address for each in psutil.net_if_addrs().values() for one in each} | set(_LOOPBACK)
