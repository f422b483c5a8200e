"""``fedmentor doctor``: examine a store or this machine, and say what is wrong in a table."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedmentor_core.check import Diagnosis
from fedmentor_core.config import StorageConfig

CONSTRAINTS = Path(__file__).resolve().parent.parent / "infra" / "constraints.txt"
_COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def doctor_command(store: str | None, settings: StorageConfig, *, as_json: bool) -> bool:
    """Examine ``store``, or this machine when it is None, and print the findings. True when nothing failed."""
    if store is None:
        from fedmentor_core.machine import examine_machine

        diagnosis = examine_machine(Path.cwd(), CONSTRAINTS)
    else:
        from fedmentor_core.storage.probe import probe_store

        diagnosis = probe_store(store, settings)
    if as_json:
        print(json.dumps({"passed": diagnosis.passed, **diagnosis.model_dump(mode="json")}, indent=2))
    else:
        print_diagnosis(diagnosis)
    return diagnosis.passed


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """The findings as a table; reasons and remedies below it, for whatever did not pass."""
    console = Console()
    table = Table(title=f"Doctor: {diagnosis.subject}", title_justify="left")
    for heading in ("check", "", "found", "why it matters"):
        table.add_column(heading, overflow="fold")
    for check in diagnosis.checks:
        colour = _COLOURS[check.status]
        table.add_row(check.name, f"[{colour}]{check.status}[/]", check.found, check.why)
    console.print(table)
    for check in diagnosis.checks:
        if check.status != "pass":
            console.print(f"[{_COLOURS[check.status]}]{check.status}[/] {check.name}: {check.remedy}", highlight=False)
    for left in diagnosis.left:
        console.print(f"left behind, because it could not be deleted: {left}", highlight=False)
