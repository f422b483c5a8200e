"""The files a study leaves in its output folder: ``summary.json``, ``report.html``, ``config.yaml``."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedmentor_core.config import StudyConfig
from fedmentor_core.privacy.ledger import Ledger, ledger_domains
from fedmentor_core.privacy.ledger_view import LedgerView
from fedmentor_core.records import StudySummary
from fedmentor_core.report.html import write_report
from fedmentor_core.study import samples_by_round
from fedmentor_core.study_ref import StudyRef
from fedmentor_core.workspace import Workspace


@dataclass(frozen=True)
class Outputs:
    """What was written."""

    summary: Path
    report: Path
    config_yaml: str
    ledger: dict[str, Any]


def write_outputs(ref: StudyRef, workspace: Workspace, summary: StudySummary) -> Outputs:
    """Write report and configuration, then the summary last: where it is, the study is finished."""
    out = Path(ref.out_dir)
    by_round = samples_by_round(workspace)
    samples = by_round.get(summary.selected_round if summary.selected_round is not None else -1, ())
    report = out / "report.html"
    accounts = ledger_views(workspace)
    write_report(report, summary, ref.config, samples, round_samples=by_round, accounts=accounts)
    config_yaml = study_yaml(ref.config)
    write_text(out / "config.yaml", config_yaml)
    path = out / "summary.json"
    write_text(path, summary.model_dump_json(by_alias=True, indent=2) + "\n")
    return Outputs(path, report, config_yaml, ledger_snapshot(accounts))


def study_yaml(config: StudyConfig) -> str:
    """The whole configuration, defaults included, as ``config.yaml`` holds it."""
    return str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def ledger_views(workspace: Workspace) -> list[LedgerView]:
    """All accounts, each verified from its first entry; reading a broken chain raises."""
    store = workspace.ledger_store
    return [Ledger(store, name).view() for name in ledger_domains(store)]


def ledger_snapshot(accounts: Sequence[LedgerView]) -> dict[str, Any]:
    """``accounts`` as ``fedmentor ledger --json`` prints them."""
    return {"verified": True, "domains": [account.model_dump(mode="json") for account in accounts]}


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` atomically."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
        handle.write(text)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
