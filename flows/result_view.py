"""What the terminal shows at the end: result, plan, ledger. Reads core records only."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.ledger_report import LedgerReport
from fedmentor_core.privacy.ledger_view import LedgerView, Tonight
from fedmentor_core.records import DomainPlan, ReductionCost, StudyPlan, StudySummary

_METRICS = (
    ("BERTScore F1", "bertscore_f1"),
    ("ROUGE-L", "rouge_l"),
    ("label F1", "label_f1"),
    ("perplexity of references", "perplexity"),
    ("safe-output rate", "safe_rate"),
    ("toxicity, mean", "toxicity_mean"),
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
        with_interval = summary.final.intervals is not None
        for heading in ("metric", "untrained", "final", *(["95 % interval"] if with_interval else []), "change"):
            table.add_column(heading, justify="left" if heading == "metric" else "right")
        for label, name in _METRICS:
            before, after = getattr(summary.baseline, name), getattr(summary.final, name)
            if before is None or after is None:
                continue  # not measured, or not released of a private set
            found = (summary.final.intervals or {}).get(name)
            interval = [] if not with_interval else ["" if found is None else f"{found[0]:.4f} to {found[1]:.4f}"]
            table.add_row(label, f"{before:.4f}", f"{after:.4f}", *interval, f"{after - before:+.4f}")
        console.print(table)
        for one in () if summary.safety_final is None else summary.safety_final.sets:
            kinds = (("unsafe", one.n_unsafe, one.unsafe_refusal_rate), ("safe", one.n_safe, one.over_refusal_rate))
            refused = " and ".join(f"{rate:.0%} of {n} {kind} ones" for kind, n, rate in kinds if rate is not None)
            console.print(f"Safety prompts, {one.name}: refused {refused}", highlight=False)
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
    """The privacy plan as tables: what is promised, what the schedule will cost, what more could be asked for."""
    console = Console()
    console.print(
        _table(
            "Privacy plan: nothing has been trained",
            ("domain", "protects", "units", "sample rate", "steps", "clip", "noise", "up", "down"),
            (
                (
                    d.domain, _protected(d), f"{d.n_units:,}", f"{d.sample_rate:.4f}",
                    f"{d.rounds} x {d.steps_per_round}", f"{d.clip_norm:g}", _schedule(d.noise_schedule),
                    _bytes(d.bytes_up_per_round), _bytes(d.bytes_down_per_round),
                )
                for d in plan.domains
            ),
        )
    )  # fmt: skip
    promised = [d for d in plan.domains if d.epsilon_budget is not None]
    console.print(
        _table(
            "Epsilon, over each domain's lifetime",
            ("domain", "delta", "budget", "spent before", "at the end", "by PRV", "reserve", "rule"),
            (
                (
                    d.domain, _scientific(d.delta), _number(d.epsilon_budget), _number(d.epsilon_spent_before),
                    _number(d.epsilon_planned_rdp), _number(d.epsilon_planned_prv),
                    "-" if d.reserve_epsilon is None else f"{d.reserve_epsilon:.4f}", d.rule,
                )
                for d in promised
            ),
        )
    )  # fmt: skip
    if any(d.planned_runs > 1 for d in promised):
        console.print(
            _table(
                "This run's share of the budget",
                ("domain", "run", "of", "epsilon before", "may go up to", "lifetime budget"),
                (
                    (
                        d.domain, str(d.runs_before + 1), str(d.planned_runs), _number(d.epsilon_spent_before),
                        _number(_run_epsilon(d)), _number(d.epsilon_budget),
                    )
                    for d in promised
                ),
            )
        )  # fmt: skip
        console.print(
            "Shares are equal in RDP. Turning RDP into epsilon has a fixed cost, so the first run takes more epsilon."
        )
    if any(d.reductions for d in promised):
        console.print(
            _table(
                "What noise reductions would cost, were utility always too low",
                ("domain", "after round", "noise", "epsilon if kept", "above the plan", "limited by"),
                (
                    (
                        d.domain, str(one.after_round + 1), _number(one.noise_multiplier), _number(one.epsilon_at_end),
                        f"{one.epsilon_extra:.4f}", one.limited_by,
                    )
                    for d in promised
                    for one in _some(d.reductions)
                ),
            )
        )  # fmt: skip
    if any(d.validation for d in plan.domains):
        console.print(
            _table(
                "Private gate and test sets",
                ("account", "units", "releases", "std of a mean", "delta", "budget", "spent before", "at the end"),
                (
                    (
                        one.account, f"{one.n_units:,}", str(one.releases), _number(one.metric_std),
                        _scientific(one.delta), _number(one.epsilon_budget), _number(one.epsilon_spent_before),
                        "refused" if one.refusal else _number(one.epsilon_planned),
                    )
                    for d in plan.domains
                    for one in d.validation
                ),
            )
        )  # fmt: skip
    if plan.shared_posts:
        console.print(
            _table(
                "Posts in several accounts: budgets add up",
                ("accounts", "posts", "epsilon spent", "budget", "delta"),
                (
                    (
                        ", ".join(one.accounts), f"{one.n_posts:,}", _number(one.epsilon_spent),
                        _number(one.epsilon_budget), _scientific(one.delta),
                    )
                    for one in plan.shared_posts
                ),
            )
        )  # fmt: skip
    console.print(
        f"Traffic: {plan.bytes_per_round / 1e6:.2f} MB a round over {len(plan.domains)} clients, both ways. "
        "The filter admits by RDP at an order fixed in advance ('at the end'); PRV holds for this run's schedule "
        "alone and only if it is kept, and decides nothing."
    )
    for warning in (*plan.warnings, *(warning for d in plan.domains for warning in d.warnings)):
        console.print(f"warning: {warning}", style="yellow", markup=False)
    for refusal in plan.refusals:
        console.print(f"refused: {refusal}", style="yellow", markup=False)


def _table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Words to the left, numbers to the right."""
    table = Table(title=title, title_justify="left")
    words = ("domain", "protects", "rule", "limited by", "account", "accounts")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in words else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _protected(plan: DomainPlan) -> str:
    return "the client" if plan.privacy_level == "client" else plan.privacy_unit


