"""Make a version champion by hand: only one that passed its gate."""

from prefect import flow

from fedmentor_core.records import ModelSummary
from tasks import registry


def promote_command(
    tracking_uri: str, name: str, version: str, *, reason: str = "by hand", allow_not_private: bool = False
) -> ModelSummary:
    """Body of ``fedmentor promote``: move ``champion``, without an orchestrator.

    Args:
        tracking_uri: MLflow's.
        name: registered model.
        version: its version.
        reason: recorded with the version.
        allow_not_private: accept a version without a privacy guarantee (research only).

    Raises:
        ConfigError: no such model or version.
        GateError: the version did not pass its gate, or is not private.
    """
    return registry.promote(tracking_uri, name, str(version), reason=reason, allow_not_private=allow_not_private)


@flow(name="promote")
def promote(
    tracking_uri: str, name: str, version: str, reason: str = "by hand", allow_not_private: bool = False
) -> ModelSummary:
    """Make a version that passed its gate the champion."""
    return promote_command(tracking_uri, name, version, reason=reason, allow_not_private=allow_not_private)
