"""Prefect artifacts from core records: rounds, gate, privacy. Public values only."""

from prefect.artifacts import create_markdown_artifact, create_progress_artifact, create_table_artifact
from prefect.artifacts import update_progress_artifact as update_progress_artifact

from fedmentor_core.records import RoundManifest, StudyPlan, StudySummary


def start_progress(run_id: str) -> str:
    """A progress artifact over rounds; returns its id."""
    return str(create_progress_artifact(progress=0.0, key=_key(run_id, "rounds-progress"), description="Rounds"))


def plan_artifact(run_id: str, plan: StudyPlan) -> None:
    """What each domain was promised."""
    create_table_artifact(
        key=_key(run_id, "privacy-plan"),
        table=[
            {
                "domain": d.domain,
                "units": d.n_units,
                "epsilon budget": d.epsilon_budget,
                "delta": d.delta,
                "noise multiplier": d.noise_multiplier,
                "planned epsilon (RDP)": _short(d.epsilon_planned_rdp),
                "planned epsilon (PRV)": _short(d.epsilon_planned_prv),
                "refused": "; ".join(d.refusals),
            }
            for d in plan.domains
        ],
        description="Privacy plan: what each domain was promised before training.",
    )


def round_artifacts(manifest: RoundManifest) -> None:
    """Clients, gate verdict and noise changes of a committed round."""
    summary = manifest.summary
    create_table_artifact(
        key=_key(manifest.run_id, "clients"),
        table=[
            {
                "round": summary.round_index,
                "domain": c.domain,
                "status": c.status,
                "units": c.n_units,
                "noise multiplier": _short(c.noise_multiplier),
                "epsilon spent": _short(c.epsilon_spent),
                "epsilon budget": c.epsilon_budget,
                "bytes up": c.bytes_up,
                "seconds": _short(c.seconds),
                "reason": c.reason,
            }
            for c in summary.clients
        ],
        description=f"Clients of round {summary.round_index}.",
    )
    lines = [f"- {result}" for result in summary.gate.results] or ["- no thresholds are configured"]
    changes = [f"- {c.domain}: {c.from_:.4g} → {c.to:.4g} ({c.reason})" for c in summary.noise_changes]
    verdict = "passed" if summary.gate.passed else "did not pass"
    text = "\n".join(
        [f"# Round {summary.round_index}: the gate {verdict}", "", *lines, "", "## Noise", "", *(changes or ["- kept"])]
    )
    create_markdown_artifact(key=_key(manifest.run_id, "gate"), markdown=text, description="The gate's verdict.")


def final_artifact(summary: StudySummary, report_path: str) -> None:
    """Headline numbers from the test set."""
    rows = ["| metric | untrained | final |", "|---|---|---|"]
    if summary.final is not None:
        for name in ("bertscore_f1", "rouge_l", "label_f1", "safe_rate", "toxicity_mean"):
            before, after = getattr(summary.baseline, name), getattr(summary.final, name)
            rows.append(f"| {name} | {before:.4f} | {after:.4f} |")
    text = "\n".join(
        [f"# {summary.study}: {summary.status}", "", "From the test set, which no decision looked at.", "", *rows, ""]
        + [f"- {warning}" for warning in summary.warnings]
        + [f"Report: `{report_path}`"]
    )
    create_markdown_artifact(key=_key(summary.run_id, "result"), markdown=text, description="The study's result.")


def _key(run_id: str, name: str) -> str:
    return f"{run_id}-{name}".replace("_", "-")


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
