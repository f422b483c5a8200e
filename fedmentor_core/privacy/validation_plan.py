"""The validation budget: what releasing metrics of private gate and test sets may cost their units.

Each private set has a ledger account of its own, ``<domain>.<split>`` (a dot is in no domain's name), apart from the
training account: the units of gate, test and training are disjoint, so a unit's loss is that of its own account alone.
Every release is one step of the Gaussian mechanism at sample rate 1 (``release.py``); which units of a large set are
evaluated is public and buys no amplification.

A run plans ``rounds + 1`` releases of a gate set (untrained, and each round's candidate; one more where the gate
compares with the champion) and two of a test set (untrained and final), all with the noise at which they fit the run's
share of the lifetime budget. A release that died after its charge is charged again; later ones then get noisier instead
of failing, for which a small spare is kept. The filter theorem (``filter.py``) allows that choice, because it looks at
the ledger only.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from fedmentor_core.config import DomainConfig, StudyConfig
from fedmentor_core.data.units import SPLITS, fingerprint
from fedmentor_core.errors import BudgetError, ConfigError, DataError
from fedmentor_core.evaluation.private_metrics import N_SCORES
from fedmentor_core.privacy.accountant import calibrate_at_order
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.ledger import Ledger, Terms
from fedmentor_core.privacy.plan import default_delta
from fedmentor_core.privacy.release import std_of_mean
from fedmentor_core.records import DomainPlan, ValidationPlan

if TYPE_CHECKING:
    from fedmentor_core.data.loading import DomainData

SetName = Literal["gate", "test"]
SETS: tuple[SetName, ...] = ("gate", "test")
COARSE_METRIC_STD = 0.1
"""Noise in a mean above which the plan warns: no useful threshold can be seen through it."""

_SPARE_RELEASES = 0.25  # kept for retries: costs 1 to 6 % more noise
_MOST_NOISE_GROWTH = 4.0  # a metric noisier than this times the plan is no ground for a decision


def account_name(domain: str, split: SetName) -> str:
    """Name of a private set's ledger."""
    return f"{domain}.{split}"


def planned_releases(split: SetName, rounds: int, *, champion: bool = False) -> int:
    """Releases of one set in an undisturbed run; the champion, where it is compared with, is one of the gate set."""
    return rounds + 1 + champion if split == "gate" else 2


def chosen_units(units: Iterable[str], at_most: int, *, split_seed: int, account: str) -> frozenset[str]:
    """Which units of a set are evaluated: the ``at_most`` smallest by a public hash.

    Each unit's place is its own, so that replacing one unit of the set replaces at most one of the chosen ones, as the
    sensitivity assumes. (Drawing positions in a list would move many.)
    """

    def place(unit: str) -> bytes:
        return hashlib.sha256(f"evaluate\0{split_seed}\0{account}\0{unit}".encode()).digest()

    return frozenset(sorted(set(units), key=place)[:at_most])


def evaluated_units(config: StudyConfig, domain: str, split: SetName, data: "DomainData") -> frozenset[str]:
    """The units of a private set that this study evaluates."""
    evaluation = config.evaluation
    return chosen_units(
        data.unit_digests((split,)),
        evaluation.max_gate_examples if split == "gate" else evaluation.max_test_examples,
        split_seed=config.data.split_seed,
        account=account_name(domain, split),
    )


def with_validation(
    plan: DomainPlan,
    config: StudyConfig,
    data: Mapping[str, "DomainData"],
    open_ledger: Callable[[str], Ledger],
    run_id: str,
) -> DomainPlan:
    """A domain's plan with that of its private gate and test sets; unchanged where they are public.

    ``check_disjoint_units`` comes first, once for all domains.

    Args:
        plan: the domain's.
        config: the study.
        data: every domain's.
        open_ledger: the ledger of an account's name.
        run_id: the study's run.

    Raises:
        ConfigError: a delta that is not below one over the number of units.
        DataError: a set has no units.
        LedgerError: an account is broken.
    """
    if config.evaluation.gate_data == "public":
        return plan
    domain = config.domain(plan.domain)
    sets = []
    for split in SETS:
        units = evaluated_units(config, plan.domain, split, data[plan.domain])
        ledger = open_ledger(account_name(plan.domain, split))
        sets.append(
            plan_validation(
                config,
                domain,
                split,
                n_units=len(units),
                fingerprint=fingerprint(units),
                account_in_force=ledger.account(),
                spent_rdp=ledger.spent_rdp(),
                runs_before=ledger.runs_charged(besides=run_id),
                refusal=ledger.terms_refusal(terms_of(plan, config)) or "",
            )
        )
    warnings = (warning_about(one, data[plan.domain].n_units[one.split]) for one in sets)
    return plan.model_copy(
        update={
            "validation": tuple(sets),
            "warnings": plan.warnings + tuple(warning for warning in warnings if warning is not None),
        }
    )


