"""The MLflow model registry: a candidate becomes challenger, is judged, and becomes champion or does not.

A registered model is the adapter (safetensors and JSON), ``backbone.json`` that names the frozen backbone and
its sha256, and ``serve_model.py``: models-from-code, so nothing is pickled and no backbone weight is copied.

Order, each step recorded before the next: version with gate=pending -> alias ``challenger`` -> gate=passed
or failed with reasons -> tag ``previous_champion`` -> alias ``champion`` -> read back -> tag ``promoted_at``.
The registry has no compare-and-swap on aliases, so the way back is written before the alias moves.

Unlike tracking, a failure here is an error: a study must not believe it promoted what it did not. Every
function can be called again after a crash and finishes what was begun.
"""

import contextlib
import hashlib
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fedmentor_core import __version__
from fedmentor_core.errors import ConfigError, FedMentorError, GateError
from fedmentor_core.hashing import canonical_sha256
from fedmentor_core.records import ClientSummary, GateSummary, ModelSummary, Record
from tasks.tracking import RUN_ID_TAG, mlflow_client, quoted

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

CHALLENGER = "challenger"
CHAMPION = "champion"
GATE_TAG = "gate"
REASONS_TAG = "gate_reasons"
PREVIOUS_TAG = "previous_champion"
PROMOTED_TAG = "fedmentor.promoted_at"
PRIVATE_TAG = "fedmentor.private"
ADAPTER_TAG = "fedmentor.adapter_sha256"
CONFIG_TAG = "fedmentor.config_sha256"
HELD_TAG = "fedmentor.held"
INPUT_COLUMNS = ("post", "question", "prompt")
NO_CHAMPION = "none"
ADAPTER_SUFFIXES = (".safetensors", ".json")
PIP_REQUIREMENTS = (
    f"fedmentor=={__version__}",
    "mlflow>=3.17,<3.18",
    "peft>=0.21,<0.22",
    "safetensors>=0.5",
    "torch>=2.11,<2.14",
    "transformers>=5.20,<6",
)
_save_lock = threading.Lock()  # models-from-code leaves the model in a module global of MLflow's


class RegistryError(FedMentorError):
    """The registry could not be written or does not show what was written."""


class BackboneReference(Record):
    """``backbone.json``: which frozen backbone an adapter belongs to; never its weights."""

    format_version: Literal[1] = 1
    name: str = Field(description="'embedded', a folder, or a hub id, as in the study's configuration.")
    revision: str | None = None
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Digest of the weights; checked when loading.")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_length: int = Field(ge=32)
    max_new_tokens: int = Field(default=48, ge=1, description="Default length of an answer.")


class DomainPrivacy(Record):
    """What one domain's data cost, lifetime, when the model was registered."""

    domain: str
    epsilon_spent: float | None
    epsilon_budget: float | None
    delta: float | None

    @classmethod
    def of(cls, clients: Sequence[ClientSummary]) -> "tuple[DomainPrivacy, ...]":
        """From the clients of the last round: epsilon spent includes later rounds than the selected one's."""
        names = tuple(cls.model_fields)
        return tuple(cls(**{name: getattr(one, name) for name in names}) for one in clients)


class Registration(Record):
    """What is registered, apart from the adapter's files."""

    name: str = Field(min_length=1, description="Registered model.")
    study_run_id: str
    mlflow_run_id: str = Field(min_length=1, description="The study's parent run.")
    config_sha256: str
    private: bool
    privacy: tuple[DomainPrivacy, ...]
    backbone: BackboneReference


def register_and_decide(
    tracking_uri: str,
    registration: Registration,
    adapter_folder: Path,
    gate: GateSummary,
    *,
    allow_not_private: bool = False,
) -> ModelSummary:
    """``register_challenger``, then ``decide``."""
    challenger = register_challenger(tracking_uri, registration, adapter_folder)
    return decide(tracking_uri, challenger.name, challenger.version, gate, allow_not_private=allow_not_private)


