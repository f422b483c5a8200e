"""Before a site's answer counts: signature, request, kind, and that it says nothing that was not asked.

Whoever may write to the site's part of the store can put anything there; only the holder of the site's key can make it
pass. And a site that holds its key but is broken or dishonest is held to what it was asked: another study's, round's
or adapter's update, another schedule, a file of another size, NaN, or a score out of range are refused. Shape, dtype,
finiteness and norm of an update are checked where it is added up (``aggregation/base.py``).
"""

import math
import re
from collections.abc import Iterator

from pydantic import ValidationError

from fedmentor_core.adapters.lora import metadata_from_bytes
from fedmentor_core.errors import AnswerRejectedError, FedMentorError, IntegrityError
from fedmentor_core.records import UNRELEASED_METRICS, ClientUpdate, DomainEvaluation, DomainPlan
from fedmentor_core.site.requests import (
    EvaluateRequest,
    PlanRequest,
    SignedAnswer,
    SiteFailure,
    TrainRequest,
    answer_key,
    folder_of,
)
from fedmentor_core.site.signing import verified
from fedmentor_core.storage.base import ArtifactStore
from fedmentor_core.workspace import Workspace

MOST_ANSWER_BYTES = 4 * 2**20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHARES = (
    "rouge_l", "label_f1", "safe_rate", "toxicity_mean", "toxicity_max", "empty_rate", "refusal_rate",
    "repetition_rate", "toxicity_rate_05", "toxicity_rate_07",
)  # fmt: skip


def find_answer(
    workspace: Workspace, site: str, request: PlanRequest | TrainRequest | EvaluateRequest
) -> DomainPlan | ClientUpdate | DomainEvaluation | SiteFailure | None:
    """The site's answer to ``request``, once everything about it was checked; None when there is none yet.

    Args:
        workspace: the server's.
        site: who was asked.
        request: what was asked, this very attempt.

    Raises:
        AnswerRejectedError: what lies there must not count.
        StorageError: the store cannot be read.
    """
    key = answer_key(site, request)
    signed = _read(workspace.store_holding(key), key, site)
    if signed is None:
        return None
    answer = verified(signed, workspace.config.sites[site].public_key)
    if (answer.site, answer.request_sha256) != (site, request.sha256):
        raise _rejected(site, "it answers another request: another study, round, attempt or adapter")
    result = answer.result
    if isinstance(result, SiteFailure):
        return result
    match request:
        case PlanRequest() if isinstance(result, DomainPlan):
            problems = _problems_of_plan(workspace, request, result)
        case TrainRequest() if isinstance(result, ClientUpdate):
            problems = _problems_of_update(workspace, site, request, result)
        case EvaluateRequest() if isinstance(result, DomainEvaluation):
            problems = _problems_of_evaluation(workspace, request, result)
        case _:
            raise _rejected(site, f"it is a {type(result).__name__}, which was not asked for")
    for problem in problems:
        raise _rejected(site, problem)
    return result


def _read(store: ArtifactStore, key: str, site: str) -> SignedAnswer | None:
    try:
        stat = store.stat(key)
        if stat is None:
            return None
        if stat.n_bytes > MOST_ANSWER_BYTES:
            raise _rejected(site, f"it has {stat.n_bytes} bytes, allowed are {MOST_ANSWER_BYTES}")
        return SignedAnswer.model_validate(store.get_json(key))
    except (ValidationError, IntegrityError, RecursionError):
        raise _rejected(site, "it is no signed answer") from None


def _problems_of_plan(workspace: Workspace, request: PlanRequest, plan: DomainPlan) -> Iterator[str]:
    config = workspace.config
    domain = config.domain(request.domain)
    is_private = config.privacy.mode == "dp"
    yield from _differences(
        plan,
        domain=domain.name,
        rounds=config.rounds,
        steps_per_round=config.training.steps_per_round,
        clip_norm=config.clip_norm_of(domain),
        epsilon_budget=config.epsilon_of(domain) if is_private else None,
        privacy_level=config.privacy.level,
        planned_runs=config.privacy.planned_runs,
        bytes_up_per_round=workspace.traffic.bytes_up(domain.name),
    )
    numbers = [plan.sample_rate, plan.min_noise_multiplier, plan.delta, plan.noise_multiplier, plan.spent_rdp_before]
    if any(number is not None and not (0 <= number < math.inf) for number in numbers):
        yield "a number of the plan is negative or not finite"
    if not (plan.n_units >= 1 and 0 < plan.sample_rate <= 1):
        yield "it names no units, or a sample rate outside (0, 1]"
    if is_private and not plan.refusals and None in (plan.noise_multiplier, plan.rdp_order, plan.rdp_budget):
        yield "it names no noise or no budget, and refuses nothing"


