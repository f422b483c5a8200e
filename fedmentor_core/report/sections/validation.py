"""Validation budgets of private gate and test sets, and posts that several accounts hold."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedmentor_core.privacy.ledger_view import LedgerView
from fedmentor_core.records import SharedPosts, StudyPlan, ValidationPlan
from fedmentor_core.report import words

VALIDATION_COLUMNS = (
    "units", "releases planned", "noise in each metric", "ε spent before", "ε planned", "ε spent now", "ε budget", "δ",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ValidationLine:
    """One private set's budget."""

    account: str
    what: str
    cells: tuple[str, ...]
    refusal: str


@dataclass(frozen=True, slots=True)
class SharedLine:
    """Accounts that hold the same posts."""

    accounts: str
    n_posts: int
    spent: str
    spent_when: str
    budget: str
    delta: str
    meaning: str


def validation_lines(plan: StudyPlan, accounts: Mapping[str, LedgerView] | None) -> list[ValidationLine]:
    """Every private gate and test set; empty where they are public."""
    return [_validation(one, accounts) for domain in plan.domains for one in domain.validation]


def shared_lines(plan: StudyPlan, accounts: Mapping[str, LedgerView] | None) -> list[SharedLine]:
    """Every group of accounts that share posts; spent by the ledgers where all were read, else when planned."""
    return [_shared(one, accounts or {}) for one in plan.shared_posts]


def _validation(one: ValidationPlan, accounts: Mapping[str, LedgerView] | None) -> ValidationLine:
    state = None if accounts is None else accounts.get(one.account)
    return ValidationLine(
        account=one.account,
        what="steers noise and promotion" if one.split == "gate" else "steers nothing; gives the final figures",
        cells=(
            f"{one.n_units:,}",
            f"{one.releases:,}",
            words.NONE if one.metric_std is None else f"± {words.significant(one.metric_std, 2)}",
            words.significant(one.epsilon_spent_before),
            words.significant(one.epsilon_planned),
            words.NONE if state is None else words.significant(state.epsilon_spent),
            words.significant(one.epsilon_budget),
            words.significant(one.delta, 2),
        ),
        refusal=one.refusal,
    )


def _shared(one: SharedPosts, accounts: Mapping[str, LedgerView]) -> SharedLine:
    names = words.join_and(list(one.accounts))
    known = [view.epsilon_spent for name in one.accounts if (view := accounts.get(name)) is not None]
    now = [spent for spent in known if spent is not None]
    by_ledger = len(now) == len(one.accounts)
    return SharedLine(
        accounts=names,
        n_posts=one.n_posts,
        spent=words.significant(sum(now) if by_ledger else one.epsilon_spent),
        spent_when="" if by_ledger else "when planned",
        budget=words.significant(one.epsilon_budget),
        delta=words.significant(one.delta, 2),
        meaning=f"{words.count(one.n_posts, 'post is', 'posts are')} in {names}: somebody whose post is in all of them "
        f"loses from all of them, up to ε {words.significant(one.epsilon_budget)} together.",
    )
