"""Prefect's own test harness, started sooner: its database is migrated already, and flows do not wait for heartbeats."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch


@contextmanager
def throwaway_prefect() -> Iterator[None]:
    """A Prefect server and database that end with the block; settings of this process point at them."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.testing import utilities

    from flows.prefect_database import put_database

    def folder_with_database() -> str:
        folder = Path(tempfile.mkdtemp())
        if put_database(folder):
            (folder / "prefect.db").rename(folder / "prefect-test.db")
        return str(folder)

    with (
        patch.object(utilities, "mkdtemp", folder_with_database),
        utilities.prefect_test_harness(server_startup_timeout=240),
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
        yield
