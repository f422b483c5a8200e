"""The files of a registered model: written once without a pickle, and loaded again to answer.

An adapter (safetensors and JSON), ``backbone.json`` that names the frozen backbone and its sha256, and
``serve_model.py``: models-from-code, so no backbone weight is copied.
"""

import hashlib
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmentor_core import __version__
from fedmentor_core.errors import ConfigError, IntegrityError
from fedmentor_core.hashing import canonical_sha256
from tasks.registration_records import ADAPTER_TAG, Registration, identity_tags
from tasks.registry_client import aliases_of, get_version, open_registry, registry_errors
from tasks.tracking import RUN_ID_TAG, quoted

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.models import ModelSignature

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
    client = open_registry(tracking_uri, name, must_exist=True)
    with registry_errors(f"load {model_uri}"):
        if alias is not None:
            aliases = aliases_of(client, name)
            if alias not in aliases:
                raise ConfigError(
                    f"{name!r} has no alias {alias!r}; it has: {', '.join(sorted(aliases)) or 'none'}. "
                    "A model gets 'champion' when it passes its gate."
                )
            version = aliases[alias]
        get_version(client, name, version)
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


def fetch_adapter(client: "MlflowClient", tracking_uri: str, name: str, version: str, folder: Path) -> Path:
    """Download a version's adapter into ``folder``.

    Returns:
        The adapter's folder, whose files have the digest that the version was registered with.

    Raises:
        IntegrityError: they do not.
    """
    from mlflow import artifacts

    local = artifacts.download_artifacts(
        artifact_uri=f"{client.get_model_version_download_uri(name, version)}/artifacts/adapter",
        dst_path=str(folder),
        tracking_uri=tracking_uri,
    )
    registered = client.get_model_version(name, version).tags.get(ADAPTER_TAG, "")
    found = canonical_sha256(adapter_digests(Path(local)))
    if found != registered:
        raise IntegrityError(
            f"the files of {name!r} version {version} were changed since it was registered (sha256 {found[:12]}, "
            f"registered {registered[:12] or 'none'}). Restore them, or register the adapter anew by running its study."
        )
    return Path(local)


def model_signature(max_new_tokens: int) -> "ModelSignature":
    """What a registered model takes and gives."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, name, required=False) for name in ("post", "question", "prompt")]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema([ParamSpec("max_new_tokens", DataType.long, max_new_tokens)]),
    )


def logged_model(
    client: "MlflowClient", registration: Registration, adapter_folder: Path, adapter_sha256: str
) -> "LoggedModel":
    """Upload the model's files once; a half-written one from a crash is marked FAILED and replaced."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    experiment_id = client.get_run(registration.mlflow_run_id).info.experiment_id
    tags = identity_tags(registration, adapter_sha256)
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


def adapter_digests(folder: Path) -> dict[str, str]:
    """sha256 of each file of an adapter folder.

    Raises:
        ConfigError: no folder, no adapter in it, or other files beside it.
    """
    digests = {}
    for path in _adapter_files(folder):
        with path.open("rb") as handle:
            digests[path.name] = hashlib.file_digest(handle, "sha256").hexdigest()
    return digests
