"""What may be retried, what may be told about a failure: one place for all tasks."""

from typing import Any

from fedmentor_core.errors import (
    BackboneError,
    BudgetError,
    ConfigError,
    DataError,
    FedMentorError,
    GateError,
    IntegrityError,
    LedgerError,
)
from fedmentor_core.study import failure_reason
from tasks.listening import InterruptedByUserError

NEVER_RETRIED = (
    BackboneError,
    BudgetError,
    ConfigError,
    DataError,
    GateError,
    IntegrityError,
    InterruptedByUserError,
    LedgerError,
)


def worth_retrying(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's ``retry_condition_fn``: not what a retry cannot mend (bad input, spent budget, broken ledger)."""
    error = state.result(raise_on_failure=False)
    return not (isinstance(error, NEVER_RETRIED) or isinstance(error.__cause__, NEVER_RETRIED))


class SiteFailureError(FedMentorError):
    """A client's failure as it may leave the site: our own message, or only the kind of the exception.

    Prefect stores exception texts and tracebacks; a library's message may quote the data it failed on.
    """


def telling_only_the_kind(error: Exception) -> FedMentorError:
    """``error`` itself when its message is ours, else a stand-in without its text."""
    return error if isinstance(error, FedMentorError) else SiteFailureError(failure_reason(error))
