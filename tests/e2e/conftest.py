"""One Prefect server with its deployments for all tests that talk to it through its API."""

from collections.abc import Iterator

import pytest
from prefect_service import PrefectService


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectService]:
    """A Prefect server, the deployments of ``prefect.yaml``, and a worker of the pool 'server'."""
    made = PrefectService(tmp_path_factory.mktemp("service"))
    try:
        made.start_server()
        yield made
    finally:
        made.stop()
