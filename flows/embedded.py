"""Prefect without a server of the user's: one that lives as long as the command does."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, get_current_settings, temporary_settings

from flows.prefect_database import provide_database


@contextmanager
def embedded_prefect() -> Iterator[None]:
    """What a flow called in the block needs of Prefect where no server is named; with one, nothing changes.

    The database is there already, and no flow sends heartbeats: nobody listens who could outlive it, and a flow and
    each round would wait up to a second for the thread that sends them.
    """
    if get_current_settings().api.url:
        yield
        return
    provide_database()
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield
