"""The site's part: carry out a request under the site's own file, sign what came of it, store it once.

A request that was answered is never carried out again: what is asked twice is answered by the same bytes. A crash
before the answer leaves the charge standing; the next request for the same round finds what was released, or is
charged anew (``client_round.py``).
"""

import logging
from collections.abc import Callable
from pathlib import Path

from fedmentor_core import rounds
from fedmentor_core.discretion import places_of, texts_withheld
from fedmentor_core.errors import AlreadyExistsError, BudgetError, DeadlineError, FedMentorError, SharedPostsError
from fedmentor_core.isolation import train_client_here
from fedmentor_core.records import ClientUpdate, DomainEvaluation, DomainPlan
from fedmentor_core.site.file import RequestRefusedError, SiteFile
from fedmentor_core.site.requests import (
    Answer,
    EvaluateRequest,
    PlanRequest,
    SignedAnswer,
    SiteFailure,
    TrainRequest,
    answer_key,
)
from fedmentor_core.site.signing import read_key_file, sign
from fedmentor_core.site.workspace import SiteWorkspace
from fedmentor_core.slots import held_gpu
from fedmentor_core.storage.base import open_store

OnProgress = Callable[[int, int], None]
_TOLD = (BudgetError, DeadlineError, RequestRefusedError)
_log = logging.getLogger("fedmentor.site")


def answer_request(
    request: PlanRequest | TrainRequest | EvaluateRequest,
    file: SiteFile,
    on_progress: OnProgress = lambda done, total: None,
) -> SiteFailure | None:
    """Carry out one request and store its signed answer, unless one is there.

    Returns:
        What went wrong, as the answer says it; None when all went well.

    Raises:
        ConfigError: the signing key cannot be used; nothing was charged.
        StorageError: a store cannot be read or written.
    """
    key = read_key_file(Path(file.signing_key_file))  # first of all: what cannot be signed must not be charged
    store, name = open_store(str(file.written.url), file.written), answer_key(file.site, request)
    if store.exists(name):
        return _failure_in(SignedAnswer.model_validate(store.get_json(name)))
    result: DomainPlan | ClientUpdate | DomainEvaluation | SiteFailure
    try:
        with texts_withheld():
            result = _carry_out(request, file, on_progress)
    except Exception as error:
        _log_locally(error)
        result = told(error)
    signed = sign(Answer(site=file.site, request_sha256=request.sha256, result=result), key)
    try:
        store.put_json(name, signed)
    except AlreadyExistsError:  # the same request was carried out twice at once: the first answer stands
        signed = SignedAnswer.model_validate(store.get_json(name))
    return _failure_in(signed)


def answer_or_tell(
    request: PlanRequest | TrainRequest | EvaluateRequest,
    read_file: Callable[[], SiteFile],
    on_progress: OnProgress = lambda done, total: None,
) -> SiteFailure | None:
    """``answer_request`` for an orchestrator, which stores what is raised: here nothing is, but what may be told."""
    try:
        return answer_request(request, read_file(), on_progress)
    except Exception as error:
        _log_locally(error)
        return told(error)


def told(error: Exception) -> SiteFailure:
    """What a server may know of a failure at a site.

    A message is told only where it is made of public numbers and the request: of budgets, deadlines, refusals. All
    others may name the site's folders, files, columns and row counts, so only their kind is told.
    """
    kind = type(error).__name__
    if isinstance(error, _TOLD) and not isinstance(error, SharedPostsError):
        return SiteFailure(kind=kind, reason=str(error)[:2000])
    return SiteFailure(kind=kind, reason=f"failed with {kind}; the site's own log says where")


def _carry_out(
    request: PlanRequest | TrainRequest | EvaluateRequest, file: SiteFile, on_progress: OnProgress
) -> DomainPlan | ClientUpdate | DomainEvaluation:
    workspace = SiteWorkspace(request, file)
    workspace.claim()
    match request:
        case PlanRequest():
            return workspace.domain_plan
        case TrainRequest():
            return train_client_here(workspace, request.assignment, on_progress, file=file)
        case EvaluateRequest():
            with held_gpu(workspace.config):
                return rounds.evaluate(workspace, request.adapter, request.domain, request.split, on_progress)


def _log_locally(error: Exception) -> None:
    """The site's own log may name its folders; a text that is not ours stays withheld even there."""
    text = str(error) if isinstance(error, FedMentorError) else "its text is withheld"
    _log.error("request failed with %s: %s\n%s", type(error).__name__, text, places_of(error))


def _failure_in(signed: SignedAnswer) -> SiteFailure | None:
    result = signed.answer.result
    return result if isinstance(result, SiteFailure) else None
