"""The champion that a study starts from or compares with: fixed once, so that a resumed study does not change its mind.

What is in production may move while a study runs. Which version it was, and its tensors, are therefore written to the
run's store before the first round (``champion.json``, create-if-absent), and every later look finds that one.

An adapter that was released under privacy stays private whatever is done with it (post-processing), so that training
from the champion, or evaluating it, costs no domain anything beyond what the study itself charges.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from fedmentor_core.adapters.lora import read_adapter_folder
from fedmentor_core.config import AdapterConfig
from fedmentor_core.errors import AlreadyExistsError
from fedmentor_core.records import ArtifactRef, Record

if TYPE_CHECKING:
    from fedmentor_core.workspace import Workspace


class Champion(Record):
    """A registered version as it was when a study started."""

    name: str
    version: str
    adapter_sha256: str
    """Digest of its registered files."""
    backbone_sha256: str
    config: AdapterConfig
    adapter: ArtifactRef
    """All of its tensors, frozen and trained, in the run's store."""


class ChampionAtStart(Record):
    """``champion.json``: the champion, or that there was none."""

    champion: Champion | None


def fixed_champion(workspace: "Workspace") -> ChampionAtStart | None:
    """What was fixed when the study started; None before that."""
    key = _key(workspace)
    return ChampionAtStart.model_validate(workspace.store.get_json(key)) if workspace.store.exists(key) else None


def fix_no_champion(workspace: "Workspace") -> ChampionAtStart:
    """Write down that there was no champion when the study started, unless something is fixed already."""
    return _fix(workspace, None)


def fix_champion(
    workspace: "Workspace", folder: Path, *, name: str, version: str, adapter_sha256: str, backbone_sha256: str
) -> ChampionAtStart:
    """Write down which version was champion when the study started, unless something is fixed already.

    Args:
        workspace: the study's.
        folder: the version's adapter, verified against ``adapter_sha256``.
        name: registered model.
        version: its version.
        adapter_sha256: digest of its registered files.
        backbone_sha256: of the backbone it belongs to.

    Raises:
        IntegrityError: the folder holds no adapter.
    """
    config, state = read_adapter_folder(folder)
    made = Champion(
        name=name,
        version=version,
        adapter_sha256=adapter_sha256,
        backbone_sha256=backbone_sha256,
        config=config,
        adapter=workspace.put_adapter(state, exact=True),
    )
    return _fix(workspace, made)


def _fix(workspace: "Workspace", champion: Champion | None) -> ChampionAtStart:
    made = ChampionAtStart(champion=champion)
    try:
        workspace.store.put_json(_key(workspace), made)
    except AlreadyExistsError:  # another start of this study was faster: its choice stands
        return ChampionAtStart.model_validate(workspace.store.get_json(_key(workspace)))
    return made


def _key(workspace: "Workspace") -> str:
    return workspace.key("champion.json")
