"""One client's part of a round, at its site: ask the policy, charge, train, store, release.

Order matters, and survives a crash at any line:

    1. a finished update of this round exists  -> hand out the identical noised bytes again (free)
    2. the site's policy, the fingerprint rule and the filter admit -> write the charge, before any data is touched
    3. train, store the noised update under its attempt, rounded as ``wire.upload`` says (post-processing: free)
    4. write the release with the update's digest
    5. write ``update.json`` last: the client's commit point

A death before 5 leaves the charge standing. If the release was already written, and its bytes start from the global
adapter that is asked about, they are handed out; otherwise the next attempt is charged anew.
"""

import time
from collections.abc import Callable
from dataclasses import replace

from fedmentor_core.adapters.lora import metadata_from_bytes
from fedmentor_core.data.units import digest_key
from fedmentor_core.errors import BudgetError, DataError, NotFoundError
from fedmentor_core.hashing import derive_seed
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.ledger import Ledger, Terms
from fedmentor_core.privacy.mechanism import charged_events
from fedmentor_core.privacy.output import perturb_update
from fedmentor_core.privacy.policy import policy_refusal
from fedmentor_core.privacy.shared_posts import join_account, study_accounts, training_claim
from fedmentor_core.records import ArtifactRef, ClientAssignment, ClientStatus, ClientUpdate, DomainPlan
from fedmentor_core.training.client import LocalRound, train_locally
from fedmentor_core.wire.codecs import find_codec
from fedmentor_core.wire.traffic import update_metadata
from fedmentor_core.wire.update import Base, encode_update, update_seed
from fedmentor_core.workspace import Workspace, client_key, find_update

OnStep = Callable[[int, int], None]


def run_client(
    workspace: Workspace, assignment: ClientAssignment, on_step: OnStep = lambda done, total: None
) -> ClientUpdate:
    """Train one client for one round; what it returns is all that leaves the site.

    Returns:
        status 'trained' with the update's reference, or 'rested' when the domain's budget, policy or filter refuses
        (nothing was trained, no byte changed but the ledger's refusal).

    Raises:
        LedgerError: the account is broken; nothing is trained.
        DeadlineError, FedMentorError: the attempt failed; its charge stands.
    """
    started = time.perf_counter()
    done = find_update(workspace, assignment.round_index, assignment.domain)
    if done is not None:
        return done
    plan = next(plan for plan in workspace.plan.domains if plan.domain == assignment.domain)
    found = workspace.data[assignment.domain].fingerprint
    if found != plan.dataset_fingerprint:
        raise DataError(
            f"domain {assignment.domain!r}: its data changed since this study was planned (fingerprint {found[:12]}, "
            f"planned {plan.dataset_fingerprint[:12]}). Nothing was charged or trained. Restore the data, or start "
            "a new study with another --out."
        )
    policy = workspace.policy(assignment.domain)
    refusal = policy_refusal(
        policy,
        plan,
        assignment,
        workspace.backbone.sha256,
        workspace.resolved_adapter_of(assignment.domain),
        is_private=workspace.config.is_private,
    )
    if workspace.config.privacy.mode == "none":
        if refusal is not None:
            return _rest(assignment, plan, None, 0.0, refusal, started)
        update, attempt = _train(workspace, assignment, 0, on_step), 0
        return _commit(workspace, assignment, plan, None, update, attempt, started)

    ledger = workspace.ledger(assignment.domain)
    promised = PrivacyAccount.of(plan)
    if plan.refusals or promised is None:
        in_force = ledger.account()
        if refusal is not None and in_force is not None:  # of an account that was never open nothing is written
            ledger.refuse(in_force, run_id=assignment.run_id, round_index=assignment.round_index, reason=refusal)
        return _rest(assignment, plan, in_force, ledger.spent_rdp(), "; ".join(plan.refusals), started)
    account = ledger.open_account(
        promised,
        run_id=assignment.run_id,
        dataset_fingerprint=plan.dataset_fingerprint,
        terms=replace(Terms.of(plan), policy_sha256=policy.sha256),
        reason=f"study {workspace.config.name}: {plan.rounds} rounds of {plan.steps_per_round} steps",
    )
    recovered = _recover(workspace, ledger, assignment)
    if recovered is not None:
        update, attempt = recovered
        return _commit(workspace, assignment, plan, account, update, attempt, started)

    shared = _sharing_refusal(workspace, ledger, plan) if refusal is None else None
    inward, outward = (shared, workspace.outward(shared)) if shared is not None else (refusal, refusal)
    if inward is not None and outward is not None:
        ledger.refuse(account, run_id=assignment.run_id, round_index=assignment.round_index, reason=inward)
        return _rest(assignment, plan, account, ledger.spent_rdp(), outward, started)
    assert assignment.noise_multiplier is not None
    attempt = ledger.next_attempt(assignment.run_id, assignment.round_index)
    events = charged_events(workspace.config.privacy.level, assignment.sample_rate, assignment.steps)
    try:
        ledger.charge(
            account,
            run_id=assignment.run_id,
            round_index=assignment.round_index,
            attempt=attempt,
            dataset_fingerprint=plan.dataset_fingerprint,
            noise_multiplier=assignment.noise_multiplier,
            sample_rate=events.sample_rate,
            steps=events.steps,
            privacy_level=plan.privacy_level,
            run_rdp_share=plan.run_rdp_share,
            seeded=workspace.config.privacy.noise_seed is not None,
        )
    except BudgetError as error:
        earlier = f"{attempt} earlier attempt(s) at this round failed and stay charged; " if attempt else ""
        return _rest(assignment, plan, account, ledger.spent_rdp(), earlier + str(error), started)
    update = _train(workspace, assignment, attempt, on_step)
    ledger.release(
        account,
        run_id=assignment.run_id,
        round_index=assignment.round_index,
        attempt=attempt,
        digest=update.sha256,
        dataset_fingerprint=plan.dataset_fingerprint,
    )
    return _commit(workspace, assignment, plan, account, update, attempt, started)


