"""A domain's plan that a rule refuses: the reasons are added, and nothing that could be trained with is left in it."""

from fedmentor_core.records import DomainPlan

_NOTHING_TO_TRAIN_WITH = {
    "noise_multiplier": None,
    "epsilon_planned_rdp": None,
    "epsilon_planned_prv": None,
    "rdp_order": None,
    "rdp_budget": None,
    "run_rdp_budget": None,
    "reserve_epsilon": None,
    "noise_schedule": (),
    "reductions": (),
}
_NOTHING_TO_RELEASE = {
    "noise_multiplier": None,
    "metric_std": None,
    "epsilon_planned": None,
    "rdp_order": None,
    "rdp_budget": None,
    "run_rdp_budget": None,
}


def refused(plan: DomainPlan, *reasons: str) -> DomainPlan:
    """``plan`` refused for ``reasons`` besides those it has; unchanged where there are none.

    Without order and budget no account can be opened from it, and without a noise multiplier no client is asked. Its
    private gate and test sets are refused with it: whoever may not train on a domain's posts may not look at them.
    """
    if not reasons:
        return plan
    sets = (one.model_copy(update={**_NOTHING_TO_RELEASE, "refusal": reasons[0]}) for one in plan.validation)
    return plan.model_copy(
        update={**_NOTHING_TO_TRAIN_WITH, "refusals": (*plan.refusals, *reasons), "validation": tuple(sets)}
    )