def register_challenger(tracking_uri: str, registration: Registration, adapter_folder: Path) -> ModelSummary:
    """Register an adapter folder as a new version with gate=pending and the alias ``challenger``.

    Guarantees:
        The same adapter of the same study run is registered once, however often this is called.

    Raises:
        ConfigError: the folder is no adapter, or the name is not allowed.
        RegistryError: MLflow refused.
    """
    digests = _adapter_digests(Path(adapter_folder))
    adapter_sha256 = canonical_sha256(digests)
    client = _client(tracking_uri, registration.name)
    with _registry_errors(f"register a version of {registration.name!r}"):
        version = _find_version(client, registration, adapter_sha256)
        if version is None:
            _ensure_registered_model(client, registration.name)
            logged = _logged_model(client, registration, Path(adapter_folder), adapter_sha256)
            # Not the source 'models:/<id>': a sqlite registry resolves that by the process-wide tracking URI.
            version = client.create_model_version(
                registration.name,
                source=logged.artifact_location,
                run_id=registration.mlflow_run_id,
                model_id=logged.model_id,
                tags=_identity_tags(registration, adapter_sha256) | {GATE_TAG: "pending"},
            )
        if version.tags.get(GATE_TAG) == "pending":
            client.set_registered_model_alias(registration.name, CHALLENGER, version.version)
        return _summary(client, registration.name, str(version.version))


def decide(
    tracking_uri: str,
    name: str,
    version: str,
    gate: GateSummary,
    *,
    allow_not_private: bool = False,
) -> ModelSummary:
    """Record the gate's verdict on a version and, if it passed, make it champion.

    A version that was champion before is never moved back by this automatic path, so that resuming an old
    study undoes neither a rollback nor a newer champion. A study that is not private stays challenger.

    Args:
        tracking_uri: where the registry is.
        name: registered model.
        version: its version.
        gate: the final verdict.
        allow_not_private: let a model without a privacy guarantee become champion (research only).

    Raises:
        RegistryError: MLflow refused, or reading back shows another champion.
    """
    client = _client(tracking_uri, name)
    with _registry_errors(f"record the verdict on {name!r} version {version}"):
        tags = {
            REASONS_TAG: "; ".join(gate.reasons) or "every threshold passed",
            GATE_TAG: "passed" if gate.passed else "failed",
        }
        _tag(client, name, version, tags)
        found = client.get_model_version(name, version)
        if not gate.passed or PROMOTED_TAG in found.tags:
            return _summary(client, name, version)
        if found.tags.get(PRIVATE_TAG) != "true" and not allow_not_private:
            _tag(client, name, version, {HELD_TAG: "the study is not private"})
            return _summary(client, name, version)
    return promote(tracking_uri, name, version, reason="passed its gate", allow_not_private=allow_not_private)


def promote(
    tracking_uri: str, name: str, version: str, *, reason: str, allow_not_private: bool = False
) -> ModelSummary:
    """Move the alias ``champion`` to a version that passed its gate.

    Args:
        tracking_uri: where the registry is.
        name: registered model.
        version: its version.
        reason: recorded with the version.
        allow_not_private: accept a version without a privacy guarantee.

    Raises:
        ConfigError: no such model or version.
        GateError: the version did not pass its gate, or is not private.
        RegistryError: MLflow refused, or reading back shows another champion.
    """
    client = _client(tracking_uri, name, must_exist=True)
    with _registry_errors(f"promote {name!r} version {version}"):
        found = _get_version(client, name, version)
        gate = found.tags.get(GATE_TAG, "missing")
        if gate != "passed":
            raise GateError(
                f"{name!r} version {version} cannot be promoted: its gate is {gate!r}, not 'passed' "
                f"({found.tags.get(REASONS_TAG, 'no verdict recorded')}). The champion is unchanged."
            )
        if found.tags.get(PRIVATE_TAG) != "true" and not allow_not_private:
            raise GateError(
                f"{name!r} version {version} cannot be promoted: its study was not private. The champion is unchanged."
            )
        current = _aliases(client, name).get(CHAMPION)
        if current != version:
            _tag(client, name, version, {PREVIOUS_TAG: current or NO_CHAMPION})
            client.set_registered_model_alias(name, CHAMPION, version)
            _verify_champion(client, name, version)
        elif PREVIOUS_TAG not in found.tags:
            _tag(client, name, version, {PREVIOUS_TAG: NO_CHAMPION})
        if current != version or PROMOTED_TAG not in found.tags:
            _tag(client, name, version, {"fedmentor.promoted_reason": reason, PROMOTED_TAG: _now()})
        return _summary(client, name, version)


