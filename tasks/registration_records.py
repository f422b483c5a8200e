"""What is registered with an adapter: backbone, every domain's promise, mechanism and lineage; and their tags.

MLflow's limits shape the tags: a version's tag holds 100,000 characters, its description 5,000. So each domain's
promise is one JSON tag of its own, and a description that would not fit says how many domains it leaves out.
"""

import json
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from fedmentor_core.audit.mechanism import Mechanism
from fedmentor_core.audit.verdict import FinishedAudit
from fedmentor_core.hashing import canonical_sha256
from fedmentor_core.lineage import Lineage
from fedmentor_core.records import DomainPlan, Record, StudySummary
from tasks.tracking import RUN_ID_TAG

PRIVATE_TAG = "fedmentor.private"
ADAPTER_TAG = "fedmentor.adapter_sha256"
BACKBONE_TAG = "fedmentor.backbone_sha256"
CONFIG_TAG = "fedmentor.config_sha256"
GATE_TAG = "gate"
REASONS_TAG = "gate_reasons"
GATE_ADAPTER_TAG = "fedmentor.gate_adapter_sha256"
"""Digest of the registered files that the gate's verdict speaks of."""
RIVAL_TAG = "fedmentor.gate_champion"
"""Version that was champion when the gate compared with it; 'none' where there was none; absent: it did not compare."""
DATASET_TAG = "fedmentor.dataset_fingerprint"
LEDGER_TAG = "fedmentor.ledger"
HEAD_TAG = "fedmentor.ledger_head"
PROMISE_TAG = "fedmentor.promise"
MECHANISM_TAG = "fedmentor.mechanism"
MECHANISM_SHA256_TAG = "fedmentor.mechanism_sha256"
AUDIT_TAG = "fedmentor.audit"
"""'required' until there is a verdict, then 'passed' or 'failed'; absent when nobody asked for an audit."""
MOST_TAG_CHARACTERS, MOST_DESCRIPTION_CHARACTERS = 100_000, 5_000
_SEARCHABLE = ("epsilon_spent", "epsilon_budget", "delta")


class BackboneReference(Record):
    """``backbone.json``: which frozen backbone an adapter belongs to; never its weights."""

    format_version: Literal[1] = 1
    name: str = Field(description="'embedded', a folder, or a hub id, as in the study's configuration.")
    revision: str | None = None
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Digest of the weights; checked when loading.")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_length: int = Field(ge=32)
    max_new_tokens: int = Field(default=48, ge=1, description="Default length of an answer.")


class DomainPromise(Record):
    """What one domain was promised and what its data cost, lifetime, when the model was registered.

    Every value is in ``summary.json`` too: public numbers, and the fingerprint, a digest of keyed digests.
    """

    domain: str
    epsilon_spent: float | None
    epsilon_budget: float | None
    delta: float | None
    sensitivity: str | None = Field(description="From which the budget was derived; None: given outright.")
    privacy_level: Literal["unit", "client"]
    privacy_unit: str
    clip_norm: float
    noise_multiplier_first: float | None = Field(description="Of the first round it trained in; None: it never did.")
    noise_multiplier_last: float | None
    dataset_fingerprint: str

    @classmethod
    def of(cls, summary: StudySummary) -> "tuple[DomainPromise, ...]":
        """Of every domain, after the last round: epsilon spent includes rounds later than the selected one."""
        return tuple(cls._of_domain(summary, plan) for plan in summary.plan.domains)

    @classmethod
    def _of_domain(cls, summary: StudySummary, plan: DomainPlan) -> "DomainPromise":
        rounds = [client for one in summary.rounds for client in one.clients if client.domain == plan.domain]
        noise = [client.noise_multiplier for client in rounds if client.status == "trained"]
        return cls(
            domain=plan.domain,
            epsilon_spent=rounds[-1].epsilon_spent,
            epsilon_budget=plan.epsilon_budget,
            delta=plan.delta,
            sensitivity=plan.sensitivity,
            privacy_level=plan.privacy_level,
            privacy_unit=plan.privacy_unit,
            clip_norm=plan.clip_norm,
            noise_multiplier_first=noise[0] if noise else None,
            noise_multiplier_last=noise[-1] if noise else None,
            dataset_fingerprint=plan.dataset_fingerprint,
        )


class Registration(Record):
    """What is registered, apart from the adapter's files."""

    name: str = Field(min_length=1, description="Registered model.")
    study_run_id: str
    mlflow_run_id: str = Field(min_length=1, description="The study's parent run.")
    config_sha256: str
    private: bool
    promises: tuple[DomainPromise, ...]
    backbone: BackboneReference
    mechanism: Mechanism
    lineage: Lineage
    audit_required: bool = Field(default=False, description="The study's audit.before_promotion.")
    rival: str | None = Field(
        default=None, description="Champion's version that the gate compared with, or 'none'; None: it did not compare."
    )


def identity_tags(registration: Registration, adapter_sha256: str) -> dict[str, str]:
    """Tags that say where an adapter comes from."""
    rival = {} if registration.rival is None else {RIVAL_TAG: registration.rival}
    return rival | {
        RUN_ID_TAG: registration.study_run_id,
        ADAPTER_TAG: adapter_sha256,
        CONFIG_TAG: registration.config_sha256,
        PRIVATE_TAG: "true" if registration.private else "false",
        "fedmentor.backbone": registration.backbone.name,
        BACKBONE_TAG: registration.backbone.sha256,
    }


