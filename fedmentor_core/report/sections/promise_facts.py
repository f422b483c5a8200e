"""The facts of a domain's privacy account, each with one sentence that says what it means.

The sentences are for somebody who knows none of the field's words: a privacy officer, or whoever wrote a post.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fedmentor_core.config import StudyConfig
from fedmentor_core.privacy.ledger_view import LedgerView
from fedmentor_core.records import DomainPlan, StudySummary
from fedmentor_core.report import words

_DIGEST_CHARS = 12


@dataclass(frozen=True, slots=True)
class Fact:
    """A number, its name, and what it means in one sentence."""

    label: str
    value: str
    meaning: str


@dataclass(frozen=True, slots=True)
class FactGroup:
    """Facts under one heading."""

    title: str
    facts: tuple[Fact, ...]


@dataclass(frozen=True, slots=True)
class Spending:
    """Lifetime epsilon of one account.

    Attributes:
        before: when this run began.
        run_end: when its last round was over.
        total: by the ledger when the page was made, which also counts attempts that failed after their charge; by
            the run's own records where the ledger was not read.
    """

    before: float
    run_end: float
    total: float


def spending_of(plan: DomainPlan, summary: StudySummary, account: LedgerView | None) -> Spending:
    """What ``plan``'s domain has spent."""
    before = plan.epsilon_spent_before or 0.0
    known = [
        client.epsilon_spent
        for one in summary.rounds
        for client in one.clients
        if client.domain == plan.domain and client.epsilon_spent is not None
    ]
    run_end = known[-1] if known else before
    by_ledger = None if account is None else account.epsilon_spent
    return Spending(before, run_end, run_end if by_ledger is None else by_ledger)


def promised(plan: DomainPlan, config: StudyConfig) -> tuple[Fact, ...]:
    """Who is protected, by how much, and by which rules."""
    unit = protected(plan)
    if plan.privacy_level == "client":
        who = "The whole dataset of this client is protected as one: adding or removing all of it changes little."
    else:
        who = f"Adding or removing one {unit} changes little; somebody with several in the data is protected less."
    facts = [
        Fact("Who is protected", f"one {unit}", who),
        Fact(
            "Budget for life, ε (epsilon)",
            words.significant(plan.epsilon_budget),
            f"The most that all training runs together may reveal about one {unit}; smaller is more private.",
        ),
        Fact("Slack, δ (delta)", words.significant(plan.delta, 2), _delta_words(plan)),
        _derived(plan, config),
        Fact(
            "Clip norm",
            words.significant(plan.clip_norm),
            f"The most that one {unit} may weigh in one step; whatever is more is cut off.",
        ),
        Fact(
            "Site's least noise",
            words.significant(plan.min_noise_multiplier),
            "The site refuses to train with less noise than this, whoever asks.",
        ),
    ]
    if plan.policy_sha256:
        value = f"{plan.policy_sha256[:_DIGEST_CHARS]}…"
        meaning = "Fingerprint of the site's own rules: its ledger names the same, so rules changed later would show."
    else:
        value, meaning = "none of its own", "The site gave no policy file, so the study's settings were its rules."
    return (*facts, Fact("Site's policy", value, meaning))


def _derived(plan: DomainPlan, config: StudyConfig) -> Fact:
    level = plan.sensitivity
    if level is None:
        return Fact("Where ε comes from", "given outright", "Somebody chose this ε for the domain by hand.")
    if (level, plan.epsilon_budget) in config.privacy.epsilon_by_sensitivity.items():
        table = f"The study's rule gives data of {level} sensitivity ε = {words.significant(plan.epsilon_budget)}."
    else:
        table = f"The data was rated {level}; its ε was set apart from the study's rule for that rating."
    return Fact("Where ε comes from", f"sensitivity: {level}", table)


def _delta_words(plan: DomainPlan) -> str:
    if not plan.delta:
        return "The promise holds without exception."
    return f"The promise may fail with a chance of at most 1 in {words.significant(1 / plan.delta)}."


def planned(plan: DomainPlan) -> tuple[Fact, ...]:
    """The noise and what the schedule was to cost."""
    if plan.noise_multiplier is None:
        return (Fact("Training", "refused", "No noise was found at which the planned steps fit the budget."),)
    unit = protected(plan)
    facts = [
        Fact(
            "Noise at the start",
            words.significant(plan.noise_multiplier, 4),
            "Each step's noise is this many times as large as the most that one "
            f"{unit} can weigh; more is more private.",
        ),
        _schedule(plan),
    ]
    if plan.privacy_level == "unit":
        facts.append(
            Fact(
                "Steps",
                f"{plan.steps_per_round:,} × {words.count(plan.rounds, 'round')}",
                f"In each step every {unit} takes part with a chance of "
                f"{words.significant(100 * plan.sample_rate)} %, drawn anew; not being drawn is part of its cover.",
            )
        )
    planned = "What all of it would cost if the noise is never lowered, by the account that admits or refuses steps."
    if plan.epsilon_planned_prv is not None:
        planned += f" A tighter estimate (PRV) says {words.significant(plan.epsilon_planned_prv)} and decides nothing."
    facts.append(Fact("ε at the end", words.significant(plan.epsilon_planned_rdp), planned))
    if plan.reserve_epsilon is not None:
        kept = words.significant(plan.reserve_epsilon)
    else:
        kept = f"{100 * plan.reserve_fraction:.0f} % of the budget"
    facts.append(Fact("Kept back, in ε", kept, "A reserve to pay for lower noise where a domain learns too little."))
    return tuple(facts)


