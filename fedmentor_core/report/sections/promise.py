"""The privacy account of each domain, top to bottom: promised, planned, spent, left, and by which ledger.

Every number comes with one sentence that says what it means to somebody who knows none of the field's words.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fedmentor_core.config import StudyConfig
from fedmentor_core.privacy.ledger_view import LedgerView
from fedmentor_core.records import DomainPlan, StudySummary
from fedmentor_core.report import words
from fedmentor_core.report.sections.promise_facts import (
    FactGroup,
    Spending,
    kept,
    planned,
    promised,
    protected,
    spending_of,
    spent_and_left,
)


@dataclass(frozen=True, slots=True)
class PromiseCard:
    """One domain's account, to unfold."""

    domain: str
    digest: str
    sentence: str
    groups: tuple[FactGroup, ...]
    refusals: tuple[str, ...]
    warnings: tuple[str, ...]
    is_open: bool


def promise_cards(
    summary: StudySummary, config: StudyConfig, accounts: Mapping[str, LedgerView] | None, *, private: bool
) -> list[PromiseCard]:
    """Every domain's account; unfolded are the first, and all that hold a warning.

    Args:
        summary: the study.
        config: its settings, for how a budget was derived and where the ledger is.
        accounts: what the ledgers said, by name; None where they were not read for this report.
        private: the verdict on the whole study; without it no sentence promises anything.
    """
    return [
        _card(plan, summary, config, accounts, private, is_open=k == 0) for k, plan in enumerate(summary.plan.domains)
    ]


def _card(
    plan: DomainPlan,
    summary: StudySummary,
    config: StudyConfig,
    accounts: Mapping[str, LedgerView] | None,
    private: bool,
    *,
    is_open: bool,
) -> PromiseCard:
    account = None if accounts is None else accounts.get(plan.domain)
    spending = spending_of(plan, summary, account)
    return PromiseCard(
        domain=plan.domain,
        digest=_digest(plan, spending),
        sentence=_sentence(plan, private),
        groups=()
        if plan.epsilon_budget is None
        else (
            FactGroup("What was promised", promised(plan, config)),
            FactGroup("What was planned", planned(plan)),
            FactGroup("What was spent, and what is left", spent_and_left(plan, spending, account)),
            FactGroup("Who keeps the account", kept(plan, config, accounts)),
        ),
        refusals=plan.refusals,
        warnings=plan.warnings,
        is_open=is_open or bool(plan.refusals or plan.warnings),
    )


def _digest(plan: DomainPlan, spending: Spending) -> str:
    if plan.epsilon_budget is None:
        return "no privacy"
    left = max(0.0, plan.epsilon_budget - spending.total)
    return (
        f"promised ε {words.significant(plan.epsilon_budget)} · spent {words.significant(spending.total)} · "
        f"left {words.significant(left)}"
    )


def _sentence(plan: DomainPlan, private: bool) -> str:
    if plan.epsilon_budget is None:
        return "No privacy was planned here: the updates carry no noise and nothing is promised."
    if not private:
        return (
            "This study was NOT PRIVATE, so nothing is promised. The figures say what the account would have promised "
            "had every condition been kept."
        )
    return (
        "Any conclusion that anyone draws from what this domain released for training is "
        f"{words.promise(plan.epsilon_budget, plan.delta, protected(plan))}."
    )
