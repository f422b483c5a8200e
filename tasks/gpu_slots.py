"""A Prefect concurrency limit held while a client trains: the server's view of who has a GPU.

The strict guard is the operating system's (``fedmentor_core/slots.py``): it knows at once when a process is gone. This
one is seen in Prefect's pages and counts over several machines. Its slot is a lease that the holder renews; after
``kill -9`` the server takes it back when the lease runs out.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency

from fedmentor_core.errors import ConfigError

GPU_LIMIT_VARIABLE = "FEDMENTOR_GPU_LIMIT"
LEASE_SECONDS = 60.0
"""The shortest that Prefect allows; renewed at three quarters of it."""


@contextmanager
def prefect_slot(limit: str | None) -> Iterator[None]:
    """Hold one slot of a Prefect global concurrency limit while the block runs; None: no limit.

    A renewal that fails does not stop the training: its charge is spent, and the machine's own lock still holds.

    Raises:
        ConfigError: there is no such limit, or it lets nobody in.
    """
    with ExitStack() as stack:
        if limit is not None:
            lease = concurrency(limit, strict=True, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False)
            try:
                stack.enter_context(lease)
            except ConcurrencySlotAcquisitionError:
                raise ConfigError(
                    f"Prefect gives out no slot of the concurrency limit {limit!r}. Look at it: prefect gcl inspect "
                    f"{limit}; or make it: prefect gcl create {limit} --limit 1."
                ) from None
        yield


def gpu_limit_of_environment() -> str | None:
    """The limit that a site's worker was told to respect, in ``FEDMENTOR_GPU_LIMIT``."""
    return os.environ.get(GPU_LIMIT_VARIABLE) or None
