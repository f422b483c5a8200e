"""The privacy plan: what each domain was promised and what the schedule will cost it, from public numbers alone."""

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from fedmentor_core.config import DomainConfig, StudyConfig
from fedmentor_core.data.sources import CorpusSource, HubSource, Source, TableSource
from fedmentor_core.errors import BudgetError, ConfigError
from fedmentor_core.privacy.accountant import epsilon_prv
from fedmentor_core.privacy.adaptation import settle
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.mechanism import charged_events
from fedmentor_core.privacy.rules import find_rule
from fedmentor_core.privacy.rules.base import NoiseRule, RunShare, Standing
from fedmentor_core.records import DomainPlan, PrivacySpend, ReductionCost

_MAX_PRV_GROUPS = 12
_MAX_REDUCTIONS = 50


def default_delta(n_units: int) -> float:
    """min(1e-5, 1 / (10 N)): well below one over the number of units."""
    return min(1e-5, 1.0 / (10 * n_units))


def privacy_unit(source: Source) -> str:
    """What one unit of a source is: 'post', or the column that names the units."""
    if isinstance(source, TableSource | HubSource):
        return source.columns.unit or "post"
    if isinstance(source, CorpusSource) and source.human_labels is not False:
        from fedmentor_core.data.corpora import CORPORA

        return CORPORA[source.kind].unit_column or "post"
    return "post"


