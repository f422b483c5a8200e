"""What the terminal shows at the end: result, plan, ledger. Reads core records only."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedmentor_core.privacy.ledger import LedgerView
from fedmentor_core.records import StudyPlan, StudySummary

_METRICS = (
    ("BERTScore F1", "bertscore_f1", True),
    ("ROUGE-L", "rouge_l", True),
    ("label F1", "label_f1", True),
    ("safe-output rate", "safe_rate", True),
    ("toxicity, mean", "toxicity_mean", False),
)


def print_summary(summary: StudySummary, folder: Path) -> None:
    """The result, and where to look next."""
    console = Console()
    colour = "green" if summary.status == "promoted" else "yellow"
    privacy = "private" if summary.private else "[bold red]NOT PRIVATE[/]"
    console.print(
        f"\n[bold]{summary.study}[/]: [bold {colour}]{summary.status}[/], {privacy}, {_time(summary.seconds_total)}"
    )
    if summary.final is not None:
        table = Table(title="Test set, which no decision looked at", title_justify="left")
        for heading in ("metric", "untrained", "final", "change"):
            table.add_column(heading, justify="left" if heading == "metric" else "right")
        for label, name, _ in _METRICS:
            before, after = getattr(summary.baseline, name), getattr(summary.final, name)
            table.add_row(label, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
        console.print(table)
    clients = summary.rounds[-1].clients if summary.rounds else ()
    table = Table(title="Privacy, over each domain's lifetime", title_justify="left")
    for heading in ("domain", "units", "epsilon spent", "of budget", "delta", "noise multiplier"):
        table.add_column(heading, justify="left" if heading == "domain" else "right")
    for client in clients:
        table.add_row(
            client.domain, str(client.n_units), _number(client.epsilon_spent), _number(client.epsilon_budget),
            "-" if client.delta is None else f"{client.delta:.1e}", _number(client.noise_multiplier),
        )  # fmt: skip
    console.print(table)
    if summary.rounds:
        gate = next(r.gate for r in summary.rounds if r.round_index == summary.selected_round)
        for reason in gate.reasons:
            console.print(f"  gate: {reason}", style="yellow", markup=False)
        traffic = max(one.bytes_total for one in summary.rounds)
        console.print(f"Traffic, largest round: {traffic / 1e6:.2f} MB over {len(clients)} clients, both ways")
    for warning in summary.warnings:
        console.print(f"  warning: {warning}", style="yellow", markup=False)
    if summary.model is not None:
        aliases = ", ".join(summary.model.aliases) or "no alias"
        console.print(f"Model: {summary.model.name} version {summary.model.version} ({aliases})")
    print(f"Report:     {(folder / 'report.html').resolve()}")
    print(f"Summary:    {(folder / 'summary.json').resolve()}")
    if summary.tracking_uri:
        print(f"MLflow UI:  mlflow ui --backend-store-uri {summary.tracking_uri}   (http://127.0.0.1:5000)")
    prefect_home = (folder / "prefect").resolve()
    if prefect_home.is_dir():
        print(f"Prefect UI: PREFECT_HOME={prefect_home} prefect server start   (http://127.0.0.1:4200)")


def print_plan(plan: StudyPlan) -> None:
    """The privacy plan as a table."""
    console = Console()
    table = Table(title="Privacy plan: nothing has been trained", title_justify="left")
    headings = (
        "domain", "units", "sample rate", "steps", "noise", "clip", "delta", "budget", "spent", "planned RDP",
        "planned PRV", "bytes/round",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "domain" else "right")
    for d in plan.domains:
        table.add_row(
            d.domain, str(d.n_units), f"{d.sample_rate:.4f}", f"{d.rounds} x {d.steps_per_round}",
            _number(d.noise_multiplier), f"{d.clip_norm:g}", "-" if d.delta is None else f"{d.delta:.1e}",
            _number(d.epsilon_budget),
            _number(d.epsilon_spent_before), _number(d.epsilon_planned_rdp), _number(d.epsilon_planned_prv),
            f"{d.bytes_up_per_round + d.bytes_down_per_round:,}",
        )  # fmt: skip
    console.print(table)
    reserves = sorted({d.reserve_fraction for d in plan.domains})
    console.print(
        f"Reserve kept for noise reductions: {', '.join(f'{r:.0%}' for r in reserves)} of each budget. "
        f"Traffic: {plan.bytes_per_round / 1e6:.2f} MB a round. The filter admits by RDP; PRV is shown for comparison."
    )
    for refusal in plan.refusals:
        console.print(f"refused: {refusal}", style="yellow", markup=False)


def print_ledger(views: Sequence[LedgerView]) -> None:
    """Accounts and their entries."""
    console = Console()
    if not views:
        console.print("No ledgers here: nothing was ever planned or charged.")
        return
    for view in views:
        budget, spent = view.epsilon_budget or 0.0, view.epsilon_spent
        console.print(
            f"\n[bold]{view.domain}[/]  epsilon {spent:.4f} of {budget:g} spent, {max(0.0, budget - spent):.4f} left "
            f"at delta {view.delta or 0:.1e}; chain verified"
        )
        table = Table()
        for heading in ("#", "kind", "run", "round", "attempt", "noise", "sample rate", "steps", "RDP", "sha256"):
            table.add_column(heading)
        for entry in view.entries:
            table.add_row(
                str(entry["sequence"]), entry["kind"], entry["run_id"],
                "-" if entry["round_index"] is None else str(entry["round_index"]), str(entry["attempt"]),
                _number(entry["noise_multiplier"]), _number(entry["sample_rate"]), str(entry["steps"] or "-"),
                f"{entry['rdp_charge']:.5f}" if entry["rdp_charge"] else "-", entry["sha256"][:12],
            )  # fmt: skip
        console.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
