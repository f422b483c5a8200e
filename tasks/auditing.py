"""The audit before promotion: a study of its own in ``OUT/audit``, on invented text; it decides about ``champion``."""

import json
import shutil
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from fedmentor_core.audit.mechanism import Mechanism
from fedmentor_core.audit.run import audit_name, run_audit
from fedmentor_core.audit.verdict import REPORT_FILE, FinishedAudit, read_audit, write_audit
from fedmentor_core.discretion import discreet
from fedmentor_core.errors import OutputExistsError
from fedmentor_core.progress import ProgressEvent
from fedmentor_core.records import StudySummary
from fedmentor_core.study_ref import MARKER, StudyRef
from fedmentor_core.workspace import workspace_of
from tasks.listening import tell

FOLDER = "audit"


def audit_is_due(ref: StudyRef, summary: StudySummary) -> bool:
    """Whether only an audit stands between this study's adapter and ``champion``."""
    return ref.config.audit.before_promotion and summary.status == "promoted" and summary.private


@task(name="audit", cache_policy=NO_CACHE, persist_result=False)
@discreet
def audit_study(ref: StudyRef) -> FinishedAudit:
    """Audit a study's mechanism, or find the audit that an earlier start of the study finished.

    An audit that was cut short begins anew with other coins: it released nothing of anybody, and a verdict that
    nobody saw cannot be chosen by starting again. A finished one is kept, whatever it says.

    Raises:
        OutputExistsError: ``OUT/audit`` holds something else.
    """
    folder = Path(ref.out_dir) / FOLDER
    workspace = workspace_of(ref)
    if (folder / REPORT_FILE).is_file():
        return _kept(folder, Mechanism.of(ref.config, workspace.backbone.sha256))
    if folder.exists():
        _clear_unfinished(folder, audit_name(ref.config))
    units = {plan.domain: plan.n_units for plan in workspace.plan.domains}
    return write_audit(run_audit(ref.config, folder, units=units, listen=_tell), folder)


def objections(audit: FinishedAudit) -> tuple[str, ...]:
    """What a study's summary must say about its audit; empty when it passed."""
    where = f"the audit before promotion failed ({FOLDER}/{REPORT_FILE} in the output folder)"
    return tuple(f"{where}: {reason}" for reason in audit.report.reasons)


def _kept(folder: Path, mechanism: Mechanism) -> FinishedAudit:
    audit = read_audit(folder)
    foreign = audit.foreign_to(mechanism.sha256, mechanism, mechanism.domains)
    if foreign:
        raise OutputExistsError(
            f"{folder} holds an audit that does not speak for this study: {foreign}. Nothing was changed. Move it "
            "away and run the study again."
        )
    return audit


def _clear_unfinished(folder: Path, name: str) -> None:
    """Remove an audit of this study that has no report; anything else in its place is left alone."""
    marker = folder / MARKER
    if not marker.is_file() or json.loads(marker.read_text(encoding="utf-8")).get("study") != name:
        raise OutputExistsError(
            f"{folder} is in the way of the audit before promotion and is none of ours. Nothing was changed. Move it "
            "away and run the study again."
        )
    shutil.rmtree(folder)


def _tell(event: ProgressEvent) -> None:
    """An audit's progress is one line of the study's; an interruption ends it before any verdict."""
    about = " ".join(part for part in (event.domain, event.message or event.stage) if part)
    tell(ProgressEvent("register", f"audit before promotion: {about}"))
