"""A study's steps for one client or domain each: carried out in this process, or asked of the domain's site.

What fails for good is reported as a fact about the round; only a broken ledger stops the study.
"""

from collections.abc import Callable, Sequence

from fedmentor_core import rounds
from fedmentor_core.client_round import failed_client
from fedmentor_core.discretion import failure_reason
from fedmentor_core.errors import (
    AnswerRejectedError,
    ConfigError,
    DeadlineError,
    LedgerError,
    SiteError,
    SiteUnavailableError,
)
from fedmentor_core.isolation import train_client_here
from fedmentor_core.privacy.validation_plan import SetName
from fedmentor_core.progress import Listener, ProgressEvent
from fedmentor_core.records import (
    ArtifactRef,
    ClientAssignment,
    ClientStatus,
    ClientUpdate,
    DomainEvaluation,
    DomainPlan,
    MissingEvaluation,
    StudyPlan,
)
from fedmentor_core.site.asking import Deliver, ask_evaluation, ask_plan, ask_training
from fedmentor_core.site.planning import joined_plan
from fedmentor_core.site.spending import most_spent_epsilon
from fedmentor_core.slots import held_gpu
from fedmentor_core.workspace import Workspace


def train_with_retries(
    workspace: Workspace, assignment: ClientAssignment, listen: Listener, deliver: Deliver | None = None
) -> ClientUpdate:
    """One client's round; what still fails after the retries is reported as 'failed' or 'rejected'."""
    error: Exception | None = None
    for _ in range(workspace.config.execution.client_retries + 1):
        try:
            return train_one(workspace, assignment, listen, deliver)
        except LedgerError:
            raise
        except (AnswerRejectedError, DeadlineError, SiteUnavailableError) as final:  # another try would charge in vain
            error = final
            break
        except Exception as again:  # any failure of a client is a fact about the round
            error = again
    assert error is not None
    return report_failure(workspace, assignment, error)


def report_failure(workspace: Workspace, assignment: ClientAssignment, error: BaseException) -> ClientUpdate:
    """The record of a client that failed for good, or whose answer was rejected."""
    plan = next(plan for plan in workspace.plan.domains if plan.domain == assignment.domain)
    status: ClientStatus = "rejected" if isinstance(error, AnswerRejectedError) else "failed"
    made = failed_client(assignment, plan, None, failure_reason(error), status)
    spent = None
    if workspace.config.domain(assignment.domain).site is not None:
        history = rounds.client_history(workspace, assignment.domain, assignment.round_index, [made])
        spent = most_spent_epsilon(workspace, plan, history)
    elif plan.rdp_order is not None:
        spent = workspace.ledger(assignment.domain).view().epsilon_spent
    return made.model_copy(update={"epsilon_spent": spent})


def settle_plan(workspace: Workspace, ask: Callable[[], Sequence[DomainPlan | SiteError]]) -> StudyPlan:
    """The run's plan; where it has none yet, joined from what is planned here and what ``ask`` brings from the sites.

    Args:
        workspace: the study's.
        ask: one plan for each of ``workspace.domains_at_sites``, in order, or why there is none.

    Raises:
        BudgetError: no domain's budget carries the plan.
        SiteError: too few sites answered.
    """
    names = [domain.name for domain in workspace.domains_at_sites]
    if not names or workspace.is_planned:
        return workspace.plan
    found = dict(zip(names, ask(), strict=True))
    absent = {name: str(one) for name, one in found.items() if isinstance(one, SiteError)}
    answers = [one for one in found.values() if isinstance(one, DomainPlan)]
    return workspace.settle_plan(joined_plan(workspace, answers, absent))


def plan_one(workspace: Workspace, domain: str, deliver: Deliver | None) -> DomainPlan | SiteError:
    """The plan of a domain at its site, or why there is none."""
    try:
        return ask_plan(workspace, domain, _required(deliver))
    except SiteError as error:
        return error


def train_one(
    workspace: Workspace, assignment: ClientAssignment, listen: Listener, deliver: Deliver | None = None
) -> ClientUpdate:
    """One client's round, with progress: in this process, or at the domain's site."""
    if workspace.config.domain(assignment.domain).site is not None:
        return ask_training(workspace, assignment, _required(deliver))

    def on_step(done: int, total: int) -> None:
        listen(
            ProgressEvent(
                "train", round_index=assignment.round_index, n_rounds=workspace.config.rounds,
                domain=assignment.domain, completed=done, total=total,
            )
        )  # fmt: skip

    def on_wait() -> None:
        listen(ProgressEvent("train", round_index=assignment.round_index, domain=assignment.domain))

    with workspace.training_turns:  # threads that wait for sites must not become clients of this machine
        return train_client_here(workspace, assignment, on_step, on_wait)


def evaluate_one(
    workspace: Workspace,
    adapter: ArtifactRef,
    domain: str,
    split: SetName,
    listen: Listener,
    deliver: Deliver | None = None,
) -> DomainEvaluation | MissingEvaluation:
    """One domain's evaluation, with progress: in this process, or at the domain's site, which may not answer."""
    if workspace.config.domain(domain).site is not None:
        try:
            return ask_evaluation(workspace, adapter, domain, split, _required(deliver))
        except SiteError as error:
            return MissingEvaluation(domain=domain, split=split, reason=str(error))

    def on_batch(done: int, total: int) -> None:
        listen(ProgressEvent("evaluate", domain=domain, completed=done, total=total))

    with held_gpu(workspace.config, lambda: listen(ProgressEvent("evaluate", domain=domain))):
        return rounds.evaluate(workspace, adapter, domain, split, on_batch)


def _required(deliver: Deliver | None) -> Deliver:
    if deliver is None:
        raise ConfigError(
            "a domain of this study is at a site, and requests to sites go through Prefect. Run it with 'fedmentor "
            "run' or its deployment."
        )
    return deliver
