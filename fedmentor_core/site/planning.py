"""A study's plan out of what its sites answered and what this machine planned itself."""

from collections.abc import Mapping, Sequence

from fedmentor_core.errors import SiteError
from fedmentor_core.records import DomainPlan, StudyPlan
from fedmentor_core.workspace import Workspace


def joined_plan(workspace: Workspace, answers: Sequence[DomainPlan], absent: Mapping[str, str]) -> StudyPlan:
    """Join the plans of domains at sites with those that are planned here.

    A domain whose site did not answer takes no part in the run, and the plan says so: nobody knows its public numbers.

    Args:
        workspace: the server's.
        answers: plans of domains at sites, checked.
        absent: by domain, why its site did not answer.

    Raises:
        SiteError: fewer domains than ``aggregation.min_clients`` can take part.
    """
    config, here = workspace.config, workspace.make_plan()
    # a refused domain's private sets cannot be looked at either: the gate then fails, but the others may train
    answered = [one.model_copy(update={"validation": ()}) if one.refusals else one for one in answers]
    by_name = {plan.domain: plan for plan in (*here.domains, *answered)}
    plans = tuple(by_name[domain.name] for domain in config.domains if domain.name in by_name)
    least = config.aggregation.min_clients
    if len(plans) < least:
        reasons = "; ".join(f"{domain}: {reason}" for domain, reason in absent.items())
        raise SiteError(
            f"{len(plans)} of {len(config.domains)} domains can take part, aggregation.min_clients is {least} "
            f"({reasons}). Nothing was charged by this study. Start it again when the sites are up."
        )
    refusals = (refusal for one in answered for refusal in one.refusals)
    unjudged = (one.refusal for plan in answered for one in plan.validation if one.refusal)
    return here.model_copy(
        update={
            "domains": plans,
            "bytes_per_round": sum(one.bytes_up_per_round + one.bytes_down_per_round for one in plans),
            "refusals": tuple(dict.fromkeys((*here.refusals, *refusals, *unjudged))),
            "warnings": (
                *here.warnings,
                *(f"domain {domain!r} takes no part in this run: {reason}" for domain, reason in absent.items()),
            ),
        }
    )
