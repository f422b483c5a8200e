"""The privacy plan: what each domain was promised and what the schedule will cost it, from public numbers alone."""

from fedmentor_core.config import DomainConfig, StudyConfig
from fedmentor_core.errors import BudgetError, ConfigError
from fedmentor_core.privacy.accountant import calibrate_at_order, epsilon_prv
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.records import DomainPlan, PrivacySpend


def default_delta(n_units: int) -> float:
    """min(1e-5, 1 / (10 N)): well below one over the number of units."""
    return min(1e-5, 1.0 / (10 * n_units))


def plan_domain(
    config: StudyConfig,
    domain: DomainConfig,
    *,
    n_units: int,
    dataset_fingerprint: str,
    bytes_up: int,
    bytes_down: int,
    account_in_force: PrivacyAccount | None = None,
    spent_rdp: float = 0.0,
    with_prv: bool = True,
) -> DomainPlan:
    """Plan one domain's whole schedule.

    The noise multiplier follows by calibration: the least at which all planned steps fit the budget that is left,
    less the reserve kept for later noise reductions; never below the site's floor.

    Args:
        config: the study.
        domain: the domain.
        n_units: training units N (public).
        dataset_fingerprint: what the ledger is kept for.
        bytes_up: size of one update.
        bytes_down: size of one global adapter.
        account_in_force: the lifetime promise, where the ledger already holds one.
        spent_rdp: what the ledger says is gone.
        with_prv: also compute the PRV diagnostic (about a second).

    Raises:
        ConfigError: fewer units than an expected batch, or a delta that is not below 1/N.
    """
    training, privacy = config.training, config.privacy
    if n_units < training.batch_size:
        raise ConfigError(
            f"domain {domain.name!r} has {n_units} training units, fewer than training.batch_size "
            f"{training.batch_size}. Lower training.batch_size to {n_units} or less, or give the domain more data."
        )
    sample_rate = training.batch_size / n_units
    reserve = 0.0 if config.adaptation.rule == "fixed" else privacy.reserve_fraction
    base = {
        "domain": domain.name,
        "n_units": n_units,
        "sample_rate": sample_rate,
        "steps_per_round": training.steps_per_round,
        "rounds": config.rounds,
        "clip_norm": config.clip_norm_of(domain),
        "sensitivity": domain.sensitivity,
        "min_noise_multiplier": domain.min_noise_multiplier,
        "reserve_fraction": reserve,
        "dataset_fingerprint": dataset_fingerprint,
        "bytes_up_per_round": bytes_up,
        "bytes_down_per_round": bytes_down,
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
    steps = training.steps_per_round * config.rounds
    spent_before = account_in_force.epsilon_spent(spent_rdp) if account_in_force else 0.0
    refused = {**base, **unaccounted, "delta": delta, "epsilon_budget": epsilon, "epsilon_spent_before": spent_before}
    if account_in_force is not None and (account_in_force.epsilon, account_in_force.delta) != (epsilon, delta):
        refusal = (
            f"domain {domain.name!r}: was promised epsilon {account_in_force.epsilon:g} at delta "
            f"{account_in_force.delta:g} for its lifetime, and this study asks for epsilon {epsilon:g} at delta "
            f"{delta:g}. Set the domain's epsilon and delta to the promise."
        )
        return DomainPlan.model_validate({**refused, "refusals": (refusal,)})
    try:
        account = account_in_force or PrivacyAccount.open(epsilon, delta, sample_rate, steps)
        left = account.rdp_budget - spent_rdp
        noise = calibrate_at_order((1 - reserve) * left, account.rdp_order, sample_rate, steps)
        if noise > privacy.max_noise_multiplier:
            raise BudgetError(
                f"the planned {steps} steps need noise multiplier {noise:.3g}, above privacy.max_noise_multiplier "
                f"{privacy.max_noise_multiplier:g}: the update would be noise"
            )
    except BudgetError as error:
        refusal = (
            f"domain {domain.name!r}: budget epsilon {epsilon:g} at delta {delta:g} is too small for {config.rounds} "
            f"rounds of {training.steps_per_round} steps at sample rate {sample_rate:.4g}"
            + (" after what earlier runs spent" if spent_rdp else "")
            + f" ({str(error).rstrip('.')}). "
            + ("Lower" if account_in_force else "Raise the domain's epsilon, or lower")
            + " rounds, steps_per_round or batch_size."
        )
        return DomainPlan.model_validate({**refused, "refusals": (refusal,)})
    noise = max(noise, domain.min_noise_multiplier)
    planned = spent_rdp + account.charge_of(noise, sample_rate, steps)
    spend = PrivacySpend(noise_multiplier=noise, sample_rate=sample_rate, steps=steps)
    return DomainPlan.model_validate(
        {
            **base,
            "noise_multiplier": noise,
            "delta": delta,
            "epsilon_budget": epsilon,
            "epsilon_spent_before": account.epsilon_spent(spent_rdp),
            "epsilon_planned_rdp": account.epsilon_spent(planned),
            "epsilon_planned_prv": epsilon_prv([spend], delta) if with_prv else None,
            "rdp_order": account.rdp_order,
            "rdp_budget": account.rdp_budget,
        }
    )
