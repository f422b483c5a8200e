"""What decides a cell's result: what all cells must share, what makes one cell, and how two of either differ."""

from typing import Any

from fedmentor_core import __version__
from fedmentor_core.compare.arms import find_arm
from fedmentor_core.compare.records import Cell, Identity
from fedmentor_core.config import StudyConfig
from fedmentor_core.data.loading import DomainData
from fedmentor_core.data.sources import answer_form_of
from fedmentor_core.errors import ConfigError
from fedmentor_core.hashing import canonical_sha256
from fedmentor_core.records import Metrics
from fedmentor_core.workspace import Workspace

_SCORER_PLACES = {"model", "folder", "sha256", "device", "batch_size", "trusted_sha256"}
"""Where a scorer is and how it is fed; which one it is, with the digest of its weights, says ``ScorerIdentities``."""


def identity_of(workspace: Workspace) -> Identity:
    """Load backbone, data and scorers, and say what they are. Writes nothing."""
    config = workspace.config
    return Identity(
        backbone_sha256=workspace.backbone.sha256,
        scorers=workspace.scorers.identities,
        splits={name: splits_sha256(data) for name, data in workspace.data.items()},
        evaluation_sha256=canonical_sha256(
            {
                "evaluation": _evaluation(config),
                "rows": config.data.split_seed,
                "max_length": config.backbone.max_length,
                "answers": {one.name: repr(answer_form_of(one.source)) for one in config.domains},
            }
        ),
        schedule={
            "rounds": config.rounds,
            "steps_per_round": config.training.steps_per_round,
            "batch_size": config.training.batch_size,
        },
    )


def splits_sha256(data: DomainData) -> str:
    """Digest of a domain's rows in each split: texts, labels, order, and which rows are one unit's.

    Units go by the order in which they first appear, not by their keyed digests, so that two machines with different
    keys agree on the same data.
    """
    splits = {}
    for name, table in data.splits().items():
        numbers: dict[str, int] = {}
        units = [numbers.setdefault(unit, len(numbers)) for unit in table["unit_id"][:]]
        columns = [table[column][:] for column in ("post", "question", "response", "label", "gold")]
        splits[name] = [list(row) for row in zip(units, *columns, strict=True)]
    return canonical_sha256(splits)


def key_parts(cell: Cell, config: StudyConfig, identity: Identity) -> dict[str, Any]:
    """All that decides the result of a cell, by name; its digest is the cell's key.

    No path, place or study name is in it. The version of FedMentor and the list of its metrics stand for the code.

    Args:
        cell: which one.
        config: its own study, as ``cell_config`` made it.
        identity: what all cells share.
    """
    return {
        "arm": cell.arm,
        "procedure": find_arm(cell.arm).procedure,
        "seed": cell.seed,
        "epsilon": cell.epsilon,
        "identity": identity.model_dump(mode="json"),
        "rounds": config.rounds,
        "backbone": config.backbone.model_dump(mode="json", include={"dtype", "max_length"}),
        "adapter": config.adapter.model_dump(mode="json", exclude={"start_from"}),
        "data": config.data.model_dump(mode="json", exclude={"root", "digest_key_variable"}),
        "ranks": {one.name: one.rank for one in config.domains},
        "training": config.training.model_dump(mode="json", exclude={"deadline_seconds"}),
        "privacy": _privacy(config),
        "aggregation": config.aggregation.model_dump(mode="json"),
        "wire": config.wire.model_dump(mode="json"),
        "evaluation": _evaluation(config),
        "code": {"fedmentor": __version__, "metrics": sorted(Metrics.model_fields)},
    }


def _privacy(config: StudyConfig) -> dict[str, Any]:
    """Budgets, mechanism and adaptation; without privacy none of them decides anything."""
    if config.privacy.mode == "none":
        return {"mode": "none"}
    section = config.privacy.model_dump(
        mode="json", exclude={"ledger_url", "epsilon_by_sensitivity", "max_composed_epsilon"}
    )
    promises = {
        one.name: {
            "epsilon": config.epsilon_of(one),
            "delta": one.delta,
            "clip_norm": config.clip_norm_of(one),
            "min_noise_multiplier": one.min_noise_multiplier,
        }
        for one in config.domains
    }
    return {**section, "domains": promises, "adaptation": config.adaptation.model_dump(mode="json")}


def _evaluation(config: StudyConfig) -> dict[str, Any]:
    section = config.evaluation.model_dump(mode="json", exclude={"thresholds", "private"})
    for name in ("bertscore", "toxicity", "safety_prompts"):
        if section.get(name) is not None:
            section[name] = {key: value for key, value in section[name].items() if key not in _SCORER_PLACES}
    return section


def differences(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    """Every part in which two settings differ, as 'name: one / other'."""
    found = []
    for name in sorted({*one, *other}):
        mine, theirs = one.get(name), other.get(name)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            found += differences(mine, theirs, f"{prefix}{name}.")
        elif mine != theirs:
            found.append(f"{prefix}{name}: {_short(mine)} / {_short(theirs)}")
    return found


def refuse_other_identity(identity: Identity, other: Identity, where: str) -> None:
    """Refuse to compare numbers that do not mean the same.

    Args:
        identity: what is compared with.
        other: what was found.
        where: it was found.

    Raises:
        ConfigError: naming each difference.
    """
    found = differences(identity.model_dump(mode="json"), other.model_dump(mode="json"))
    if found:
        raise ConfigError(
            f"{where} cannot be compared with this: backbone, splits, scorers, evaluation and schedule must be the "
            "same (this / other):\n" + "\n".join(f"  {line}" for line in found)
        )


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return f"{text[:16]}..." if len(text) == 64 and text.isalnum() else text