def plan_domain(
    config: StudyConfig,
    domain: DomainConfig,
    *,
    n_units: int,
    dataset_fingerprint: str,
    bytes_up: int,
    bytes_down: int,
    bytes_down_first: int | None = None,
    account_in_force: PrivacyAccount | None = None,
    spent_rdp: float = 0.0,
    runs_before: int = 0,
    with_prv: bool = True,
) -> DomainPlan:
    """Plan one domain's whole schedule.

    The lifetime budget left is shared evenly among the runs that are still planned, and this run stays within its
    share. The noise follows by calibration: the configured rule plans the least noise at which all rounds fit the
    share, less the reserve where the rule keeps one; never below the site's floor.

    Args:
        config: the study.
        domain: the domain.
        n_units: training units N (public).
        dataset_fingerprint: what the ledger is kept for.
        bytes_up: size of one update.
        bytes_down: what a client reads of a global adapter, in a round after the first.
        bytes_down_first: what it reads in the first round.
        account_in_force: the lifetime promise, where the ledger already holds one.
        spent_rdp: what the ledger says is gone.
        runs_before: other runs that have charged the account.
        with_prv: also compute the PRV diagnostic (about a second).

    Raises:
        ConfigError: fewer units than an expected batch, a delta that is not below 1/N, or a rule whose schedule breaks
            its contract.
    """
    training, privacy = config.training, config.privacy
    if n_units < training.batch_size:
        raise ConfigError(
            f"domain {domain.name!r} has {n_units} training units, fewer than training.batch_size "
            f"{training.batch_size}. Lower training.batch_size to {n_units} or less, or give the domain more data."
        )
    sample_rate = training.batch_size / n_units
    rule = find_rule(config.adaptation.rule)
    reserve = privacy.reserve_fraction if rule.keeps_reserve else 0.0
    base: dict[str, Any] = {
        "domain": domain.name,
        "n_units": n_units,
        "sample_rate": sample_rate,
        "steps_per_round": training.steps_per_round,
        "rounds": config.rounds,
        "clip_norm": config.clip_norm_of(domain),
        "sensitivity": domain.sensitivity,
        "min_noise_multiplier": domain.min_noise_multiplier,
        "reserve_fraction": reserve,
        "rule": rule.name,
        "planned_runs": privacy.planned_runs,
        "runs_before": runs_before,
        "privacy_level": privacy.level,
        "privacy_unit": privacy_unit(domain.source),
        "dataset_fingerprint": dataset_fingerprint,
        "bytes_up_per_round": bytes_up,
        "bytes_down_per_round": bytes_down,
        "bytes_down_first_round": bytes_down_first,
    }
    unaccounted = {
        "noise_multiplier": None,
        "delta": None,
        "epsilon_budget": None,
        "epsilon_planned_rdp": None,
        "epsilon_planned_prv": None,
        "rdp_order": None,
        "rdp_budget": None,
    }
    if privacy.mode == "none":
        return DomainPlan.model_validate({**base, **unaccounted})

    epsilon = config.epsilon_of(domain)
    delta = domain.delta if domain.delta is not None else default_delta(n_units)
    if account_in_force is not None and domain.delta is None:
        delta = account_in_force.delta  # the promise was made for life
    if delta >= 1.0 / n_units:
        raise ConfigError(
            f"domain {domain.name!r}: delta {delta:g} must be below 1/N = {1 / n_units:.3g} (N = {n_units} training "
            "units); a larger one would allow giving away whole posts. Lower delta or leave it out."
        )
    spent_before = account_in_force.epsilon_spent(spent_rdp) if account_in_force else 0.0
    refused = {**base, **unaccounted, "delta": delta, "epsilon_budget": epsilon, "epsilon_spent_before": spent_before}
    if account_in_force is not None and (account_in_force.epsilon, account_in_force.delta) != (epsilon, delta):
        refusal = (
            f"domain {domain.name!r}: was promised epsilon {account_in_force.epsilon:g} at delta "
            f"{account_in_force.delta:g} for its lifetime, and this study asks for epsilon {epsilon:g} at delta "
            f"{delta:g}. Set the domain's epsilon and delta to the promise."
        )
        return DomainPlan.model_validate({**refused, "refusals": (refusal,)})
    events = charged_events(privacy.level, sample_rate, training.steps_per_round)
    runs_left = max(1, privacy.planned_runs - runs_before)
    try:
        account = account_in_force or PrivacyAccount.open(
            epsilon, delta, events.sample_rate, events.steps * config.rounds * privacy.planned_runs
        )
        share = RunShare(
            rdp_order=account.rdp_order,
            rdp_limit=spent_rdp + (account.rdp_budget - spent_rdp) / runs_left,
            sample_rate=events.sample_rate,
            events_per_round=events.steps,
            floor=domain.min_noise_multiplier,
        )
        schedule = _schedule(config, rule, share, (1 - reserve) * share.left(spent_rdp), spent_rdp)
    except BudgetError as error:
        steps = "one release" if privacy.level == "client" else f"{training.steps_per_round} steps"
        refusal = (
            f"domain {domain.name!r}: budget epsilon {epsilon:g} at delta {delta:g} is too small for {config.rounds} "
            f"rounds of {steps} at sample rate {events.sample_rate:.4g}"
            + (f" in one of {runs_left} more runs" if runs_left > 1 else "")
            + (" after what earlier runs spent" if spent_rdp else "")
            + f" ({str(error).rstrip('.')}). "
            + ("Lower" if account_in_force else "Raise the domain's epsilon, or lower")
            + (" privacy.planned_runs," if runs_left > 1 else "")
            + (" rounds." if privacy.level == "client" else " rounds, steps_per_round or batch_size.")
        )
        return DomainPlan.model_validate({**refused, "refusals": (refusal,)})
    epsilon_planned = account.epsilon_spent(spent_rdp + share.cost(schedule))
    return DomainPlan.model_validate(
        {
            **base,
            "noise_multiplier": schedule[0],
            "noise_schedule": schedule,
            "delta": delta,
            "epsilon_budget": epsilon,
            "epsilon_spent_before": account.epsilon_spent(spent_rdp),
            "epsilon_planned_rdp": epsilon_planned,
            "epsilon_planned_prv": _epsilon_prv(share, schedule, delta) if with_prv else None,
            "reserve_epsilon": max(0.0, account.epsilon_spent(share.rdp_limit) - epsilon_planned),
            "reductions": _reductions(config, rule, share, schedule, account, spent_rdp),
            "rdp_order": account.rdp_order,
            "rdp_budget": account.rdp_budget,
            "spent_rdp_before": spent_rdp,
            "run_rdp_budget": share.rdp_limit,
        }
    )