def rollback(tracking_uri: str, name: str, *, reason: str) -> ModelSummary:
    """Move ``champion`` back to the version that it replaced, and say so on both versions.

    Raises:
        ConfigError: there is no champion, or none before it.
        RegistryError: MLflow refused, or reading back shows another champion.
    """
    client = _client(tracking_uri, name, must_exist=True)
    with _registry_errors(f"roll back {name!r}"):
        current = _aliases(client, name).get(CHAMPION)
        if current is None:
            raise ConfigError(f"{name!r} has no champion, so there is nothing to roll back.")
        previous = _get_version(client, name, current).tags.get(PREVIOUS_TAG, NO_CHAMPION)
        if previous == NO_CHAMPION:
            raise ConfigError(
                f"{name!r} version {current} is the first champion: there is no earlier one to go back to."
            )
        _get_version(client, name, previous)
        _tag(
            client,
            name,
            current,
            {"fedmentor.rolled_back_reason": reason, "fedmentor.rolled_back_at": _now()},
        )
        client.set_registered_model_alias(name, CHAMPION, previous)
        _verify_champion(client, name, previous)
        _tag(client, name, previous, {"fedmentor.restored_from": current})
        return _summary(client, name, previous)


def champion(tracking_uri: str, name: str) -> ModelSummary | None:
    """The current champion; None when there is none yet.

    Raises:
        ConfigError: no such registered model.
    """
    client = _client(tracking_uri, name, must_exist=True)
    with _registry_errors(f"read {name!r}"):
        current = _aliases(client, name).get(CHAMPION)
        return None if current is None else _summary(client, name, current)


@dataclass(frozen=True)
class LoadedModel:
    """A registered model, ready to answer.

    Attributes:
        name: registered model.
        version: its version.
        pyfunc: MLflow's ``PyFuncModel``.
    """

    name: str
    version: str
    pyfunc: Any

    def answers(self, rows: Sequence[Mapping[str, str]], max_new_tokens: int | None = None) -> list[str]:
        """One answer per row; a row has ``post`` and ``question``, or a raw ``prompt``."""
        import pandas as pd

        params = None if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
        return list(self.pyfunc.predict(pd.DataFrame(list(rows), dtype=object), params=params))


def load_registered(
    tracking_uri: str, model_uri: str, *, backbone: str | None = None, device: str | None = None
) -> LoadedModel:
    """Load ``models:/NAME@alias`` or ``models:/NAME/VERSION`` without touching the process-wide tracking URI.

    Args:
        tracking_uri: where the registry is.
        model_uri: which model.
        backbone: folder or hub id of the backbone, when it moved since; its sha256 is still checked.
        device: 'auto', 'cpu' or 'cuda'.

    Raises:
        ConfigError: a malformed URI, or no such model, version or alias.
        BackboneError: the backbone is not found or is not the one the adapter was trained on.
        RegistryError: the files cannot be fetched.
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", model_uri)
    if match is None:
        raise ConfigError(
            f"--model must be models:/NAME@champion, another alias, or models:/NAME/3; got {model_uri!r}."
        )
    name, alias, version = match.groups()
    client = _client(tracking_uri, name, must_exist=True)
    with _registry_errors(f"load {model_uri}"):
        if alias is not None:
            aliases = _aliases(client, name)
            if alias not in aliases:
                raise ConfigError(
                    f"{name!r} has no alias {alias!r}; it has: {', '.join(sorted(aliases)) or 'none'}. "
                    "A model gets 'champion' when it passes its gate."
                )
            version = aliases[alias]
        _get_version(client, name, version)
        from mlflow import artifacts, pyfunc

        settings = {"backbone": backbone, "device": device}
        overrides = {key: value for key, value in settings.items() if value is not None}
        with tempfile.TemporaryDirectory() as folder:
            # Not 'models:/...' here: MLflow would look that up in the process-wide registry.
            local = artifacts.download_artifacts(
                artifact_uri=client.get_model_version_download_uri(name, version),
                dst_path=folder,
                tracking_uri=tracking_uri,
            )
            model = pyfunc.load_model(local, suppress_warnings=True, model_config=overrides or None)
    return LoadedModel(name=name, version=version, pyfunc=model)


def model_signature(max_new_tokens: int) -> "ModelSignature":
    """What a registered model takes and gives."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, name, required=False) for name in ("post", "question", "prompt")]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema([ParamSpec("max_new_tokens", DataType.long, max_new_tokens)]),
    )


