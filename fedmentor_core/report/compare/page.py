"""A comparison as one HTML file that needs nothing else and asks nothing of the network."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedmentor_core.compare.records import CellResult, ComparisonTable
from fedmentor_core.report import words
from fedmentor_core.report.compare import by_domain, by_round, cost, frontier, identity, outputs
from fedmentor_core.report.compare.arms import Arms, by_arm, domains_of, number_of_seeds, seeds_of
from fedmentor_core.report.compare.claims import Claim, claims
from fedmentor_core.report.compare.table import score_tables
from fedmentor_core.report.html import template


def render_comparison(table: ComparisonTable, cells: Sequence[CellResult]) -> str:
    """The report of a comparison.

    Args:
        table: ``table.json``.
        cells: the finished cells behind it, those of the frontier included. Their samples are shown as they are:
            a cell must hold none of a private gate set (its record says so).

    Guarantees:
        Equal arguments give equal bytes. The page loads nothing and runs no script: its content policy forbids both,
        and every text, outputs of models above all, is escaped.
    """
    arms = Arms.of(table, cells)
    own = by_arm(arms, cells)
    headline, further = score_tables(table)
    domains, seed = domains_of(table, cells), outputs.seed_shown(own)
    return template("compare/page.html.j2").render(
        table=table,
        lead=_lead(table, domains),
        facts=_facts(table, cells),
        claims=_by_arm(claims(table, own)),
        directions=words.METRIC,
        headline=headline,
        further=further,
        frontier_figures=frontier.figures(table, arms),
        frontier_legend=arms.legend([point.arm for point in table.frontier]),
        frontier_infos=frontier.shown_metrics(table),
        frontier_rows=frontier.rows(table, arms),
        round_figures=by_round.score_figures(arms, own),
        round_legend=arms.legend(by_round.arms_with_rounds(own)),
        round_infos=[words.METRIC[key] for key in by_round.METRICS],
        round_rows=by_round.score_rows(own),
        by_domain=by_domain.metrics_by_domain(table, arms, domains),
        noise_figures=by_round.noise_figures(arms, own),
        noise_legend=arms.legend(by_round.noisy_arms(own)),
        cost_figures=cost.figures(table, arms),
        seed=seed,
        prompts=outputs.prompts(own, seed),
        failures=_failures(table),
        warnings=table.warnings,
        identities=identity.identities(table),
        command=words.hide_credentials(table.command),
    )


def _by_arm(found: Sequence[Claim]) -> list[tuple[str, list[Claim]]]:
    return [(name, [one for one in found if one.about == name]) for name in dict.fromkeys(one.about for one in found)]


@dataclass(frozen=True, slots=True)
class FailureRow:
    """One cell that could not be finished."""

    arm: str
    seed: int
    epsilon: str
    reason: str


def _lead(table: ComparisonTable, domains: Sequence[str]) -> str:
    seeds = seeds_of(table)
    if not table.arms:
        return "No arm finished, so there is nothing to compare yet."
    where = f" on {words.join_and(list(domains))}" if domains else ""
    drawn = f", each over {number_of_seeds(len(seeds))}" if len({len(arm.seeds) for arm in table.arms}) == 1 else ""
    return (
        f"{words.count(len(table.arms), 'way')} of training compared{where}{drawn}: the same backbone, posts, splits, "
        "steps and scorers for all. Scores are from the test set, which no decision looked at."
    )


def _facts(table: ComparisonTable, cells: Sequence[CellResult]) -> list[tuple[str, str, str]]:
    seeds = seeds_of(table)
    finished = f"{len(table.failures)} failed" if table.failures else "all finished"
    facts = [
        ("Arms", str(len(table.arms)), f"{sum(arm.private for arm in table.arms)} with privacy"),
        ("Seeds", str(len(seeds)), ", ".join(map(str, seeds[:8])) + ("…" if len(seeds) > 8 else "")),
        ("Cells", str(len(cells)), finished),
    ]
    budgets = {point.epsilon for point in table.frontier}
    if budgets:
        facts.append(("Budgets on the frontier", str(len(budgets)), "infinity included" if None in budgets else ""))
    return [*facts, ("Time of all cells", words.show_seconds(table.seconds_total), "as if none had been reused")]


def _failures(table: ComparisonTable) -> list[FailureRow]:
    return [
        FailureRow(one.arm, one.seed, "" if one.epsilon is None else frontier.show_epsilon(one.epsilon), one.reason)
        for one in table.failures
    ]
