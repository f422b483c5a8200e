"""The report's privacy figures: epsilon planned and spent, budgets used up, noise by round."""

from itertools import pairwise

from fedmentor_core.privacy.accountant import rdp_cap
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.mechanism import charged_events
from fedmentor_core.records import DomainPlan, StudySummary
from fedmentor_core.report import words
from fedmentor_core.report.budget_chart import BudgetPath, Values, budget_chart, key
from fedmentor_core.report.plots import (
    Figure,
    LegendItem,
    client_values,
    domain_order,
    first_and_last,
    round_labels,
)
from fedmentor_core.report.svg import BudgetRow, Series, budget_bars, line_chart


def noise_figure(summary: StudySummary) -> Figure:
    """Noise multiplier of each domain in each round; a ring marks a change."""
    lines = []
    for slot, domain in enumerate(domain_order(summary)):
        values = client_values(summary, domain, lambda client: client.noise_multiplier)
        known = [(i, value) for i, value in enumerate(values) if value is not None]
        changed = {i for (_, before), (i, value) in pairwise(known) if value != before}
        lines.append(Series(domain, tuple(values), slot, frozenset(changed)))
    changes = sum(len(line.rings) for line in lines)
    note = "More noise is more private. " + (
        "A ring marks a round whose noise differs from the round before." if changes else "It never changed."
    )
    alt = "Noise multiplier by round. " + first_and_last(lines, words.significant)
    svg = line_chart(lines, round_labels(summary), alt=alt, show=words.significant, least_span=0.2)
    return Figure("Noise multiplier", note if svg else "No noise was added.", svg)


def epsilon_figure(summary: StudySummary) -> Figure:
    """Epsilon spent against budget, by domain, each round a segment."""
    rows = []
    offset = words.round_offset(summary)
    before_by_domain = {plan.domain: plan.epsilon_spent_before or 0.0 for plan in summary.plan.domains}
    for slot, domain in enumerate(domain_order(summary)):
        clients = [(one.round_index, c) for one in summary.rounds for c in one.clients if c.domain == domain]
        budget = next((c.epsilon_budget for _, c in clients if c.epsilon_budget is not None), None)
        spent = [(index, c.epsilon_spent) for index, c in clients if c.epsilon_spent is not None]
        if budget is None or not spent:
            continue
        level = before_by_domain.get(domain, 0.0)
        parts = [("before this study", level)] if level > 0 else []
        for index, total in spent:
            if total > level:
                parts.append((f"round {index + offset}", total - level))
                level = total
        note = f"{words.significant(level)} of {words.significant(budget)} ({100 * level / budget:.0f} %)"
        rows.append(BudgetRow(domain, slot, budget, tuple(parts), note))
    alt = "Epsilon spent of budget. " + "; ".join(f"{row.name}: {row.note}" for row in rows)
    svg = budget_bars(rows, alt=alt, show=words.significant)
    note = "The whole bar is the lifetime budget; each filled segment is one round's cost."
    return Figure("Privacy budget spent (epsilon)", note if svg else "No budget was spent.", svg)


def plan_figures(summary: StudySummary) -> list[Figure]:
    """For each domain that was promised a budget: epsilon by round, planned against spent."""
    order = domain_order(summary)
    figures = []
    for plan in summary.plan.domains:
        path = budget_path(summary, plan, order.index(plan.domain))
        if path is None:
            continue
        told = _told(path)
        alt = f"Lifetime epsilon of {plan.domain} by round. {told}"
        figures.append(Figure(plan.domain, told, budget_chart(path, alt=alt, show=lambda v: words.significant(v, 4))))
    return figures


def plan_legend(summary: StudySummary) -> list[LegendItem]:
    """What the lines of ``plan_figures`` are; only those that occur."""
    found = [path for plan in summary.plan.domains if (path := budget_path(summary, plan, 0)) is not None]
    items = [
        ("spent", "really spent", True),
        ("planned", "planned", True),
        ("lowered", "if the noise were lowered at every chance", any(path.lowered for path in found)),
        ("reserve", "kept back to pay for lower noise", True),
        ("share", "what this run may reach", any(path.share is not None for path in found)),
        ("budget", "lifetime budget", True),
    ]
    return [LegendItem(name, key(kind)) for kind, name, shown in items if shown and found]


def budget_path(summary: StudySummary, plan: DomainPlan, slot: int) -> BudgetPath | None:
    """What ``plan``'s domain was to spend and spent; None where nothing was promised or the plan was refused.

    The planned lines come from the account's own arithmetic (RDP at its fixed order), never from PRV.
    """
    account = PrivacyAccount.of(plan)
    if account is None or plan.noise_multiplier is None or not plan.rounds:
        return None
    schedule = plan.noise_schedule or (plan.noise_multiplier,) * plan.rounds
    before = plan.epsilon_spent_before or 0.0
    share = None
    if plan.run_rdp_budget is not None and plan.run_rdp_budget < account.rdp_budget * (1 - 1e-6):
        share = account.epsilon_spent(plan.run_rdp_budget)
    return BudgetPath(
        name=plan.domain,
        slot=slot,
        budget=account.epsilon,
        planned=_epsilons(account, plan, schedule, before),
        spent=_spent(summary, plan.domain, before),
        lowered=_epsilons(account, plan, _lowered(plan, schedule), before) if plan.reductions else (),
        share=share,
    )


def _epsilons(account: PrivacyAccount, plan: DomainPlan, schedule: tuple[float, ...], before: float) -> Values:
    """Lifetime epsilon before the run and after each round of ``schedule``."""
    sample_rate, steps = charged_events(plan.privacy_level, plan.sample_rate, plan.steps_per_round)
    rdp = rdp_cap(before, account.delta, account.rdp_order) if before > 0 else 0.0
    found = [before]
    for noise in schedule:
        rdp += account.charge_of(noise, sample_rate, steps)
        found.append(account.epsilon_spent(rdp))
    return tuple(found)


def _lowered(plan: DomainPlan, schedule: tuple[float, ...]) -> tuple[float, ...]:
    """The noise of each round when every planned reduction is taken as soon as it may be."""
    found = []
    for k, noise in enumerate(schedule):
        taken = [one.noise_multiplier for one in plan.reductions if one.after_round < k]
        found.append(min([noise, *taken]))
    return tuple(found)


def _spent(summary: StudySummary, domain: str, before: float) -> Values:
    offset = words.round_offset(summary)
    last = max((one.round_index + offset for one in summary.rounds), default=0)
    found: list[float | None] = [before, *[None] * last]
    level = before
    for one in summary.rounds:
        for client in one.clients:
            if client.domain == domain and client.epsilon_spent is not None:
                level = client.epsilon_spent
        found[one.round_index + offset] = level
    return tuple(found)


def _told(path: BudgetPath) -> str:
    end, spent = path.planned[-1], next((v for v in reversed(path.spent) if v is not None), None)
    parts = [f"Planned to end at ε {words.significant(end)}"]
    if path.lowered:
        parts.append(f"at {words.significant(path.lowered[-1])} if lowered at every chance")
    if len(path.spent) > 1:
        parts.append(f"spent {words.significant(spent)}")
    if path.share is not None:
        parts.append(f"this run may reach {words.significant(path.share)}")
    return f"{', '.join(parts)}, of a lifetime budget of {words.significant(path.budget)}."
