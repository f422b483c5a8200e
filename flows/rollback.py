"""Give the alias champion back to the version that the present champion replaced."""

from prefect import flow

from fedmentor_core.records import ModelSummary
from tasks import registry


def rollback_command(tracking_uri: str, name: str, *, reason: str = "by hand") -> ModelSummary:
    """Body of ``fedmentor rollback``: move ``champion`` back, without an orchestrator.

    Args:
        tracking_uri: MLflow's.
        name: registered model.
        reason: recorded with the version that is left.

    Raises:
        ConfigError: there is no champion, or none before it.
    """
    return registry.rollback(tracking_uri, name, reason=reason)


@flow(name="rollback")
def rollback(tracking_uri: str, name: str, reason: str = "by hand") -> ModelSummary:
    """Give the alias champion back to the version that the present champion replaced."""
    return rollback_command(tracking_uri, name, reason=reason)