def promise_tags(registration: Registration) -> dict[str, str]:
    """Tags with every promise as JSON, its three main numbers to search by, and the mechanism.

    The mechanism's digest decides on an audit; its parts only name a difference, so where they are too long for a
    tag (hundreds of domains) they are left out.
    """
    mechanism = registration.mechanism.model_dump_json()
    tags = {MECHANISM_SHA256_TAG: registration.mechanism.sha256}
    if len(mechanism) <= MOST_TAG_CHARACTERS:
        tags[MECHANISM_TAG] = mechanism
    if registration.audit_required:
        tags[AUDIT_TAG] = "required"
    for one in registration.promises:
        tags[f"{PROMISE_TAG}.{one.domain}"] = one.model_dump_json()
        tags[f"{DATASET_TAG}.{one.domain}"] = one.dataset_fingerprint
        values = one.model_dump(include=set(_SEARCHABLE), exclude_none=True)
        tags |= {f"fedmentor.{name}.{one.domain}": repr(value) for name, value in values.items()}
    return tags


def lineage_tags(lineage: Lineage) -> dict[str, str]:
    """Tags that lead back to the study: code, rounds, accounts, scorers. The list of rounds is left out if too long."""
    tags = {
        "fedmentor.git_revision": lineage.git_revision,
        "fedmentor.trained_adapter_sha256": lineage.adapter.sha256,
        "fedmentor.manifests_sha256": canonical_sha256(lineage.manifests),
        "fedmentor.gate_manifest_sha256": lineage.gate_manifest or "none",
        "fedmentor.scorers": lineage.scorers.model_dump_json(),
        "fedmentor.started_from": lineage.started_from or "backbone",
        LEDGER_TAG: lineage.ledger.model_dump_json(exclude_defaults=True),
    }
    manifests = json.dumps(lineage.manifests)
    if len(manifests) <= MOST_TAG_CHARACTERS:
        tags["fedmentor.manifests"] = manifests
    return tags | {f"{HEAD_TAG}.{head.account}": head.model_dump_json() for head in lineage.heads}


def audit_tags(audit: FinishedAudit) -> dict[str, str]:
    """An audit's verdict."""
    report = audit.report
    return {
        f"{AUDIT_TAG}_sha256": audit.sha256,
        f"{AUDIT_TAG}_mechanism_sha256": report.mechanism_sha256,
        f"{AUDIT_TAG}_data": report.data,
        f"{AUDIT_TAG}_epsilon_lower_bound": repr(report.epsilon_lower_bound),
        f"{AUDIT_TAG}_epsilon_claimed": repr(report.epsilon_claimed),
        f"{AUDIT_TAG}_confidence": repr(report.confidence),
        f"{AUDIT_TAG}_auc": repr(report.mia_auc),
        f"{AUDIT_TAG}_reasons": "; ".join(report.reasons) or "every check passed",
        AUDIT_TAG: "passed" if report.passed else "failed",
    }


def description_of(registration: Registration) -> str:
    """The version's page in the registry: a table of promises (markdown)."""
    head = [
        f"LoRA adapter of study run `{registration.study_run_id}` on a frozen backbone.",
        "",
        "What each domain was promised, and what of it is spent over all runs so far."
        if registration.private
        else "**NOT PRIVATE**: nothing was promised that the noise of this study keeps.",
        "",
        "| domain | epsilon spent | epsilon budget | delta | protects | sensitivity | clip norm | noise | dataset |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = [_row(one) for one in registration.promises]
    lineage = registration.lineage
    n_rounds = len(lineage.manifests)
    tail = [
        "",
        f"Trained from {lineage.started_from or 'the untrained backbone'} by code revision "
        f"`{lineage.git_revision[:12]}` in {n_rounds} round{'s' * (n_rounds != 1)}; mechanism "
        f"`{registration.mechanism.sha256[:16]}`. Every value in full is in the tags.",
    ]
    room = MOST_DESCRIPTION_CHARACTERS - len("\n".join([*head, *tail])) - len("\nand 000000 more domains: see the tags")
    kept = _rows_that_fit(rows, room)
    more = [f"and {len(rows) - kept} more domains: see the tags"] if kept < len(rows) else []
    return "\n".join([*head, *rows[:kept], *more, *tail])


def _row(one: DomainPromise) -> str:
    protects = f"one {one.privacy_unit}" if one.privacy_level == "unit" else "a client's whole dataset"
    first, last = _short(one.noise_multiplier_first), _short(one.noise_multiplier_last)
    noise = first if first == last else f"{first} to {last}"
    cells = (
        one.domain, _short(one.epsilon_spent), _short(one.epsilon_budget), _short(one.delta), protects,
        one.sensitivity or "given outright", _short(one.clip_norm), noise, f"`{one.dataset_fingerprint[:12]}`",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _rows_that_fit(rows: Sequence[str], room: int) -> int:
    kept = 0
    for row in rows:
        room -= len(row) + 1
        if room < 0:
            break
        kept += 1
    return kept


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