def _sharing_refusal(workspace: Workspace, ledger: Ledger, plan: DomainPlan) -> str | None:
    """Store which posts the account protects, and say why it may not be charged for them, if so."""
    config = workspace.config
    try:
        join_account(
            workspace.ledger_store,
            digest_key(config.data.digest_key_variable),
            training_claim(config, plan, workspace.data[plan.domain]),
            siblings=study_accounts(workspace.plan),
            acknowledged=config.domain(plan.domain).shares_posts_with,
            ledger=ledger,
        )
    except BudgetError as error:
        return str(error)
    return None


def _train(workspace: Workspace, assignment: ClientAssignment, attempt: int, on_step: OnStep) -> ArtifactRef:
    config = workspace.config
    noise_seed = None
    if config.privacy.noise_seed is not None:
        noise_seed = derive_seed(config.privacy.noise_seed, "noise", assignment.round_index, assignment.domain, attempt)
    per_client = config.privacy.level == "client" and assignment.noise_multiplier is not None
    model = workspace.model_with(assignment.global_adapter, assignment.round_index, assignment.domain)
    state = train_locally(
        model,
        workspace.training_set(assignment.domain),
        config.training,
        LocalRound(
            sample_rate=assignment.sample_rate,
            steps=assignment.steps,
            noise_multiplier=None if per_client else assignment.noise_multiplier,
            clip_norm=assignment.clip_norm,
            order_seed=derive_seed(config.seed, "order", assignment.round_index, assignment.domain),
            noise_seed=noise_seed,
            prox_mu=config.aggregation.prox_mu,
        ),
        device=workspace.backbone.device,
        on_step=on_step,
    )
    before = workspace.trained_part(assignment.global_adapter, assignment.round_index, assignment.domain)
    if per_client:
        state = perturb_update(
            before,
            state,
            noise_multiplier=assignment.noise_multiplier or 0.0,
            clip_norm=assignment.clip_norm,
            noise_seed=noise_seed,
        )
    # From here on everything is post-processing: the update was noised and charged, and the coins are public.
    base = Base(assignment.global_adapter.sha256, before)
    data = encode_update(
        state,
        find_codec(config.wire.upload),
        base,
        update_metadata(assignment.run_id, assignment.round_index, base.sha256),
        update_seed(config.seed, assignment.round_index, assignment.domain, attempt),
    )
    return workspace.store.put(_update_key(workspace, assignment, attempt), data)


