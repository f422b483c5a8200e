"""``fedmentor audit``: run the core's audit with progress, leave audit.json and audit.html, say the verdict."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedmentor_core.audit.page import SHOWS
from fedmentor_core.audit.records import AuditReport
from fedmentor_core.audit.run import run_audit
from fedmentor_core.audit.verdict import PAGE_FILE, write_audit
from fedmentor_core.config import StudyConfig
from fedmentor_core.errors import ConfigError
from flows.progress_view import make_listener


def audit_command(
    config: StudyConfig,
    out: Path,
    *,
    domain: str | None = None,
    n_canaries: int | None = None,
    confidence: float,
    units: Mapping[str, int] | None = None,
    own_data: bool = False,
    as_json: bool = False,
) -> AuditReport:
    """Audit, write both files and print the verdict.

    Raises:
        ConfigError, OutputExistsError, BudgetError: see ``run_audit``.
    """
    with make_listener("quiet" if as_json else "auto", Console(stderr=True)) as listener:
        report = run_audit(
            config,
            out,
            domain=domain,
            n_canaries=n_canaries,
            confidence=confidence,
            units=units,
            own_data=own_data,
            listen=listener,
        )
    write_audit(report, out)
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        print_audit(report, out)
    return report


def units_of(config: StudyConfig, given: Sequence[str]) -> dict[str, int] | None:
    """Read ``--units``: one number for every domain, or NAME=N for each; None when none is given.

    Raises:
        ConfigError: not a number, or a name given twice.
    """
    found: dict[str, int] = {}
    for text in given:
        name, separator, number = text.rpartition("=")
        names = [name] if separator else [domain.name for domain in config.domains]
        if not number.isdigit() or any(one in found for one in names):
            raise ConfigError(
                f"--units: got {text!r}; allowed: one number for every domain, such as 500, or NAME=500 once for each."
            )
        found |= dict.fromkeys(names, int(number))
    return found or None


def print_audit(report: AuditReport, out: Path) -> None:
    """Verdict, figures, every check that failed, and what a verdict means."""
    console = Console()
    verdict = "[bold green]passed[/]" if report.passed else "[bold red]FAILED[/]"
    console.print(f"\n[bold]{report.study}[/]: audit {verdict}, {report.seconds:.0f} s")
    table = Table(title="What canaries show, against what is claimed", title_justify="left")
    headings = (
        "domain", "verdict", "canaries", "epsilon shown", "reachable", "claimed", "counted again", "AUC", "95 %",
        "TPR at 1 % FPR", "exposure",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("domain", "verdict") else "right")
    for one in report.domains:
        table.add_row(
            one.domain, "pass" if one.passed else "[bold red]FAIL[/]", str(one.n_canaries),
            f">= {one.epsilon_lower_bound:.3f}", f"{one.epsilon_reachable:.2f}", f"{one.epsilon_claimed:.3f}",
            f"{one.epsilon_recomputed:.3f}", f"{one.mia_auc:.3f}",
            f"{one.mia_auc_interval.low:.2f} - {one.mia_auc_interval.high:.2f}", f"{one.tpr_at_1pct_fpr:.1%}",
            f"{one.exposure_mean:.2f} bits",
        )  # fmt: skip
    console.print(table)
    checks = Table(title="Checks", title_justify="left")
    for heading in ("check", *(one.domain for one in report.domains)):
        checks.add_column(heading)
    for name in (check.name for check in report.domains[0].checks):
        verdicts = [next(check for check in one.checks if check.name == name).passed for one in report.domains]
        checks.add_row(name, *("pass" if passed else "[bold red]FAIL[/]" for passed in verdicts))
    console.print(checks)
    for reason in report.reasons:
        console.print(f"  failed: {reason}", style="red", markup=False)
    for warning in report.warnings:
        console.print(f"  warning: {warning}", style="yellow", markup=False)
    console.print(report.cost, markup=False)
    console.print(SHOWS, markup=False)
    print(f"Report: {(out / PAGE_FILE).resolve()}")