def _schedule(plan: DomainPlan) -> Fact:
    schedule = plan.noise_schedule
    rule = f"rule “{plan.rule}”" if plan.rule else "the rule"
    if len(set(schedule)) > 1:
        value = f"{words.significant(schedule[0], 4)} → {words.significant(schedule[-1], 4)}"
        return Fact("Noise by plan", value, f"From the first to the last round; fixed in advance by the {rule}.")
    may = "may lower it by what was released, never below what the budget carries"
    if plan.rule == "fixed":
        may = "never changes it"
    return Fact("Noise by plan", "constant", f"The same in every round, though the {rule} {may}.")


def spent_and_left(plan: DomainPlan, spending: Spending, account: LedgerView | None) -> tuple[Fact, ...]:
    """What is gone of the budget, and what the rest is good for."""
    budget, total = plan.epsilon_budget or 0.0, spending.total
    earlier = words.count(plan.runs_before, "earlier run") if plan.runs_before else "earlier runs"
    left = "For later runs. What is spent never comes back."
    if total > budget * (1 + 1e-9):
        left = "Nothing: MORE WAS SPENT THAN WAS PROMISED."
    added = words.significant(max(0.0, spending.run_end - spending.before))
    facts = [
        Fact("Spent before", words.significant(spending.before), f"By {earlier} on the same account."),
        Fact(
            "Spent in all",
            f"{words.significant(total)} of {words.significant(budget)}",
            f"{100 * total / budget:.0f} % of the budget; this run's rounds added {added}. "
            "Charged before anything left the site.",
        ),
        Fact("Left", words.significant(max(0.0, budget - total)), left),
    ]
    if plan.planned_runs > 1:
        facts.append(
            Fact(
                "Share of this run",
                f"run {plan.runs_before + 1} of {plan.planned_runs:,}",
                "The budget is to carry that many runs, so one run may use only its share of what is left.",
            )
        )
    tonight = None if account is None else account.tonight
    if tonight is not None and tonight.such_runs_left is not None:
        facts.append(
            Fact(
                "Enough for",
                words.count(tonight.such_runs_left, "more run"),
                "Like the last one, with the noise that it ended on.",
            )
        )
    return tuple(facts)


def kept(plan: DomainPlan, config: StudyConfig, accounts: Mapping[str, LedgerView] | None) -> tuple[Fact, ...]:
    """Where the account is, whether its chain holds, and for which data."""
    url = config.privacy.ledger_url
    where = Fact(
        "Ledger",
        words.hide_credentials(url) if url else "in this run's own store",
        "An account that outlives runs: later studies draw from the same budget."
        if url
        else "It counts only studies kept in this store; name privacy.ledger_url for an account that outlives it.",
    )
    fingerprint = Fact(
        "Data",
        f"{plan.n_units:,} units, {plan.dataset_fingerprint[:_DIGEST_CHARS]}…",
        "Fingerprint of the data; changed data goes on drawing from the same budget.",
    )
    if accounts is None:
        chain = Fact("Chain", "not read", "Check it at any time with fedmentor ledger.")
    elif plan.domain not in accounts:
        chain = Fact("Chain", "no entry", "Nothing was ever charged to this account.")
    elif not accounts[plan.domain].verified:
        broken = "Nothing can be said about what was spent, and nothing is trained until it is restored"
        chain = Fact("Chain", "✗ BROKEN", f"{broken}: {accounts[plan.domain].problem}")
    else:
        view = accounts[plan.domain]
        newest = str(view.entries[-1].get("sha256", "")) if view.entries else ""
        chain = Fact(
            "Chain",
            f"✓ verified: {words.count(len(view.entries), 'entry', 'entries')}, newest {newest[:_DIGEST_CHARS]}…",
            "Each entry holds the digest of the one before, so none can be changed, dropped or moved unnoticed.",
        )
    return where, chain, fingerprint


def protected(plan: DomainPlan) -> str:
    """What one privacy unit is called."""
    return "client's dataset" if plan.privacy_level == "client" else plan.privacy_unit
