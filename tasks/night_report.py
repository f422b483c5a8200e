"""A night's report as a Prefect artifact: short, public numbers only."""

from prefect.artifacts import create_markdown_artifact

from fedmentor_core.nights import DomainNight, NightReport
from fedmentor_core.report.words import NOT_PRIVATE


def night_artifact(report: NightReport) -> None:
    """Publish a night's report; one key for all nights of a study, so that the UI shows their history."""
    create_markdown_artifact(
        key=f"{report.study}-nightly".replace("_", "-"),
        markdown=night_markdown(report),
        description="What the last night did, and how long the budget lasts.",
    )


def night_markdown(report: NightReport) -> str:
    """The report: what happened and why, the champion, and every domain's budget."""
    lines = [f"# Night {report.night}: {report.outcome.replace('_', ' ')}", ""]
    if not report.private:
        lines += [f"**{NOT_PRIVATE}**: privacy was off or the noise was seeded.", ""]
    lines += [str(report), "", f"- champion before: {_version(report.champion_before)}"]
    if report.model is not None:
        aliases = ", ".join(report.model.aliases) or "no alias"
        lines.append(f"- registered: {report.model.name} version {report.model.version} ({aliases})")
    if report.resumed:
        lines.append("- this night was cut short before, and taken up again")
    lines += [f"- {warning}" for warning in report.warnings]
    lines += [
        "",
        "| domain | units | new data | ε before | ε after | ε tonight up to | ε budget | nights left | planned |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(one) for one in report.domains),
        "",
        "Nights left: how many more nights like this one the domain's budget carries, within the plan. Planned: runs "
        "of `privacy.planned_runs` that have not charged yet. Much of ε is the fixed price of turning a sum of Rényi "
        "divergences into ε, paid with the first night; the nights after it add little each.",
    ]
    return "\n".join(lines)


def _row(one: DomainNight) -> str:
    cells = (
        one.domain, str(one.n_units), "yes" if one.new_data else "no", f"{one.epsilon_before:.4g}",
        f"{one.epsilon_spent:.4g}", _number(one.epsilon_limit), _number(one.epsilon_budget),
        "as planned" if one.nights_left is None else str(one.nights_left), str(one.planned_nights_left),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _version(version: str | None) -> str:
    return "none" if version is None else f"version {version}"