def _schedule(config: StudyConfig, rule: NoiseRule, share: RunShare, rdp: float, spent_rdp: float) -> tuple[float, ...]:
    """The rule's plan, held to its contract.

    Raises:
        BudgetError: the rounds do not fit, or only under more noise than the configuration allows.
        ConfigError: the rule planned what it must not.
    """
    schedule = tuple(rule.plan(config.adaptation, share, rdp, config.rounds))
    sound = (
        len(schedule) == config.rounds
        and all(share.floor <= noise < math.inf for noise in schedule)
        and all(later <= earlier for earlier, later in pairwise(schedule))
    )
    if not sound:
        raise ConfigError(
            f"noise rule {rule.name!r} planned {len(schedule)} rounds for {config.rounds}, or a noise multiplier that "
            f"rises or is below the site's floor {share.floor:g}. Use another adaptation.rule, or mend this one."
        )
    most = config.privacy.max_noise_multiplier
    if schedule[0] > most:
        raise BudgetError(
            f"the planned rounds need noise multiplier {schedule[0]:.3g}, above privacy.max_noise_multiplier {most:g}: "
            "the update would be noise"
        )
    if spent_rdp + share.cost(schedule) > share.rdp_limit:
        raise BudgetError(f"the noise that rule {rule.name!r} planned, or the site's floor, costs more than there is")
    return schedule


def _epsilon_prv(share: RunShare, schedule: Sequence[float], delta: float) -> float:
    """PRV epsilon of the schedule alone.

    Its time grows with the number of different noise multipliers, so a long schedule is cut into groups of rounds at
    the least noise of each, which can only overstate what it costs.
    """
    size = 1 if len(set(schedule)) <= _MAX_PRV_GROUPS else math.ceil(len(schedule) / _MAX_PRV_GROUPS)
    steps: Counter[float] = Counter()
    for start in range(0, len(schedule), size):
        group = schedule[start : start + size]
        steps[min(group)] += len(group) * share.events_per_round
    history = [
        PrivacySpend(noise_multiplier=noise, sample_rate=share.sample_rate, steps=count)
        for noise, count in steps.items()
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus takes log(1 - sample_rate), and says so where the rate is 1
        return epsilon_prv(history, delta)


def _reductions(
    config: StudyConfig,
    rule: NoiseRule,
    share: RunShare,
    schedule: tuple[float, ...],
    account: PrivacyAccount,
    spent_rdp: float,
) -> tuple[ReductionCost, ...]:
    """Play the rule with utility below its threshold after every round, and price each reduction it makes."""
    if not rule.watches_utility:
        return ()
    planned = account.epsilon_spent(spent_rdp + share.cost(schedule))
    settings = config.adaptation
    found: list[ReductionCost] = []
    noise, below = schedule[0], 0
    for round_index in range(min(_MAX_REDUCTIONS, len(schedule) - 1)):
        spent_rdp += share.cost([noise])
        below += 1
        rounds_left = len(schedule) - round_index - 1
        least = share.affordable(spent_rdp, noise, rounds_left, config.privacy.max_noise_multiplier)
        if least is None:
            break
        standing = Standing(
            noise_multiplier=noise,
            planned=schedule,
            rounds_left=rounds_left,
            spent_rdp=spent_rdp,
            least_noise=least,
            utility=settings.threshold - 1.0,
            threshold=settings.threshold,
            rounds_below=below,
        )
        settled = settle(settings, rule, share, standing)
        noise = settled.noise_multiplier
        if settled.answers_utility:
            below = 0
            epsilon = account.epsilon_spent(spent_rdp + rounds_left * share.cost([noise]))
            found.append(
                ReductionCost(
                    after_round=round_index,
                    noise_multiplier=noise,
                    epsilon_at_end=epsilon,
                    epsilon_extra=max(0.0, epsilon - planned),
                    limited_by=settled.limited_by,
                )
            )
    return tuple(found)
