"""Requests to sites through Prefect: a run of the site's own deployment, taken up by its worker, which polls outwards.

Prefect carries the request and says whether the run is alive. The answer is a signed object in the study's store; no
result of Prefect's is read, and whatever a state says is only a hint why there is no answer.
"""

import time
from collections.abc import Callable
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Cancelling

from fedmentor_core.config import SiteConfig
from fedmentor_core.discretion import discreet
from fedmentor_core.errors import SiteError, SiteUnavailableError
from fedmentor_core.progress import ProgressEvent
from fedmentor_core.records import DomainPlan
from fedmentor_core.site.asking import ask_plan
from fedmentor_core.site.requests import EvaluateRequest, PlanRequest, TrainRequest
from fedmentor_core.study_ref import StudyRef
from fedmentor_core.workspace import workspace_of
from tasks.listening import tell

_MOST_CORPSES = 20
_STAGES: dict[str, Any] = {"plan": "prepare", "train": "train", "evaluate": "evaluate"}


@task(name="plan", task_run_name="plan {domain}", cache_policy=NO_CACHE, persist_result=False, log_prints=False)
@discreet
def plan_at_site(ref: StudyRef, domain: str) -> DomainPlan:
    """Ask a domain's site for its public numbers."""
    return ask_plan(workspace_of(ref), domain, deliver)


def deliver(
    site: str,
    settings: SiteConfig,
    request: PlanRequest | TrainRequest | EvaluateRequest,
    answered: Callable[[], bool],
) -> None:
    """Start the site's deployment for ``request``, or join the run that an earlier start of the study began.

    Raises:
        SiteUnavailableError: no worker took it up in time, or it was not answered by the deadline; it is withdrawn.
        SiteError: its run ended without an answer.
    """
    name = settings.deployment or f"client-site/{site}"
    with get_client(sync_client=True) as client:
        for resent in range(_MOST_CORPSES):
            try:
                run = run_deployment(
                    name,
                    parameters={"request": request.model_dump(mode="json")},
                    timeout=0,
                    idempotency_key=f"{request.sha256}-{resent}",
                    flow_run_name=f"{request.kind} {request.domain} for {request.run_id}",
                )
            except ObjectNotFound:
                raise SiteUnavailableError(
                    f"site {site!r} has no deployment {name!r}. Apply prefect.yaml, or set sites.{site}.deployment."
                ) from None
            if client.read_flow_run(run.id).state.is_final() and not answered():
                continue  # it died under an earlier start of this study
            _wait(client, run.id, site, settings, request, answered)
            return
    raise SiteError(f"site {site!r}: the same request ended without an answer {_MOST_CORPSES} times.")


def _wait(
    client: SyncPrefectClient,
    run_id: Any,
    site: str,
    settings: SiteConfig,
    request: PlanRequest | TrainRequest | EvaluateRequest,
    answered: Callable[[], bool],
) -> None:
    begun = time.monotonic()
    while not answered():
        state = client.read_flow_run(run_id).state
        waited = time.monotonic() - begun
        if state is None or state.is_final():
            if answered():
                return
            ending = "nowhere" if state is None else state.type.value.lower()
            raise SiteError(
                f"site {site!r}: its run ended {ending} and left no answer."
                + (" Does it run the same version of FedMentor?" if state is not None and state.is_completed() else "")
            )
        if state.is_scheduled() and waited > settings.start_within_seconds:
            client.set_flow_run_state(run_id, Cancelled(message="withdrawn: nobody took it up in time"), force=True)
            raise SiteUnavailableError(
                f"site {site!r} is down: no worker took its request up within {settings.start_within_seconds:g} s."
            )
        if waited > settings.deadline_seconds:
            client.set_flow_run_state(run_id, Cancelling(message="withdrawn: past its deadline"), force=True)
            raise SiteUnavailableError(
                f"site {site!r} did not answer within {settings.deadline_seconds:g} s, its deadline."
            )
        message = f"waiting for site {site}"
        tell(ProgressEvent(_STAGES[request.kind], message, domain=request.domain))
        time.sleep(settings.poll_seconds)
