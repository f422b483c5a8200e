"""Prefect artifacts from core records: rounds, gate, privacy. Public values only."""

from typing import Any

from prefect.artifacts import create_markdown_artifact, create_progress_artifact, create_table_artifact
from prefect.artifacts import update_progress_artifact as update_progress_artifact

from fedmentor_core.records import NoiseDecision, RoundManifest, RoundSummary, StudyPlan, StudySummary
from fedmentor_core.report.words import NOT_PRIVATE


def start_progress(run_id: str) -> str:
    """A progress artifact over rounds; returns its id."""
    return str(create_progress_artifact(progress=0.0, key=_key(run_id, "rounds-progress"), description="Rounds"))


def plan_artifact(run_id: str, plan: StudyPlan, *, private: bool) -> None:
    """What each domain was promised, and what its private gate and test sets and its shared posts may cost."""
    mark = "" if private else f"{NOT_PRIVATE}. "
    create_table_artifact(
        key=_key(run_id, "privacy-plan"),
        table=plan_rows(plan),
        description=f"{mark}Privacy plan: what each domain was promised before training.",
    )
    if any(domain.validation for domain in plan.domains):
        create_table_artifact(
            key=_key(run_id, "privacy-validation"),
            table=validation_rows(plan),
            description=f"{mark}Validation budgets: what releasing metrics of private sets may cost their units.",
        )
    if plan.shared_posts:
        create_table_artifact(
            key=_key(run_id, "privacy-shared-posts"),
            table=shared_rows(plan),
            description=f"{mark}Posts that several accounts hold: what such a post may lose in all.",
        )


def plan_rows(plan: StudyPlan) -> list[dict[str, Any]]:
    """One row per domain; every value was fixed before training."""
    return [
        {
            "domain": d.domain,
            "protected": "the whole client" if d.privacy_level == "client" else d.privacy_unit,
            "units": d.n_units,
            "sensitivity": d.sensitivity or "given outright",
            "epsilon budget": d.epsilon_budget,
            "delta": d.delta,
            "spent before": _short(d.epsilon_spent_before),
            "noise multiplier": _short(d.noise_multiplier),
            "noise in the last round": _short(d.noise_schedule[-1] if d.noise_schedule else d.noise_multiplier),
            "least noise": d.min_noise_multiplier,
            "clip norm": d.clip_norm,
            "planned epsilon (RDP)": _short(d.epsilon_planned_rdp),
            "planned epsilon (PRV)": _short(d.epsilon_planned_prv),
            "kept back (epsilon)": _short(d.reserve_epsilon),
            "run": f"{d.runs_before + 1} of {d.planned_runs}",
            "site policy": d.policy_sha256[:12],
            "refused": "; ".join(d.refusals),
            "warnings": "; ".join(d.warnings),
        }
        for d in plan.domains
    ]


def validation_rows(plan: StudyPlan) -> list[dict[str, Any]]:
    """One row per private gate or test set."""
    return [
        {
            "account": one.account,
            "units": one.n_units,
            "releases": one.releases,
            "noise in each metric (std)": _short(one.metric_std),
            "epsilon budget": one.epsilon_budget,
            "delta": one.delta,
            "spent before": _short(one.epsilon_spent_before),
            "planned epsilon (RDP)": _short(one.epsilon_planned),
            "refused": one.refusal,
        }
        for domain in plan.domains
        for one in domain.validation
    ]


def shared_rows(plan: StudyPlan) -> list[dict[str, Any]]:
    """One row per set of accounts with common posts."""
    return [
        {
            "accounts": ", ".join(one.accounts),
            "posts": one.n_posts,
            "epsilon spent together": _short(one.epsilon_spent),
            "epsilon budget together": one.epsilon_budget,
            "delta together": one.delta,
        }
        for one in plan.shared_posts
    ]


def round_artifacts(manifest: RoundManifest, *, private: bool) -> None:
    """Clients, gate verdict and noise decisions of a committed round."""
    summary = manifest.summary
    mark = "" if private else f"{NOT_PRIVATE}. "
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
        description=f"{mark}Clients of round {summary.round_index}.",
    )
    create_markdown_artifact(
        key=_key(manifest.run_id, "gate"), markdown=gate_markdown(summary), description=f"{mark}The gate's verdict."
    )


def gate_markdown(summary: RoundSummary) -> str:
    """The gate's verdict, and every noise decision with what the rule looked at."""
    lines = [f"- {result}" for result in summary.gate.results] or ["- no thresholds are configured"]
    decisions = [f"- {_decision(one)}" for one in summary.noise_decisions]
    decided = {one.domain for one in summary.noise_decisions}
    changes = [
        f"- {c.domain}: {c.from_:.4g} → {c.to:.4g} ({c.reason})"
        for c in summary.noise_changes
        if c.domain not in decided
    ]
    verdict = "passed" if summary.gate.passed else "did not pass"
    title = f"# Round {summary.round_index}: the gate {verdict}"
    return "\n".join([title, "", *lines, "", "## Noise", "", *(decisions + changes or ["- kept"])])


def _decision(one: NoiseDecision) -> str:
    moved = f"{one.noise_before:.4g} kept"
    if one.noise_after != one.noise_before:
        moved = f"{one.noise_before:.4g} → {one.noise_after:.4g}"
    looked_at = "no metric"
    if one.metric is not None and one.value is not None:
        kind = "noised" if one.value_noised else "public"
        against = "" if one.threshold is None else f" against {one.threshold:.4f}"
        looked_at = f"{one.metric} {one.value:.4f} ({kind}){against}"
    return f"{one.domain}: {moved}, rule {one.rule}, {looked_at} ({one.reason})"


def final_artifact(summary: StudySummary, report_path: str) -> None:
    """Headline numbers from the test set."""
    markdown = result_markdown(summary, report_path)
    create_markdown_artifact(key=_key(summary.run_id, "result"), markdown=markdown, description="The study's result.")


def result_markdown(summary: StudySummary, report_path: str) -> str:
    """The result; a study that was not private says so first."""
    rows = ["| metric | untrained | final |", "|---|---|---|"]
    if summary.final is not None:
        for name in ("bertscore_f1", "rouge_l", "label_f1", "safe_rate", "toxicity_mean"):
            before, after = getattr(summary.baseline, name), getattr(summary.final, name)
            rows.append(f"| {name} | {before:.4f} | {after:.4f} |")
    mark = [] if summary.private else [f"**{NOT_PRIVATE}**: privacy was off or the noise was seeded.", ""]
    return "\n".join(
        [f"# {summary.study}: {summary.status}", "", *mark, "From the test set, which no decision looked at.", ""]
        + [*rows, ""]
        + [f"- {warning}" for warning in summary.warnings]
        + [f"Report: `{report_path}`"]
    )


def _key(run_id: str, name: str) -> str:
    return f"{run_id}-{name}".replace("_", "-")


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
