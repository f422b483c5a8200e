"""The champion that a study starts from or compares with: fixed once, so that a resumed study does not change its mind.

What is in production may move while a study runs. Which version it was, and its tensors, are therefore written to the
run's store before the first round (``champion.json``, create-if-absent), and every later look finds that one.

An adapter that was released under privacy stays private whatever is done with it (post-processing), so that training
from the champion, or evaluating it, costs no domain anything beyond what the study itself charges.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from fedmentor_core.adapters.lora import State, read_adapter_folder
from fedmentor_core.config import AdapterConfig
from fedmentor_core.errors import AlreadyExistsError, ConfigError
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
        adapter=workspace.put_adapter(state),
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


def states_to_start_from(champion: Champion, config: AdapterConfig, own: State, champions: State) -> State:
    """The champion's tensors, once it is sure that they fit a study's adapter.

    Args:
        champion: to start from.
        config: the study's adapter section.
        own: the study's own tensors, frozen and trained, as they would start anew.
        champions: the champion's tensors.

    Raises:
        ConfigError: another scale, other modules or other shapes.
    """
    scale, wanted = champion.config.alpha / champion.config.rank, config.alpha / config.rank
    problems = []
    if set(own) != set(champions):
        problems.append(f"it adapts {len(champions)} tensors of {sorted(_modules(champions))}")
    elif any(own[name].shape != champions[name].shape for name in own):
        problems.append(f"its rank is {champion.config.rank}")
    if scale != wanted:
        problems.append(f"its scale alpha / rank is {scale:g}")
    if problems:
        raise ConfigError(
            f"start_from 'champion': {champion.name!r} version {champion.version} does not fit this study's adapter: "
            f"{'; '.join(problems)}; the study adapts {len(own)} tensors of {sorted(_modules(own))} with rank "
            f"{config.rank} and scale {wanted:g}. Set the adapter section back to the champion's, or start_from to "
            "'backbone'. Nothing was charged."
        )
    return champions


def _modules(state: State) -> set[str]:
    return {name.split(".")[-3] for name in state}
