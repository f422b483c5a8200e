"""What may be retried, for all tasks. What may be told of a failure is in ``fedmentor_core/discretion.py``."""

from typing import Any

from fedmentor_core.errors import (
    AnswerRejectedError,
    BackboneError,
    BudgetError,
    ConfigError,
    DataError,
    DeadlineError,
    GateError,
    IntegrityError,
    LedgerError,
    SiteUnavailableError,
)
from tasks.listening import InterruptedByUserError

NEVER_RETRIED = (
    AnswerRejectedError,
    BackboneError,
    BudgetError,
    ConfigError,
    DataError,
    DeadlineError,
    GateError,
    IntegrityError,
    InterruptedByUserError,
    LedgerError,
    SiteUnavailableError,
)


def worth_retrying(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's ``retry_condition_fn``: not what a retry cannot mend (bad input, spent budget, broken ledger)."""
    return not isinstance(state.result(raise_on_failure=False), NEVER_RETRIED)