def _schedule(noise: Sequence[float]) -> str:
    """One number where noise stays, else the first and the last."""
    if not noise:
        return "-"
    return _number(noise[0]) if noise[0] == noise[-1] else f"{_number(noise[0])} to {_number(noise[-1])}"


def _run_epsilon(plan: DomainPlan) -> float | None:
    """Lifetime epsilon at which this run's share ends."""
    account = PrivacyAccount.of(plan)
    if account is None or plan.run_rdp_budget is None:
        return None
    return account.epsilon_spent(plan.run_rdp_budget)


def _some(reductions: Sequence[ReductionCost]) -> Sequence[ReductionCost]:
    """The first few and the last: the rest is in ``--json``."""
    return reductions if len(reductions) <= 5 else (*reductions[:4], reductions[-1])


def print_ledger(report: LedgerReport) -> None:
    """Accounts with what is left for tonight, their entries, and the posts that several of them hold."""
    console = Console()
    if not report.domains:
        console.print("No ledgers here: nothing was ever planned or charged.")
    for view in report.domains:
        _print_account(console, view)
    if report.shared_posts:
        console.print(
            _table(
                "Posts that several accounts hold: what such a post may lose in all",
                ("accounts", "posts", "epsilon spent", "of budget", "delta"),
                (
                    (
                        ", ".join(one.accounts), f"{one.n_posts:,}", _number(one.epsilon_spent),
                        _number(one.epsilon_budget), _scientific(one.delta),
                    )
                    for one in report.shared_posts
                ),
            )
        )  # fmt: skip
    for problem in report.problems:
        console.print(f"NOT VERIFIED: {problem}", style="bold red", markup=False, soft_wrap=True)


def _print_account(console: Console, view: LedgerView) -> None:
    console.print(f"\n[bold]{view.domain}[/]", highlight=False)
    if not view.verified:
        console.print("  broken chain: what was spent is not known", style="bold red")
        return
    if view.epsilon_budget is None:
        console.print("  no promise was made here yet")
        return
    protects = f"a {view.privacy_unit or 'unit'}" if view.privacy_level == "unit" else "the client's whole dataset"
    derived = f", from sensitivity {view.sensitivity}" if view.sensitivity else ""
    console.print(
        f"  promise: epsilon {view.epsilon_budget:g} at delta {_scientific(view.delta)} for {protects}{derived}\n"
        f"  spent {view.epsilon_spent or 0.0:.4f}, left {view.epsilon_left or 0.0:.4f}; chain verified",
        highlight=False,
    )
    if not view.private:
        console.print("  NOT PRIVATE: some of its noise was seeded, so the promise does not hold", style="bold red")
    if view.tonight is not None:
        console.print(f"  tonight: {_tonight(view.tonight)}", highlight=False, soft_wrap=True)
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


def _tonight(tonight: Tonight) -> str:
    planned = f"run {tonight.runs_charged + 1} of {tonight.planned_runs} planned"
    share = f"{planned} may spend epsilon {tonight.epsilon_share:.4f}, up to {tonight.epsilon_after:.4f} in all"
    last = tonight.last
    if last is None:
        return share
    like = f"a run like the last ({last.rounds} x {last.steps_per_round} steps at sample rate {last.sample_rate:.4g})"
    if tonight.least_noise_multiplier is None:
        return f"{share}; {like} does not fit at any noise"
    needs = f"{share}; {like} needs noise {tonight.least_noise_multiplier:.4g} or more"
    if tonight.such_runs_left is None:
        return needs
    return f"{needs}; at its own noise of {last.noise_multiplier:.4g} the rest carries {tonight.such_runs_left} more"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