def _problems_of_update(workspace: Workspace, site: str, request: TrainRequest, update: ClientUpdate) -> Iterator[str]:
    asked = request.assignment
    plan = next(plan for plan in workspace.plan.domains if plan.domain == asked.domain)
    yield from _differences(
        update,
        run_id=asked.run_id,
        round_index=asked.round_index,
        domain=asked.domain,
        n_units=plan.n_units,
        sample_rate=asked.sample_rate,
        noise_multiplier=asked.noise_multiplier,
        clip_norm=asked.clip_norm,
        epsilon_budget=plan.epsilon_budget,
        delta=plan.delta,
    )
    if update.status == "rested":
        return
    if update.status != "trained" or update.update is None:
        yield f"it says {update.status!r} where only 'trained' or 'rested' can be answered"
        return
    yield from _differences(update, steps=asked.steps, base_adapter_sha256=asked.global_adapter.sha256)
    if plan.delta is not None and not _DIGEST.fullmatch(update.ledger_entry):
        yield "it names no ledger entry that paid for its update"
        return
    ref = update.update
    if not ref.key.startswith(f"{folder_of(site, asked.domain, asked.run_id)}/rounds/{asked.round_index:04d}/"):
        yield "its update is not in the site's own folder of this round"
        return
    expected = workspace.traffic.bytes_up(asked.domain, asked.round_index)
    if not ref.n_bytes == update.bytes_up == expected:
        yield f"its update has {ref.n_bytes} bytes, expected {expected}"
        return
    yield from _problems_of_file(workspace, request, update)


def _problems_of_file(workspace: Workspace, request: TrainRequest, update: ClientUpdate) -> Iterator[str]:
    """Size before content: a site cannot make the server read more than one update's bytes."""
    assert update.update is not None
    asked = request.assignment
    try:
        store = workspace.store_holding(update.update.key)
        stat = store.stat(update.update.key)
        if stat is None or stat.n_bytes != update.update.n_bytes:
            yield "its update is not in the store, or has another size"
            return
        said = metadata_from_bytes(store.get(update.update))
    except FedMentorError:
        yield "the bytes of its update are not those that it signed"
        return
    base = asked.global_adapter.sha256
    if said != workspace.traffic.update_header(asked.domain, asked.round_index, update.attempt, base):
        yield "its update's own header names another study, round, global adapter or wire format"


def _problems_of_evaluation(workspace: Workspace, request: EvaluateRequest, found: DomainEvaluation) -> Iterator[str]:
    evaluation = workspace.config.evaluation
    yield from _differences(found, domain=request.domain, split=request.split)
    metrics = found.metrics
    shares = [getattr(metrics, name) for name in _SHARES]
    if any(value is not None and not 0 <= value <= 1 for value in shares):
        yield "a score is outside [0, 1]"
    most = evaluation.max_gate_examples if request.split == "gate" else evaluation.max_test_examples
    if not 1 <= metrics.n_examples <= most:
        yield f"it scored {metrics.n_examples} examples, allowed are 1 to {most}"
    is_private = evaluation.gate_data == "private"
    unreleased = [name for name in (*UNRELEASED_METRICS, "intervals") if getattr(metrics, name) is not None]
    if is_private and (found.metric_std is None or found.samples or found.rows or found.alarms or unreleased):
        yield "scores of a private set must be noised, without samples, rows, a maximum or any other metric"
    if metrics.perplexity is not None and not 1 <= metrics.perplexity < math.inf:
        yield "a perplexity is below 1 or not finite"
    if found.rows is not None and len(found.rows.units) != metrics.n_examples:
        yield f"it carries {len(found.rows.units)} rows of scores and scored {metrics.n_examples} examples"
    if len(found.samples) > evaluation.samples_in_report:
        yield f"it carries {len(found.samples)} samples, allowed are {evaluation.samples_in_report}"


def _differences(record: DomainPlan | ClientUpdate | DomainEvaluation, **expected: object) -> Iterator[str]:
    for name, value in expected.items():
        if getattr(record, name) != value:
            yield f"{name} is {getattr(record, name)!r}, expected {value!r}"


def _rejected(site: str, problem: str) -> AnswerRejectedError:
    return AnswerRejectedError(f"answer of site {site!r} rejected: {problem}.")
