"""What a version must show before it may be champion: gate, privacy, audit, files and ledger, none missing, none stale.

Evidence is a tag that names what it speaks of by digest, and it is stale when that is no longer so:

- the gate's verdict, when it judged another adapter than the registered one, or compared it with a champion that is no
  longer the champion;
- the registered files, when they no longer have the digest they were registered with;
- an audit, when it audited another mechanism;
- the ledger, when an account's chain is broken or no longer holds the entry that was its newest at registration; of an
  account at a site, when no entry is named that the site signed.

Each is checked at every promotion, also of a version that passed long ago.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from fedmentor_core.errors import FedMentorError
from fedmentor_core.lineage import LedgerHead, LedgerPlace, stale_heads
from tasks.registered_files import fetch_adapter
from tasks.registration_records import (
    ADAPTER_TAG,
    AUDIT_TAG,
    GATE_ADAPTER_TAG,
    GATE_TAG,
    HEAD_TAG,
    LEDGER_TAG,
    MECHANISM_SHA256_TAG,
    PRIVATE_TAG,
    PROMISE_TAG,
    REASONS_TAG,
    RIVAL_TAG,
    DomainPromise,
)
from tasks.registry_client import CHAMPION, aliases_of

if TYPE_CHECKING:
    from mlflow import MlflowClient


def obstacle(
    client: "MlflowClient", tracking_uri: str, name: str, version: str, tags: Mapping[str, str], allow_not_private: bool
) -> str:
    """Why a version with these tags may not be champion; empty when it may."""
    return (
        _of_gate(tags)
        or _of_rival(client, name, version, tags)
        or _of_privacy(tags, allow_not_private)
        or _of_audit(tags)
        or _of_files(client, tracking_uri, name, version)
        or _of_ledger(tags)
    )


def _of_gate(tags: Mapping[str, str]) -> str:
    gate = tags.get(GATE_TAG, "missing")
    if gate != "passed":
        return f"its gate is {gate!r}, not 'passed' ({tags.get(REASONS_TAG, 'no verdict recorded')})"
    judged = tags.get(GATE_ADAPTER_TAG, "")
    if judged != tags.get(ADAPTER_TAG):
        spoke = f"judged adapter {judged[:12]}" if judged else "names no adapter"
        return f"its gate's verdict {spoke}, and the version holds {tags.get(ADAPTER_TAG, 'none')[:12]}"
    return ""


def _of_rival(client: "MlflowClient", name: str, version: str, tags: Mapping[str, str]) -> str:
    rival = tags.get(RIVAL_TAG)
    now = aliases_of(client, name).get(CHAMPION, "none")
    if rival is None or now in (rival, version):
        return ""
    return f"its gate compared it with champion {rival}, and champion now is {now}; run its study again"


def _of_privacy(tags: Mapping[str, str], allow_not_private: bool) -> str:
    return "" if tags.get(PRIVATE_TAG) == "true" or allow_not_private else "the study is not private"


def _of_audit(tags: Mapping[str, str]) -> str:
    audit = tags.get(AUDIT_TAG)
    if audit == "failed":
        return f"its audit failed ({tags.get(f'{AUDIT_TAG}_reasons', 'no reasons recorded')})"
    if audit == "required":
        return "its study asks for an audit before promotion and it has none; audit its configuration and give --audit"
    if audit == "passed" and tags.get(f"{AUDIT_TAG}_mechanism_sha256") != tags.get(MECHANISM_SHA256_TAG):
        return "its audit is of another mechanism; audit its configuration and give --audit"
    return ""


def _of_files(client: "MlflowClient", tracking_uri: str, name: str, version: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            fetch_adapter(client, tracking_uri, name, version, Path(folder))
        except FedMentorError as error:
            return str(error).rstrip(".")
    return ""


def _of_ledger(tags: Mapping[str, str]) -> str:
    """Every domain that trained under privacy must show an account, and every account shown must still be there."""
    try:
        promises = [DomainPromise.model_validate_json(value) for value in _below(tags, PROMISE_TAG).values()]
        heads = {key: LedgerHead.model_validate_json(value) for key, value in _below(tags, HEAD_TAG).items()}
        place = LedgerPlace.model_validate_json(tags[LEDGER_TAG]) if LEDGER_TAG in tags else None
    except ValidationError:
        return "what it says of its ledger cannot be read"
    charged = [one.domain for one in promises if one.noise_multiplier_first is not None]
    missing = [one for one in charged if one not in heads or not heads[one].sha256]
    if missing or (tags.get(PRIVATE_TAG) == "true" and not promises):
        return f"it shows no ledger that paid for {', '.join(missing) or 'it'}"
    if not heads:
        return ""  # trained without privacy: there is no account
    if place is None:
        return "it does not say where its ledger is"
    try:
        problems = stale_heads(place.open(), heads.values())
    except FedMentorError as error:
        return f"its ledger cannot be read ({str(error).rstrip('.')})"
    return "; ".join(problems)


def _below(tags: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {key.removeprefix(f"{prefix}."): tags[key] for key in sorted(tags) if key.startswith(f"{prefix}.")}
