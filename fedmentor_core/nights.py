"""A night of retraining: whether there is anything to do, what it did, and for how many more nights the budget lasts.

Nights draw on the same lifetime accounts (``privacy.planned_runs`` shares each of them out evenly), so that a night is
skipped where no domain has new units since the champion's data, and when the planned nights are used up.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from fedmentor_core.config import StudyConfig
from fedmentor_core.errors import ConfigError
from fedmentor_core.privacy.accountant import conversion_cost
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.records import SCHEMA_VERSION, DomainPlan, ModelSummary, Record, RoundSummary, StudyPlan

Outcome = Literal[
    "promoted", "held", "budget_exhausted", "failed", "nothing_new", "no_budget", "site_down", "abandoned"
]

_ROUNDING = 1e-6
_NO_LEDGER_HERE = ("invented", "site")
"""Sources without budgets to keep here: nobody's data, and data whose ledger is at its site."""
_MEANING: dict[Outcome, str] = {
    "promoted": "trained, and its adapter is the new champion",
    "held": "trained, and the champion stays",
    "budget_exhausted": "no client could train within its budget; the champion stays",
    "failed": "failed; the champion stays",
    "nothing_new": "skipped: nothing new to train on",
    "no_budget": "skipped: no budget for tonight",
    "site_down": "skipped: without every site no model could pass its gate",
    "abandoned": "given up: it was cut short, and could not be taken up again",
}


class DomainNight(Record):
    """A domain's part in a night. Every number is public: counts, and what the ledger says."""

    domain: str
    n_units: int
    new_data: bool = Field(description="Whether its units are others than those of the champion's training.")
    epsilon_budget: float | None = Field(description="Lifetime promise; None without privacy.")
    epsilon_before: float = Field(description="Spent before the night.")
    epsilon_spent: float = Field(description="Spent after it.")
    epsilon_limit: float | None = Field(description="Up to which tonight's share lets it go; None: it has none.")
    planned_nights_left: int = Field(description="Planned runs that have not charged yet.")
    nights_left: int | None = Field(
        description="More such nights that the rest of its budget carries, within the plan; None: it did not train."
    )
    refusal: str = ""


class NightReport(Record):
    """``night.json``, version 1."""

    schema_version: int = SCHEMA_VERSION
    night: str = Field(description="Its folder: date and number.")
    study: str
    outcome: Outcome
    reason: str
    resumed: bool = Field(default=False, description="A night that was cut short before, and taken up again.")
    run_id: str | None = None
    champion_before: str | None = Field(default=None, description="Version; None: there was none.")
    model: ModelSummary | None = Field(default=None, description="What the night registered.")
    domains: tuple[DomainNight, ...] = ()
    private: bool = True
    warnings: tuple[str, ...] = ()

    @property
    def trained(self) -> bool:
        """Whether anything was trained."""
        return self.outcome in ("promoted", "held")

    @property
    def nights_left(self) -> int | None:
        """Nights until the first domain can train no more; of a skipped night: as planned."""
        nights = [one.planned_nights_left if one.nights_left is None else one.nights_left for one in self.domains]
        return min(nights, default=None)

    def __str__(self) -> str:
        """One readable line."""
        left = "" if self.nights_left is None else f" Budget left for {self.nights_left} more nights."
        return f"Night {self.night} {_MEANING[self.outcome]} ({self.reason}).{left}"


def check_nightly(config: StudyConfig) -> None:
    """Refuse what cannot be repeated every night.

    Raises:
        ConfigError: no lifetime ledger for real data, no MLflow, or a gate that does not look at the champion.
    """
    if config.privacy.ledger_url is None and any(one.source.kind not in _NO_LEDGER_HERE for one in config.domains):
        raise ConfigError(
            "privacy.ledger_url is not set, and a nightly study on real data needs one place where its lifetime "
            "budgets are kept, apart from any night's folder. Give file:///path or s3://bucket/prefix."
        )
    if not config.tracking.enabled:
        raise ConfigError(
            "tracking.enabled is false, and nightly training needs MLflow's registry to find the champion. Set it to "
            "true."
        )
    if not config.compares_with_champion:
        raise ConfigError(
            "evaluation.thresholds compares nothing with the champion, so that a worse model could replace it at "
            "night. Add a line such as {metric: bertscore_f1, at_least: 0.99, relative_to: champion}."
        )