def terms_of(plan: DomainPlan, config: StudyConfig) -> Terms:
    """What a validation account promises besides (epsilon, delta): it always protects one unit."""
    return Terms(
        privacy_unit=plan.privacy_unit,
        planned_runs=config.privacy.planned_runs,
        policy_sha256=plan.policy_sha256,
    )


def check_disjoint_units(data: Mapping[str, "DomainData"]) -> None:
    """Check that no unit of a domain, and no post of any domain, is in two of train, gate and test.

    The loader builds splits so; here it is what lets the accounts be apart, so it is checked once more.

    Raises:
        DataError: with counts.
    """
    seen: dict[str, str] = {}
    clashes = 0
    for name, domain in data.items():
        for split in SPLITS:
            found = {f"unit of {name}\0{unit}" for unit in domain.unit_digests((split,))}
            found |= domain.post_digests(b"", (split,))
            clashes += sum(seen.setdefault(one, split) != split for one in found)
    if clashes:
        raise DataError(
            f"{clashes} units or posts are in two of train, gate and test; allowed with a private gate set: none, "
            "because their budgets are apart. Load the domains together and with one data.split_seed."
        )


def plan_validation(
    config: StudyConfig,
    domain: DomainConfig,
    split: SetName,
    *,
    n_units: int,
    fingerprint: str,
    account_in_force: PrivacyAccount | None = None,
    spent_rdp: float = 0.0,
    runs_before: int = 0,
    refusal: str = "",
) -> ValidationPlan:
    """Plan the releases of one private set, from public numbers alone.

    Args:
        config: the study.
        domain: whose set it is.
        split: which set.
        n_units: units that are evaluated (public).
        fingerprint: of those units.
        account_in_force: the lifetime promise, where the ledger already holds one.
        spent_rdp: what the ledger says is gone.
        runs_before: earlier runs that charged the account.
        refusal: why the account is closed to this study, if it is.

    Returns:
        A plan; with ``refusal`` set where the budget does not carry the releases.

    Raises:
        ConfigError: delta is not below 1 / n_units.
        DataError: no units.
    """
    if n_units < 1:
        raise DataError(
            f"domain {domain.name!r}: its private {split} set has no units; allowed: at least 1. Raise "
            f"data.{split}_fraction or give the domain more data."
        )
    private, account = config.evaluation.private, account_in_force
    epsilon = domain.validation_epsilon if domain.validation_epsilon is not None else private.epsilon
    delta = private.delta if private.delta is not None else default_delta(n_units)
    if account is not None and private.delta is None:
        delta = account.delta  # the promise was made for life
    if delta >= 1.0 / n_units:
        raise ConfigError(
            f"domain {domain.name!r}: evaluation.private.delta {delta:g} must be below 1/N = {1 / n_units:.3g} (N = "
            f"{n_units} units of its {split} set). Lower it or leave it out."
        )
    releases = planned_releases(split, config.rounds, champion=config.compares_with_champion)
    base = {
        "account": account_name(domain.name, split),
        "split": split,
        "n_units": n_units,
        "releases": releases,
        "noise_multiplier": None,
        "metric_std": None,
        "epsilon_budget": epsilon,
        "delta": delta,
        "epsilon_spent_before": account.epsilon_spent(spent_rdp) if account else 0.0,
        "epsilon_planned": None,
        "rdp_order": None,
        "rdp_budget": None,
        "run_rdp_budget": None,
        "dataset_fingerprint": fingerprint,
    }
    if refusal:
        return ValidationPlan.model_validate({**base, "refusal": refusal})
    if account is not None and (account.epsilon, account.delta) != (epsilon, delta):
        refusal = (
            f"the {split} set of domain {domain.name!r} was promised validation epsilon {account.epsilon:g} at delta "
            f"{account.delta:g} for its lifetime, and this study asks for epsilon {epsilon:g} at delta {delta:g}. Set "
            "the domain's validation_epsilon (and evaluation.private.delta) to the promise."
        )
        return ValidationPlan.model_validate({**base, "refusal": refusal})
    runs_left = max(1, config.privacy.planned_runs - runs_before)
    try:
        account = account or PrivacyAccount.open(epsilon, delta, 1.0, releases * runs_left)
        share = (account.rdp_budget - spent_rdp) / runs_left
        noise = calibrate_at_order(share / (releases + _SPARE_RELEASES), account.rdp_order, 1.0, 1)
    except BudgetError:
        refusal = (
            f"the validation budget of the {split} set of domain {domain.name!r} (epsilon {epsilon:g} at delta "
            f"{delta:g}) carries no {releases} further releases of its metrics"
            + (f" after the {base['epsilon_spent_before']:.4g} that earlier runs spent" if spent_rdp else "")
            + ". Lower rounds, or use a public gate set."
        )
        return ValidationPlan.model_validate({**base, "refusal": refusal})
    return ValidationPlan.model_validate(
        {
            **base,
            "noise_multiplier": noise,
            "metric_std": std_of_mean(noise, N_SCORES, n_units),
            "epsilon_planned": account.epsilon_spent(spent_rdp + account.charge_of(noise, 1.0, releases)),
            "rdp_order": account.rdp_order,
            "rdp_budget": account.rdp_budget,
            "spent_rdp_before": spent_rdp,
            "run_rdp_budget": spent_rdp + share,
        }
    )


