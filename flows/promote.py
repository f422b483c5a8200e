"""Make a version champion by hand: only one that passed its gate, and its audit where one is given or asked for."""

from pathlib import Path

from prefect import flow

from fedmentor_core.audit.verdict import read_audit
from fedmentor_core.records import ModelSummary
from tasks import registry
from tasks.registry_client import DEFAULT_NAME, registry_uri


def promote_command(
    tracking_uri: str,
    name: str,
    version: str,
    *,
    reason: str = "by hand",
    audit: str | Path | None = None,
    allow_not_private: bool = False,
) -> ModelSummary:
    """Body of ``fedmentor promote``: move ``champion``, without an orchestrator.

    Args:
        tracking_uri: MLflow's.
        name: registered model.
        version: its version.
        reason: recorded with the version.
        audit: an ``audit.json`` or its folder; its verdict is recorded and must be a pass on the same mechanism.
        allow_not_private: accept a version without a privacy guarantee (research only).

    Raises:
        ConfigError: no such model, version or audit.
        GateError: the version's gate or audit says no, the audit is of another mechanism, or it is not private.
    """
    return registry.promote(
        tracking_uri,
        name,
        str(version),
        reason=reason,
        audit=None if audit is None else read_audit(Path(audit)),
        allow_not_private=allow_not_private,
    )


@flow(name="promote")
def promote(
    version: str,
    reason: str,
    name: str = DEFAULT_NAME,
    tracking_uri: str | None = None,
    audit: str | None = None,
    allow_not_private: bool = False,
) -> ModelSummary:
    """Make a version the champion, if its gate, audit, files and ledger allow it.

    Args:
        version: Number of the version, as MLflow's registry shows it.
        reason: Why, in a few words; recorded with the version.
        name: Registered model.
        tracking_uri: MLflow's address; without it, the worker's own MLFLOW_TRACKING_URI.
        audit: audit.json or its folder, on the worker's machine. It must have passed on the version's own mechanism.
        allow_not_private: Accept a version without a privacy guarantee. For research only.
    """
    uri = registry_uri(tracking_uri)
    return promote_command(uri, name, version, reason=reason, audit=audit, allow_not_private=allow_not_private)
