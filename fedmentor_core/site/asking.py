"""The server's part: ask a site, wait, and take back a checked answer. How a request travels is the caller's.

``Deliver`` is the seam: ``tasks/sites.py`` hands a request to the site's own work pool; a test may call the site's code
directly. Each attempt is asked once and answered once. A site that is asked again, by a retry or by a study that
resumes, is asked for the same attempt until that was answered, so that nothing is trained twice; only after a failure,
a rejected answer or a refusal does the next attempt begin.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

from fedmentor_core.champion import Champion
from fedmentor_core.client_round import rested_client
from fedmentor_core.config import SiteConfig
from fedmentor_core.errors import AnswerRejectedError, SiteError, SiteUnavailableError
from fedmentor_core.records import ArtifactRef, ClientAssignment, ClientUpdate, DomainEvaluation, DomainPlan
from fedmentor_core.site.checking import find_answer
from fedmentor_core.site.requests import (
    EvaluateRequest,
    PlanRequest,
    SiteFailure,
    TrainRequest,
    answer_key,
    told_to_site,
)
from fedmentor_core.workspace import Workspace

MOST_ATTEMPTS = 100
Request = TypeVar("Request", PlanRequest, TrainRequest, EvaluateRequest)


class Deliver(Protocol):
    """Brings a request to a site and comes back when it was answered, or when no answer is to be expected."""

    def __call__(
        self,
        site: str,
        settings: SiteConfig,
        request: PlanRequest | TrainRequest | EvaluateRequest,
        answered: Callable[[], bool],
    ) -> None:
        """Deliver ``request``; ``answered`` looks for its answer in the store.

        Raises:
            SiteUnavailableError: the site is down, or did not answer by its deadline.
            SiteError: it ended without an answer.
        """
        ...


def ask_plan(workspace: Workspace, domain: str, deliver: Deliver) -> DomainPlan:
    """A domain's plan, made at its site under its own policy and ledger; it may be refused.

    Raises:
        SiteError: no usable answer.
    """
    asked = workspace.config.domain(domain)
    request = PlanRequest(
        run_id=workspace.ref.run_id,
        domain=domain,
        config=told_to_site(workspace.config, asked),
        n_clients=workspace.n_clients,
    )
    answer = _ask(workspace, request, deliver)
    assert isinstance(answer, DomainPlan)  # ``find_answer`` checked it
    return answer


def ask_training(workspace: Workspace, assignment: ClientAssignment, deliver: Deliver) -> ClientUpdate:
    """One client's part of a round, carried out at its site; a domain whose plan is refused is not asked.

    Raises:
        SiteError: no usable answer.
    """
    plan = next(plan for plan in workspace.plan.domains if plan.domain == assignment.domain)
    if plan.refusals:
        return rested_client(assignment, plan, plan.epsilon_spent_before or 0.0, "; ".join(plan.refusals))
    request = TrainRequest(
        run_id=workspace.ref.run_id,
        domain=assignment.domain,
        config=told_to_site(workspace.config, workspace.config.domain(assignment.domain)),
        assignment=assignment,
        frozen_adapter=workspace.frozen_adapter,
    )
    answer = _ask(workspace, request, deliver)
    assert isinstance(answer, ClientUpdate)
    return answer


def ask_evaluation(
    workspace: Workspace, adapter: ArtifactRef, domain: str, split: str, deliver: Deliver
) -> DomainEvaluation:
    """An adapter's metrics on a domain's gate or test set, made at its site.

    Raises:
        SiteError: no usable answer, or the site's plan is refused or missing.
    """
    plan = next((plan for plan in workspace.plan.domains if plan.domain == domain), None)
    if plan is None:
        raise SiteUnavailableError(f"domain {domain!r} takes no part in this run.")
    if plan.refusals:
        raise SiteUnavailableError(f"domain {domain!r} takes no part in this run: {'; '.join(plan.refusals)}")
    champion: Champion | None = workspace.champion if workspace.config.needs_champion else None
    request = EvaluateRequest(
        run_id=workspace.ref.run_id,
        domain=domain,
        config=told_to_site(workspace.config, workspace.config.domain(domain)),
        adapter=adapter,
        split="gate" if split == "gate" else "test",
        frozen_adapter=workspace.frozen_adapter,
        champion=champion if champion is not None and champion.adapter == adapter else None,
    )
    answer = _ask(workspace, request, deliver)
    assert isinstance(answer, DomainEvaluation)
    return answer


def _ask(workspace: Workspace, request: Request, deliver: Deliver) -> DomainPlan | ClientUpdate | DomainEvaluation:
    site = workspace.config.domain(request.domain).site
    assert site is not None
    for attempt in range(MOST_ATTEMPTS):
        current = request.model_copy(update={"attempt": attempt})
        try:
            earlier = find_answer(workspace, site, current)
        except AnswerRejectedError:
            continue
        if earlier is None:
            return _ask_now(workspace, site, current, deliver)
        if _stands(earlier):
            assert not isinstance(earlier, SiteFailure)
            return earlier
    raise SiteError(f"site {site!r} gave no usable answer in {MOST_ATTEMPTS} attempts. Start a new run.")


def _ask_now(
    workspace: Workspace, site: str, request: PlanRequest | TrainRequest | EvaluateRequest, deliver: Deliver
) -> DomainPlan | ClientUpdate | DomainEvaluation:
    key = answer_key(site, request)
    deliver(site, workspace.config.sites[site], request, lambda: workspace.store_holding(key).exists(key))
    answer = find_answer(workspace, site, request)
    if answer is None:
        raise SiteError(f"site {site!r} ended without an answer.")
    if isinstance(answer, SiteFailure):
        raise SiteError(f"site {site!r}: {answer.reason}")
    return answer


def _stands(answer: DomainPlan | ClientUpdate | DomainEvaluation | SiteFailure) -> bool:
    """Whether an answer holds for good: a failure or a refusal may be mended at the site, and is asked again."""
    match answer:
        case SiteFailure():
            return False
        case DomainPlan():
            return not answer.refusals
        case ClientUpdate():
            return answer.status == "trained"
    return True