def promised_account(plan: ValidationPlan) -> PrivacyAccount:
    """The lifetime promise a plan speaks of.

    Raises:
        BudgetError: the plan was refused.
    """
    if plan.rdp_order is None or plan.rdp_budget is None:
        raise BudgetError(plan.refusal)
    return PrivacyAccount(plan.epsilon_budget, plan.delta, plan.rdp_order, plan.rdp_budget)


def noise_of_next_release(plan: ValidationPlan, account: PrivacyAccount, *, spent_rdp: float, released: int) -> float:
    """The noise multiplier of this run's next release: the planned one, or more where retries ate the budget.

    Args:
        plan: of the set.
        account: the promise in force.
        spent_rdp: before this run, and by this run.
        released: releases of this run so far.

    Raises:
        BudgetError: what is left would need more than four times the planned noise.
    """
    assert plan.noise_multiplier is not None  # else ``promised_account`` refused
    assert plan.run_rdp_budget is not None
    remaining = max(1, plan.releases - released)
    left = plan.run_rdp_budget - spent_rdp
    if released < plan.releases and account.charge_of(plan.noise_multiplier, 1.0, remaining) <= left:
        return plan.noise_multiplier
    try:
        noise = calibrate_at_order(left / (remaining + _SPARE_RELEASES), account.rdp_order, 1.0, 1)
    except BudgetError:
        noise = float("inf")
    if noise > _MOST_NOISE_GROWTH * plan.noise_multiplier:
        raise BudgetError(
            f"account {plan.account!r}: failed attempts used up what this run may spend on its metrics (lifetime "
            f"epsilon {account.epsilon:g}, {account.epsilon_spent(spent_rdp):.4g} is spent). Nothing was evaluated. "
            "Trained rounds are kept, but this study cannot be judged any more: start a new one, with a public gate "
            "set if privacy.planned_runs leaves nothing for it."
        )
    return noise


def warning_about(plan: ValidationPlan, n_available: int) -> str | None:
    """What to do where the noise would hide what the gate is to see; None where it would not."""
    if plan.metric_std is None or plan.metric_std <= COARSE_METRIC_STD:
        return None
    more = (
        f"raise evaluation.max_{plan.split}_examples ({plan.n_units} of {n_available} units are evaluated), "
        if plan.n_units < n_available
        else f"give the {plan.split} set more units (all {n_available} are evaluated), "
    )
    return (
        f"{plan.account}: the noise in each released metric has standard deviation {plan.metric_std:.2g}, so that no "
        f"fine threshold can be seen through it. To lower it, {more}raise the validation epsilon "
        f"({plan.epsilon_budget:g}), plan fewer rounds or runs, or use a public set."
    )
