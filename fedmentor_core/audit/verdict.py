"""A finished audit as files, and whether it speaks for a model."""

import os
import tempfile
from pathlib import Path

from pydantic import ValidationError

from fedmentor_core.audit.mechanism import Mechanism
from fedmentor_core.audit.page import build_page
from fedmentor_core.audit.records import AuditReport
from fedmentor_core.errors import ConfigError
from fedmentor_core.hashing import sha256_bytes
from fedmentor_core.records import Record

REPORT_FILE, PAGE_FILE = "audit.json", "audit.html"
_DIFFERENCES_NAMED = 5


class FinishedAudit(Record):
    """An audit's report and the digest of the file that holds it."""

    report: AuditReport
    sha256: str

    def foreign_to(self, mechanism_sha256: str, mechanism: Mechanism | None, domains: frozenset[str]) -> str:
        """Why this audit says nothing about a model of that mechanism; empty when it does.

        Args:
            mechanism_sha256: the model's; it alone decides.
            mechanism: its parts where they are known, to name what differs.
            domains: those that trained the model; each must have had canaries.
        """
        if self.report.mechanism_sha256 != mechanism_sha256:
            found = self.report.mechanism.differences(mechanism) if mechanism is not None else ()
            more = len(found) - _DIFFERENCES_NAMED
            named = "; ".join(found[:_DIFFERENCES_NAMED]) + (f"; and {more} more" if more > 0 else "")
            return (
                f"it audited another mechanism ({self.report.mechanism_sha256[:12]}, the model has "
                f"{mechanism_sha256[:12] or 'none recorded'})" + (f"; audit / model: {named}" if named else "")
            )
        missing = sorted(domains - {one.domain for one in self.report.domains})
        return f"it put no canaries in {', '.join(missing)}" if missing else ""


def write_audit(report: AuditReport, folder: Path) -> FinishedAudit:
    """Write the page, then the report: where ``audit.json`` is, the audit is finished."""
    _replace(folder / PAGE_FILE, build_page(report))
    _replace(folder / REPORT_FILE, report.model_dump_json(indent=2) + "\n")
    return read_audit(folder)


def read_audit(place: Path) -> FinishedAudit:
    """Read ``audit.json``, given as the file or its folder.

    Raises:
        ConfigError: there is none, it is no audit of this version, or its mechanism does not have its digest.
    """
    path = place / REPORT_FILE if place.is_dir() else place
    try:
        data = path.read_bytes()
        report = AuditReport.model_validate_json(data)
    except FileNotFoundError:
        raise ConfigError(
            f"no finished audit at {path}. Run 'fedmentor audit' with the study's configuration first."
        ) from None
    except (OSError, ValidationError):
        raise ConfigError(f"{path} is not an audit report of this version of FedMentor. Audit again.") from None
    if report.mechanism.sha256 != report.mechanism_sha256:
        raise ConfigError(f"{path}: its mechanism does not have the digest it names, so it was changed. Audit again.")
    return FinishedAudit(report=report, sha256=sha256_bytes(data))


def _replace(path: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
        handle.write(text)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
