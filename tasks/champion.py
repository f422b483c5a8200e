"""The champion as a study starts: looked up in the registry once, and fixed in the run's store; and its data."""

import tempfile
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from fedmentor_core.champion import Champion, ChampionAtStart, fix_champion, fix_no_champion, fixed_champion
from fedmentor_core.discretion import discreet
from fedmentor_core.records import Record
from fedmentor_core.study_ref import StudyRef
from fedmentor_core.workspace import Workspace, workspace_of
from tasks.registered_files import fetch_adapter
from tasks.registration_records import ADAPTER_TAG, BACKBONE_TAG, DATASET_TAG
from tasks.registry_client import CHAMPION, find_alias, get_version, open_registry, registry_errors


@task(name="champion", cache_policy=NO_CACHE, persist_result=False)
@discreet
def fix_the_champion(ref: StudyRef, tracking_uri: str) -> Champion | None:
    """The champion to start from and to compare with; None where the registry has none yet.

    Raises:
        IntegrityError: its files are not the ones that were registered.
        RegistryError: MLflow refused.
    """
    workspace = workspace_of(ref)
    found = fixed_champion(workspace) or _look_up(workspace, tracking_uri)
    return found.champion


def _look_up(workspace: Workspace, tracking_uri: str) -> ChampionAtStart:
    name = workspace.config.tracking.registered_model
    client = open_registry(tracking_uri, name)
    version = find_alias(client, name, CHAMPION)
    if version is None:
        return fix_no_champion(workspace)
    with registry_errors(f"read the champion of {name!r}"), tempfile.TemporaryDirectory() as folder:
        tags = get_version(client, name, version).tags
        adapter = fetch_adapter(client, tracking_uri, name, version, Path(folder))
        return fix_champion(
            workspace,
            adapter,
            name=name,
            version=version,
            adapter_sha256=tags[ADAPTER_TAG],
            backbone_sha256=tags[BACKBONE_TAG],
        )


class ChampionData(Record):
    """What the present champion was trained on."""

    version: str
    fingerprints: dict[str, str]
    """Of each domain's data."""


@task(name="champion's data", cache_policy=NO_CACHE, persist_result=False)
def champion_data(tracking_uri: str, name: str) -> ChampionData | None:
    """The data fingerprints that the champion was registered with; None where there is none yet.

    Raises:
        RegistryError: MLflow refused.
    """
    client = open_registry(tracking_uri, name)
    version = find_alias(client, name, CHAMPION)
    if version is None:
        return None
    with registry_errors(f"read the champion of {name!r}"):
        tags = get_version(client, name, version).tags
    prefix = f"{DATASET_TAG}."
    return ChampionData(
        version=version,
        fingerprints={key.removeprefix(prefix): value for key, value in tags.items() if key.startswith(prefix)},
    )