def _logged_model(
    client: "MlflowClient", registration: Registration, adapter_folder: Path, adapter_sha256: str
) -> "LoggedModel":
    """Upload the model's files once; a half-written one from a crash is marked FAILED and replaced."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    experiment_id = client.get_run(registration.mlflow_run_id).info.experiment_id
    tags = _identity_tags(registration, adapter_sha256)
    query = " and ".join(f"tags.`{key}` = {quoted(tags[key])}" for key in (RUN_ID_TAG, ADAPTER_TAG))
    for found in client.search_logged_models([experiment_id], query):
        if found.status == LoggedModelStatus.READY:
            return found
        client.finalize_logged_model(found.model_id, LoggedModelStatus.FAILED)
    created = client.create_logged_model(
        experiment_id,
        name="adapter",
        source_run_id=registration.mlflow_run_id,
        tags=tags,
        params=registration.backbone.model_dump(mode="json", exclude_none=True, exclude={"format_version"}),
    )
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "model"
        _save_model(local, created, registration, adapter_folder)
        client.log_model_artifacts(created.model_id, str(local))
    client.log_outputs(registration.mlflow_run_id, [LoggedModelOutput(created.model_id, step=0)])
    return client.finalize_logged_model(created.model_id, LoggedModelStatus.READY)


def _save_model(path: Path, logged: "LoggedModel", registration: Registration, adapter_folder: Path) -> None:
    """Write the model folder with nothing but the adapter, the manifests and the code."""
    from mlflow import pyfunc
    from mlflow.models import Model

    reference = registration.backbone
    with tempfile.TemporaryDirectory() as folder, _save_lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*An input example was not provided")
        adapter = Path(folder) / "adapter"
        adapter.mkdir()
        for source in _adapter_files(adapter_folder):
            shutil.copyfile(source, adapter / source.name)
        manifest = Path(folder) / "backbone.json"
        manifest.write_text(reference.model_dump_json(indent=2), encoding="utf-8")
        pyfunc.save_model(
            path=str(path),
            python_model=str(Path(__file__).with_name("serve_model.py")),
            artifacts={"adapter": str(adapter), "backbone": str(manifest)},
            pip_requirements=list(PIP_REQUIREMENTS),
            signature=model_signature(reference.max_new_tokens),
            model_config={"backbone": reference.name, "device": "auto"},
            mlflow_model=Model(
                artifact_path=logged.artifact_location,
                model_uuid=logged.model_id,
                model_id=logged.model_id,
                run_id=registration.mlflow_run_id,
                metadata={
                    "study_run_id": registration.study_run_id,
                    "config_sha256": registration.config_sha256,
                    "private": registration.private,
                },
            ),
        )
        for cache in path.rglob("__pycache__"):
            shutil.rmtree(cache)
        saved = Model.load(str(path))
        flavor = saved.flavors[pyfunc.FLAVOR_NAME]
        for artifact in flavor["artifacts"].values():
            artifact["uri"] = artifact["path"]  # MLflow notes where the files came from: a folder gone by now
        flavor["model_code_path"] = "serve_model.py"  # the same; loading reads only the file's name
        flavor.pop("cloudpickle_version", None)  # nothing is pickled
        saved.save(str(path / "MLmodel"))


def _adapter_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"adapter folder not found: {folder}.")
    files = sorted(folder.iterdir())
    strange = [path.name for path in files if not path.is_file() or path.suffix not in ADAPTER_SUFFIXES]
    if strange:
        raise ConfigError(
            f"adapter folder {folder} holds {strange}; only {' and '.join(ADAPTER_SUFFIXES)} files are registered."
        )
    if not any(path.suffix == ".safetensors" for path in files):
        raise ConfigError(f"adapter folder {folder} holds no .safetensors file.")
    return files


def _adapter_digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in _adapter_files(folder):
        with path.open("rb") as handle:
            digests[path.name] = hashlib.file_digest(handle, "sha256").hexdigest()
    return digests


def _identity_tags(registration: Registration, adapter_sha256: str) -> dict[str, str]:
    tags = {
        RUN_ID_TAG: registration.study_run_id,
        ADAPTER_TAG: adapter_sha256,
        CONFIG_TAG: registration.config_sha256,
        PRIVATE_TAG: "true" if registration.private else "false",
        "fedmentor.backbone": registration.backbone.name,
        "fedmentor.backbone_sha256": registration.backbone.sha256,
    }
    for one in registration.privacy:
        values = one.model_dump(exclude={"domain"}, exclude_none=True)
        tags |= {f"fedmentor.{name}.{one.domain}": repr(value) for name, value in values.items()}
    return tags


def _client(tracking_uri: str, name: str, *, must_exist: bool = False) -> "MlflowClient":
    if not re.fullmatch(r"[^/:'\"%@\s][^/:'\"%@]*", name):
        raise ConfigError(f"a registered model's name must not hold any of / : ' \" % @, got {name!r}.")
    return mlflow_client(tracking_uri, must_exist=must_exist)


def _ensure_registered_model(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description="FedMentor adapters: LoRA on a frozen backbone.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _find_version(client: "MlflowClient", registration: Registration, adapter_sha256: str) -> "ModelVersion | None":
    query = (
        f"name = {quoted(registration.name)} and tags.`{RUN_ID_TAG}` = {quoted(registration.study_run_id)} "
        f"and tags.`{ADAPTER_TAG}` = {quoted(adapter_sha256)}"
    )
    found = client.search_model_versions(query)
    return min(found, key=lambda one: int(one.version)) if found else None


def _get_version(client: "MlflowClient", name: str, version: str) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    known = sorted((str(one.version) for one in client.search_model_versions(f"name = {quoted(name)}")), key=int)
    if version not in known:
        raise ConfigError(f"{name!r} has no version {version!r}; it has: {', '.join(known) or 'none'}.")
    try:
        return client.get_model_version(name, version)
    except MlflowException as error:
        raise ConfigError(f"{name!r} version {version} cannot be read: {error}.") from None


def _aliases(client: "MlflowClient", name: str) -> dict[str, str]:
    from mlflow.exceptions import MlflowException

    try:
        return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = ", ".join(sorted(one.name for one in client.search_registered_models())) or "none"
        raise ConfigError(f"no registered model {name!r}; the registry has: {known}.") from None


def _verify_champion(client: "MlflowClient", name: str, version: str) -> None:
    shown = _aliases(client, name).get(CHAMPION)
    if shown != version:
        raise RegistryError(
            f"the champion of {name!r} should be version {version} but the registry shows {shown}: "
            "another process moved the alias at the same time. Check both, then promote the right one."
        )


def _tag(client: "MlflowClient", name: str, version: str, tags: Mapping[str, str]) -> None:
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value[:5000])


def _summary(client: "MlflowClient", name: str, version: str) -> ModelSummary:
    aliases = tuple(sorted(alias for alias, at in _aliases(client, name).items() if at == version))
    return ModelSummary(name=name, version=version, aliases=aliases)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def _registry_errors(action: str) -> Iterator[None]:
    """Turn MLflow's and the network's errors into ones that say what was being done."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RegistryError(
            f"MLflow could not {action}: {lines[0][:300].rstrip('.')}. "
            "Run the same command again: it finishes what was begun."
        ) from error