def domains_with_news(fingerprints: Mapping[str, str], champions: Mapping[str, str] | None) -> frozenset[str]:
    """Domains whose units are not those that the champion was trained on.

    Args:
        fingerprints: of each domain's data now.
        champions: of each domain's data when the champion was trained; None: there is no champion.
    """
    return frozenset(name for name, found in fingerprints.items() if (champions or {}).get(name) != found)


def why_not_tonight(
    plan: StudyPlan, news: frozenset[str], champion: str | None, config: StudyConfig
) -> tuple[Outcome, str] | None:
    """The reason to skip a night, or None.

    A candidate must be judged on every domain, and a domain at a site is judged only by a site that takes part. So
    where one site is down, or its budget is spent, the others' budget would be spent on a night that is lost.

    Args:
        plan: made of the lifetime ledgers, by the sites for their own domains.
        news: domains with new data.
        champion: its version.
        config: the study.
    """
    answered = {one.domain for one in plan.domains}
    absent = tuple(f"domain {one.name!r} takes no part" for one in config.domains if one.name not in answered)
    if absent:
        return "site_down", "; ".join(one.rstrip(".") for one in plan.warnings if one.startswith(absent))
    if not news:
        return "nothing_new", f"no domain has new units since the data of champion version {champion}"
    unjudged = [one.refusal for domain in plan.domains for one in domain.validation if one.refusal]
    if unjudged:
        return "no_budget", "; ".join(unjudged)
    at_sites = [one for one in plan.domains if config.domain(one.domain).site is not None]
    refused = [refusal for one in at_sites for refusal in one.refusals]
    if refused:
        return "no_budget", "; ".join(reason.rstrip(".") for reason in refused)
    open_tonight = [one for one in plan.domains if not one.refusals and not _planned_nights_are_over(one)]
    if open_tonight:
        return None
    reasons = [_over(one) if _planned_nights_are_over(one) else "; ".join(one.refusals) for one in plan.domains]
    return "no_budget", "; ".join(reason.rstrip(".") for reason in reasons)


def _planned_nights_are_over(plan: DomainPlan) -> bool:
    return plan.delta is not None and plan.runs_before >= plan.planned_runs


def _over(plan: DomainPlan) -> str:
    return (
        f"domain {plan.domain!r}: all {plan.planned_runs} planned runs have charged its budget "
        f"({plan.epsilon_spent_before or 0.0:.4g} of epsilon {plan.epsilon_budget:g} is spent); to share what is left "
        "among more nights, raise privacy.planned_runs"
    )


def domain_nights(
    plan: StudyPlan, news: frozenset[str], rounds: Sequence[RoundSummary] = ()
) -> tuple[DomainNight, ...]:
    """What each domain's account says of a night, from what was planned and what the clients said.

    Args:
        plan: the night's.
        news: domains with new data.
        rounds: the night's; none where it was skipped.
    """
    return tuple(_domain_night(domain, domain.domain in news, rounds) for domain in plan.domains)


def _domain_night(plan: DomainPlan, new_data: bool, rounds: Sequence[RoundSummary]) -> DomainNight:
    mine = [client for one in rounds for client in one.clients if client.domain == plan.domain]
    trained = any(client.status == "trained" for client in mine)
    before = plan.epsilon_spent_before or 0.0
    spent = max([before, *(client.epsilon_spent or 0.0 for client in mine)])
    planned_left = max(0, plan.planned_runs - plan.runs_before - trained)
    account = PrivacyAccount.of(plan)
    limit = None
    if account is not None and plan.run_rdp_budget is not None:
        limit = account.epsilon_spent(plan.run_rdp_budget)
    return DomainNight(
        domain=plan.domain,
        n_units=plan.n_units,
        new_data=new_data,
        epsilon_budget=plan.epsilon_budget,
        epsilon_before=before,
        epsilon_spent=spent,
        epsilon_limit=limit,
        planned_nights_left=planned_left,
        nights_left=_nights_left(plan, account, spent, planned_left) if trained else None,
        refusal="; ".join(plan.refusals),
    )


def _nights_left(plan: DomainPlan, account: PrivacyAccount | None, epsilon_spent: float, planned: int) -> int | None:
    """Nights of tonight's cost that the rest of the account carries, within those that are planned.

    Costs add up in RDP at the account's order, as epsilon does not.
    """
    if account is None:
        return None
    spent = epsilon_spent - conversion_cost(account.rdp_order, account.delta)
    cost = spent - plan.spent_rdp_before
    if cost <= 0:
        return None
    return min(planned, int((account.rdp_budget - spent) / cost * (1 + _ROUNDING)))
