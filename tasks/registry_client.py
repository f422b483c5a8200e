"""Reading and writing the MLflow model registry: one connection, aliases, versions, tags, and errors that say what."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from fedmentor_core.config import TrackingConfig
from fedmentor_core.errors import ConfigError, FedMentorError
from fedmentor_core.records import ModelSummary
from tasks.mlflow_connection import mlflow_client, no_answer, quoted
from tasks.registration_records import MOST_TAG_CHARACTERS

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
DEFAULT_NAME = TrackingConfig().registered_model


class RegistryError(FedMentorError):
    """The registry could not be written or does not show what was written."""


class RegistrySilentError(RegistryError):
    """The registry does not answer just now; what was begun can be finished later."""


@contextlib.contextmanager
def registry_errors(action: str) -> Iterator[None]:
    """Turn MLflow's and the network's errors into ones that say what was being done."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        kind = RegistrySilentError if no_answer(error) else RegistryError
        raise kind(
            f"MLflow could not {action}: {lines[0][:300].rstrip('.')}. "
            "Run the same command again: it finishes what was begun."
        ) from error


def registry_uri(given: str | None) -> str:
    """MLflow's address: as given, else this process's MLFLOW_TRACKING_URI.

    Raises:
        ConfigError: neither is there.
    """
    uri = given or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise ConfigError("no tracking_uri is given and MLFLOW_TRACKING_URI is not set; one of them must name MLflow.")
    return uri


def open_registry(tracking_uri: str, name: str, *, must_exist: bool = False) -> "MlflowClient":
    """A client for the registry, once the registered model's name is one that queries and URIs can hold.

    Raises:
        ConfigError: a name that is not allowed, or no database where one must be.
    """
    if not re.fullmatch(r"[^/:'\"%@\s][^/:'\"%@]*", name):
        raise ConfigError(f"a registered model's name must not hold any of / : ' \" % @, got {name!r}.")
    return mlflow_client(tracking_uri, must_exist=must_exist)


def ensure_registered_model(client: "MlflowClient", name: str) -> None:
    """Create the registered model where it is missing."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description="FedMentor adapters: LoRA on a frozen backbone.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def get_version(client: "MlflowClient", name: str, version: str) -> "ModelVersion":
    """A version by its number.

    Raises:
        ConfigError: there is none; says which there are.
    """
    from mlflow.exceptions import MlflowException

    known = sorted((str(one.version) for one in client.search_model_versions(f"name = {quoted(name)}")), key=int)
    if version not in known:
        raise ConfigError(f"{name!r} has no version {version!r}; it has: {', '.join(known) or 'none'}.")
    try:
        return client.get_model_version(name, version)
    except MlflowException as error:
        raise ConfigError(f"{name!r} version {version} cannot be read: {error}.") from None


def aliases_of(client: "MlflowClient", name: str) -> dict[str, str]:
    """Version by alias.

    Raises:
        ConfigError: no such registered model; says which there are.
    """
    from mlflow.exceptions import MlflowException

    try:
        return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = ", ".join(sorted(one.name for one in client.search_registered_models())) or "none"
        raise ConfigError(f"no registered model {name!r}; the registry has: {known}.") from None


def find_alias(client: "MlflowClient", name: str, alias: str) -> str | None:
    """The version that an alias points at; None where there is no such alias, or no such registered model yet."""
    from mlflow.exceptions import MlflowException

    with registry_errors(f"read {name!r}"):
        try:
            found = client.get_registered_model(name).aliases.get(alias)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
    return None if found is None else str(found)


def verify_champion(client: "MlflowClient", name: str, version: str) -> None:
    """Read the alias back.

    Raises:
        RegistryError: it points elsewhere.
    """
    shown = aliases_of(client, name).get(CHAMPION)
    if shown != version:
        raise RegistryError(
            f"the champion of {name!r} should be version {version} but the registry shows {shown}: "
            "another process moved the alias at the same time. Check both, then promote the right one."
        )


def set_tags(client: "MlflowClient", name: str, version: str, tags: Mapping[str, str]) -> None:
    """Set a version's tags, in order, so that the last one can tell that all are there."""
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value[:MOST_TAG_CHARACTERS])


def summary_of(client: "MlflowClient", name: str, version: str) -> ModelSummary:
    """A version with the aliases that point at it now."""
    aliases = tuple(sorted(alias for alias, at in aliases_of(client, name).items() if at == version))
    return ModelSummary(name=name, version=version, aliases=aliases)
