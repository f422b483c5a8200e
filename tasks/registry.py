"""The MLflow model registry: a candidate becomes challenger, is judged, and becomes champion or does not.

Order, each step recorded before the next: files -> version with lineage and gate=pending -> alias ``challenger`` ->
gate=passed or failed with reasons -> the audit's verdict, where one is asked for -> all evidence checked
(``evidence.py``) -> tag ``previous_champion`` -> alias ``champion`` -> read back -> tag ``promoted_at``. The registry
has no compare-and-swap on aliases, so the way back is written before the alias moves. A consumer of the alias never
meets a half-written model, because an alias only ever moves between versions whose files are complete.

Unlike tracking, a failure here is an error: a study must not believe it promoted what it did not. Every
function can be called again after a crash and finishes what was begun.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fedmentor_core.audit.mechanism import Mechanism
from fedmentor_core.audit.verdict import FinishedAudit
from fedmentor_core.errors import ConfigError, GateError
from fedmentor_core.hashing import canonical_sha256
from fedmentor_core.records import GateSummary, ModelSummary
from tasks.evidence import obstacle
from tasks.registered_files import adapter_digests, logged_model
from tasks.registration_records import (
    ADAPTER_TAG,
    AUDIT_TAG,
    GATE_ADAPTER_TAG,
    GATE_TAG,
    MECHANISM_SHA256_TAG,
    MECHANISM_TAG,
    PROMISE_TAG,
    REASONS_TAG,
    Registration,
    audit_tags,
    description_of,
    identity_tags,
    lineage_tags,
    promise_tags,
)
from tasks.registry_client import (
    CHAMPION,
    aliases_of,
    ensure_registered_model,
    get_version,
    open_registry,
    registry_errors,
    set_tags,
    summary_of,
    verify_champion,
)
from tasks.tracking import RUN_ID_TAG, quoted

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER = "challenger"
PREVIOUS_TAG = "previous_champion"
PROMOTED_TAG = "fedmentor.promoted_at"
HELD_TAG = "fedmentor.held"
NO_CHAMPION = "none"


def register_and_decide(
    tracking_uri: str,
    registration: Registration,
    adapter_folder: Path,
    gate: GateSummary,
    *,
    audit: FinishedAudit | None = None,
    allow_not_private: bool = False,
) -> ModelSummary:
    """``register_challenger``, then ``decide``; ``gate`` must be the verdict on this very adapter."""
    challenger = register_challenger(tracking_uri, registration, adapter_folder)
    return decide(
        tracking_uri,
        challenger.name,
        challenger.version,
        gate,
        judged_sha256=canonical_sha256(adapter_digests(Path(adapter_folder))),
        audit=audit,
        allow_not_private=allow_not_private,
    )


def register_challenger(tracking_uri: str, registration: Registration, adapter_folder: Path) -> ModelSummary:
    """Register an adapter folder as a new version with gate=pending and the alias ``challenger``.

    Guarantees:
        The same adapter of the same study run is registered once, however often this is called.

    Raises:
        ConfigError: the folder is no adapter, or the name is not allowed.
        RegistryError: MLflow refused.
    """
    adapter_sha256 = canonical_sha256(adapter_digests(Path(adapter_folder)))
    client = open_registry(tracking_uri, registration.name)
    with registry_errors(f"register a version of {registration.name!r}"):
        version = _find_version(client, registration, adapter_sha256)
        if version is None:
            ensure_registered_model(client, registration.name)
            logged = logged_model(client, registration, Path(adapter_folder), adapter_sha256)
            # Not the source 'models:/<id>': a sqlite registry resolves that by the process-wide tracking URI.
            version = client.create_model_version(
                registration.name,
                source=logged.artifact_location,
                run_id=registration.mlflow_run_id,
                model_id=logged.model_id,
                description=description_of(registration),
                tags=identity_tags(registration, adapter_sha256)
                | promise_tags(registration)
                | lineage_tags(registration.lineage)
                | {GATE_TAG: "pending"},
            )
        if version.tags.get(GATE_TAG) == "pending":
            client.set_registered_model_alias(registration.name, CHALLENGER, version.version)
        return summary_of(client, registration.name, str(version.version))


def decide(
    tracking_uri: str,
    name: str,
    version: str,
    gate: GateSummary,
    *,
    judged_sha256: str,
    audit: FinishedAudit | None = None,
    allow_not_private: bool = False,
) -> ModelSummary:
    """Record the verdicts of gate and audit on a version and, if nothing speaks against it, make it champion.

    A version that was champion before is never moved back by this automatic path, so that resuming an old
    study undoes neither a rollback nor a newer champion. A study that is not private stays challenger, and so does one
    that asks for an audit and has none that passed; the tag ``fedmentor.held`` says why.

    Args:
        tracking_uri: where the registry is.
        name: registered model.
        version: its version.
        gate: the final verdict.
        judged_sha256: digest of the adapter's registered files that it judged.
        audit: of the same mechanism, where there is one.
        allow_not_private: let a model without a privacy guarantee become champion (research only).

    Raises:
        GateError: the audit is of another mechanism.
        RegistryError: MLflow refused, or reading back shows another champion.
    """
    client = open_registry(tracking_uri, name)
    with registry_errors(f"record the verdict on {name!r} version {version}"):
        tags = {
            REASONS_TAG: "; ".join(gate.reasons) or "every threshold passed",
            GATE_ADAPTER_TAG: judged_sha256,
            GATE_TAG: "passed" if gate.passed else "failed",
        }
        set_tags(client, name, version, tags)
        found = client.get_model_version(name, version)
        if not gate.passed or PROMOTED_TAG in found.tags:
            return summary_of(client, name, version)
        tags = _with_audit(client, name, found, audit)
        held = obstacle(client, tracking_uri, name, version, tags, allow_not_private)
        if held:
            set_tags(client, name, version, {HELD_TAG: held})
            return summary_of(client, name, version)
        return _make_champion(client, name, version, tags, "passed its gate")


def promote(
    tracking_uri: str,
    name: str,
    version: str,
    *,
    reason: str,
    audit: FinishedAudit | None = None,
    allow_not_private: bool = False,
) -> ModelSummary:
    """Move the alias ``champion`` to a version that passed its gate.

    Args:
        tracking_uri: where the registry is.
        name: registered model.
        version: its version.
        reason: recorded with the version.
        audit: its verdict is recorded with the version, and must be a pass on the version's own mechanism.
        allow_not_private: accept a version without a privacy guarantee.

    Raises:
        ConfigError: no such model or version.
        GateError: the version did not pass its gate, or is not private, or its audit failed, is missing where its
            study asks for one, or is of another mechanism; or its gate, files or ledger are not what was registered
            (``evidence.py``).
        RegistryError: MLflow refused, or reading back shows another champion.
    """
    client = open_registry(tracking_uri, name, must_exist=True)
    with registry_errors(f"promote {name!r} version {version}"):
        found = get_version(client, name, version)
        tags = _with_audit(client, name, found, audit)
        found_obstacle = obstacle(client, tracking_uri, name, version, tags, allow_not_private)
        if found_obstacle:
            raise GateError(
                f"{name!r} version {version} cannot be promoted: {found_obstacle}. The champion is unchanged."
            )
        return _make_champion(client, name, version, tags, reason)


def _make_champion(client: "MlflowClient", name: str, version: str, tags: dict[str, str], reason: str) -> ModelSummary:
    """Move the alias, with the way back written first; finishes what an earlier call began."""
    current = aliases_of(client, name).get(CHAMPION)
    if current != version:
        set_tags(client, name, version, {PREVIOUS_TAG: current or NO_CHAMPION})
        client.set_registered_model_alias(name, CHAMPION, version)
        verify_champion(client, name, version)
    elif PREVIOUS_TAG not in tags:
        set_tags(client, name, version, {PREVIOUS_TAG: NO_CHAMPION})
    if HELD_TAG in tags:
        client.delete_model_version_tag(name, version, HELD_TAG)
    if current != version or PROMOTED_TAG not in tags:
        set_tags(client, name, version, {"fedmentor.promoted_reason": reason, PROMOTED_TAG: _now()})
    return summary_of(client, name, version)


def rollback(tracking_uri: str, name: str, *, reason: str) -> ModelSummary:
    """Move ``champion`` back to the version that it replaced, and say so on both versions.

    Raises:
        ConfigError: there is no champion, or none before it.
        RegistryError: MLflow refused, or reading back shows another champion.
    """
    client = open_registry(tracking_uri, name, must_exist=True)
    with registry_errors(f"roll back {name!r}"):
        current = aliases_of(client, name).get(CHAMPION)
        if current is None:
            raise ConfigError(f"{name!r} has no champion, so there is nothing to roll back.")
        previous = get_version(client, name, current).tags.get(PREVIOUS_TAG, NO_CHAMPION)
        if previous == NO_CHAMPION:
            raise ConfigError(
                f"{name!r} version {current} is the first champion: there is no earlier one to go back to."
            )
        get_version(client, name, previous)
        set_tags(
            client,
            name,
            current,
            {"fedmentor.rolled_back_reason": reason, "fedmentor.rolled_back_at": _now()},
        )
        client.set_registered_model_alias(name, CHAMPION, previous)
        verify_champion(client, name, previous)
        set_tags(client, name, previous, {"fedmentor.restored_from": current})
        return summary_of(client, name, previous)


def champion(tracking_uri: str, name: str) -> ModelSummary | None:
    """The current champion; None when there is none yet.

    Raises:
        ConfigError: no such registered model.
    """
    client = open_registry(tracking_uri, name, must_exist=True)
    with registry_errors(f"read {name!r}"):
        current = aliases_of(client, name).get(CHAMPION)
        return None if current is None else summary_of(client, name, current)


def _with_audit(
    client: "MlflowClient", name: str, found: "ModelVersion", audit: FinishedAudit | None
) -> dict[str, str]:
    """The version's tags, with the audit's verdict recorded when one is given.

    A pass may follow a failure, since one audit in twenty may fail by chance; the failure stays recorded.

    Raises:
        GateError: the audit says nothing about this version; nothing is recorded.
    """
    tags = dict(found.tags)
    if audit is None:
        return tags
    parts = tags.get(MECHANISM_TAG)
    foreign = audit.foreign_to(
        tags.get(MECHANISM_SHA256_TAG, ""),
        Mechanism.model_validate_json(parts) if parts else None,
        frozenset(tag.removeprefix(f"{PROMISE_TAG}.") for tag in tags if tag.startswith(f"{PROMISE_TAG}.")),
    )
    if foreign:
        raise GateError(
            f"the audit given does not speak for {name!r} version {found.version}: {foreign}. The champion is "
            "unchanged. Audit the configuration that the version was trained with."
        )
    verdict = audit_tags(audit)
    if tags.get(AUDIT_TAG) == "failed" and tags[f"{AUDIT_TAG}_sha256"] != audit.sha256:
        verdict = {f"{AUDIT_TAG}_failed_before": tags[f"{AUDIT_TAG}_sha256"], **verdict}
    set_tags(client, name, str(found.version), verdict)
    return tags | verdict


def _find_version(client: "MlflowClient", registration: Registration, adapter_sha256: str) -> "ModelVersion | None":
    query = (
        f"name = {quoted(registration.name)} and tags.`{RUN_ID_TAG}` = {quoted(registration.study_run_id)} "
        f"and tags.`{ADAPTER_TAG}` = {quoted(adapter_sha256)}"
    )
    found = client.search_model_versions(query)
    return min(found, key=lambda one: int(one.version)) if found else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