def _update_key(workspace: Workspace, assignment: ClientAssignment, attempt: int) -> str:
    return client_key(workspace, assignment.round_index, assignment.domain, f"update-{attempt:03d}.safetensors")


def _recover(workspace: Workspace, ledger: Ledger, assignment: ClientAssignment) -> tuple[ArtifactRef, int] | None:
    """The bytes of an attempt that was released but not committed: the same bytes may leave again, free."""
    for entry in reversed(ledger.entries()):
        if (entry.kind, entry.run_id, entry.round_index) == ("release", assignment.run_id, assignment.round_index):
            key = _update_key(workspace, assignment, entry.attempt)
            try:
                size = len(workspace.store.get_bytes(key))
            except NotFoundError:
                return None
            ref = ArtifactRef(key=key, sha256=entry.digest, n_bytes=size)
            said = metadata_from_bytes(workspace.store.get(ref))  # verified against the ledger's digest
            if said.get("base_sha256") != assignment.global_adapter.sha256:
                return None  # an update of another global adapter is of no use to this round
            return ref, entry.attempt
    return None


def _commit(
    workspace: Workspace,
    assignment: ClientAssignment,
    plan: DomainPlan,
    account: PrivacyAccount | None,
    update: ArtifactRef,
    attempt: int,
    started: float,
) -> ClientUpdate:
    spent = None if account is None else account.epsilon_spent(workspace.ledger(assignment.domain).spent_rdp())
    result = _result(assignment, plan, "trained", spent, started).model_copy(
        update={
            "attempt": attempt,
            "update": update,
            "base_adapter_sha256": assignment.global_adapter.sha256,
            "ledger_entry": "" if account is None else workspace.newest_entry(assignment.domain),
            "bytes_up": update.n_bytes,
            "bytes_down": workspace.bytes_down(assignment.global_adapter, assignment.round_index),
        }
    )
    workspace.store.put_json(client_key(workspace, assignment.round_index, assignment.domain, "update.json"), result)
    return result


def _rest(
    assignment: ClientAssignment,
    plan: DomainPlan,
    account: PrivacyAccount | None,
    spent_rdp: float,
    reason: str,
    started: float,
) -> ClientUpdate:
    spent = 0.0 if account is None else account.epsilon_spent(spent_rdp)
    return rested_client(assignment, plan, spent, reason, started)


def rested_client(
    assignment: ClientAssignment, plan: DomainPlan, epsilon_spent: float, reason: str, started: float | None = None
) -> ClientUpdate:
    """The record of a client that rests; ``started`` on the clock of ``time.perf_counter``."""
    begun = time.perf_counter() if started is None else started
    result = _result(assignment, plan, "rested", epsilon_spent, begun)
    return result.model_copy(update={"steps": 0, "reason": reason})


def failed_client(
    assignment: ClientAssignment,
    plan: DomainPlan,
    epsilon_spent: float | None,
    reason: str,
    status: ClientStatus = "failed",
) -> ClientUpdate:
    """The record of a client whose attempts all failed, or whose answer was rejected."""
    result = _result(assignment, plan, status, epsilon_spent, time.perf_counter())
    return result.model_copy(update={"reason": reason})


def _result(
    assignment: ClientAssignment, plan: DomainPlan, status: ClientStatus, spent: float | None, started: float
) -> ClientUpdate:
    return ClientUpdate(
        run_id=assignment.run_id,
        round_index=assignment.round_index,
        domain=assignment.domain,
        status=status,
        n_units=plan.n_units,
        sample_rate=assignment.sample_rate,
        steps=assignment.steps,
        noise_multiplier=assignment.noise_multiplier,
        clip_norm=assignment.clip_norm,
        epsilon_spent=spent,
        epsilon_budget=plan.epsilon_budget,
        delta=plan.delta,
        bytes_up=0,
        bytes_down=0,
        seconds=time.perf_counter() - started,
    )
