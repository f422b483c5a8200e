"""Every error a user can cause: what is wrong, what was got, what is allowed, what to do.

The command line maps these classes to exit codes (``exit_code``); anything else is a bug and exits 1.
Messages must never quote private text: name files, columns, row numbers and counts instead.
"""


class FedMentorError(Exception):
    """Base class. ``str(error)`` is the whole message for the user."""

    exit_code = 1


class ConfigError(FedMentorError):
    """A configuration that cannot be run: unknown key, impossible value, contradiction."""

    exit_code = 2


class DataError(FedMentorError):
    """A data file that is missing, empty, unreadable, or does not fit its column mapping."""

    exit_code = 2


class BackboneError(FedMentorError):
    """A backbone, scorer or LoRA target that cannot be found or does not fit."""

    exit_code = 2


class OutputExistsError(FedMentorError):
    """The output folder already belongs to another study."""

    exit_code = 2


class BudgetError(FedMentorError):
    """A privacy budget that cannot carry what was asked; nothing was released."""

    exit_code = 3


class LedgerError(FedMentorError):
    """A privacy ledger that is torn, tampered with or contended: training fails closed."""

    exit_code = 3


class GateError(FedMentorError):
    """The gate said no."""

    exit_code = 3


class StorageError(FedMentorError):
    """An artifact that could not be stored or read back."""


class IntegrityError(StorageError):
    """Bytes that do not have the digest they were stored under."""


class AlreadyExistsError(StorageError):
    """Create-if-absent found another object under the same key."""


class ConflictError(StorageError):
    """A pointer that another writer moved meanwhile."""


class NotFoundError(StorageError):
    """No object under this key."""


class UpdateRejectedError(FedMentorError):
    """A client update that must not be aggregated (shape, dtype, NaN, digest, round, study)."""


class SiteError(FedMentorError):
    """A site that gave no usable answer; the round goes on without it."""


class SiteUnavailableError(SiteError):
    """A site that is down, or did not answer by its deadline."""


class AnswerRejectedError(SiteError):
    """A site's answer that must not count: unsigned, another study's or round's, or not what was asked."""


class SharedPostsError(BudgetError):
    """Posts that are also another account's; the message holds their share, which does not leave a site."""


class DeadlineError(FedMentorError):
    """A step loop that ran past its deadline."""


class IsolationError(FedMentorError):
    """A client's own process that ended without an answer, or would not end."""
