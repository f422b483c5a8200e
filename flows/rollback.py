"""Give the alias champion back to the version that the present champion replaced."""

from prefect import flow

from fedmentor_core.records import ModelSummary
from tasks import registry
from tasks.registry_client import DEFAULT_NAME, registry_uri


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
def rollback(reason: str, name: str = DEFAULT_NAME, tracking_uri: str | None = None) -> ModelSummary:
    """Give the alias champion back to the version that the present champion replaced.

    Args:
        reason: Why, in a few words; recorded with the version that is left.
        name: Registered model.
        tracking_uri: MLflow's address; without it, the worker's own MLFLOW_TRACKING_URI.
    """
    return rollback_command(registry_uri(tracking_uri), name, reason=reason)
