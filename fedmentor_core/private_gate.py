"""Metrics of a private gate or test set: charge, evaluate, noise, store, release.

Order matters, and survives a crash at any line:

    1. the metrics of this adapter are stored already   -> hand out the same noised bytes again (free)
    2. the fingerprint rule and the set's account admit -> write the charge, before any of its rows is evaluated
    3. generate and score at the site; sum up and add noise
    4. store the noised metrics, create-if-absent
    5. write the release with their digest

A death before 4 leaves the charge standing, and the next attempt is charged anew. What is un-noised lives in the
memory of step 3 only: no row, no score and no sum of it is stored, logged, reported as progress or quoted by an error.
"""

import random
import time
from collections.abc import Callable

from fedmentor_core.data.units import digest_key, fingerprint
from fedmentor_core.discretion import discreet
from fedmentor_core.errors import AlreadyExistsError, DataError, IntegrityError
from fedmentor_core.evaluation.private_metrics import metrics_of_means, unit_scores
from fedmentor_core.evaluation.scores import EvaluationSet, Scorers, score_rows
from fedmentor_core.evaluation.turn import turn
from fedmentor_core.hashing import derive_seed, sha256_bytes
from fedmentor_core.privacy.discrete_gaussian import secret_dice
from fedmentor_core.privacy.filter import PrivacyAccount
from fedmentor_core.privacy.ledger import Ledger
from fedmentor_core.privacy.release import ReleasedMeans, release_means
from fedmentor_core.privacy.shared_posts import Claim, join_account, shortened, study_accounts
from fedmentor_core.privacy.validation_plan import SetName, noise_of_next_release, promised_account, terms_of
from fedmentor_core.records import ArtifactRef, DomainEvaluation, LedgerEntry, ValidationPlan
from fedmentor_core.workspace import Workspace

OnBatch = Callable[[int, int], None]


@discreet
def evaluate_privately(
    workspace: Workspace, adapter: ArtifactRef, domain: str, split: SetName, key: str, on_batch: OnBatch
) -> DomainEvaluation:
    """Noised metrics of an adapter on one private set; all that leaves the site of its rows.

    Args:
        workspace: the study's.
        adapter: to be evaluated.
        domain: whose set it is.
        split: which set.
        key: store key of the result.
        on_batch: progress in units (done, in all), since the number of rows is private.

    Raises:
        BudgetError: the set's account refuses; nothing was evaluated.
        DataError: the set is not the one that was planned; nothing was charged.
        LedgerError: the account is broken; nothing was evaluated.
        FedMentorError: the evaluation failed; its charge stands. The message never quotes the data.
    """
    plan = _plan_of(workspace, domain, split)
    ledger = workspace.ledger(plan.account)
    promised = promised_account(plan)
    if workspace.store.exists(key):
        return _stored(workspace, ledger, promised, adapter, key)
    # Whatever may be missing is looked for before the charge.
    data = workspace.evaluation_set(domain, split)
    scorers = workspace.scorers
    _check_unchanged(plan, data)

    account = ledger.open_account(
        promised,
        run_id=workspace.ref.run_id,
        dataset_fingerprint=plan.dataset_fingerprint,
        terms=terms_of(next(one for one in workspace.plan.domains if one.domain == domain), workspace.config),
        reason=f"study {workspace.config.name}: {plan.releases} releases of metrics of the {split} set",
    )
    _register_posts(workspace, ledger, plan, domain)
    charge = _charge(workspace, ledger, account, plan, adapter)
    started = time.perf_counter()
    means = _noised_means(workspace, adapter, data, scorers, charge, on_batch)
    result = DomainEvaluation(
        domain=domain,
        split=split,
        metrics=metrics_of_means(means, plan.n_units, data.form.answers),
        metric_std=means.std,
        scorers=scorers.identities,
        seconds=time.perf_counter() - started,
    )
    try:
        stored = workspace.store.put_json(key, result)
    except AlreadyExistsError:  # another process was faster: its numbers are out, ours never are
        return _stored(workspace, ledger, account, adapter, key)
    ledger.release_evaluation(account, charge, stored.sha256)
    return result


def _plan_of(workspace: Workspace, domain: str, split: SetName) -> ValidationPlan:
    return next(
        one for plan in workspace.plan.domains if plan.domain == domain for one in plan.validation if one.split == split
    )


def _stored(
    workspace: Workspace, ledger: Ledger, account: PrivacyAccount, adapter: ArtifactRef, key: str
) -> DomainEvaluation:
    """Metrics that are out already; their release is recorded where a death came between."""
    data = workspace.store.get_bytes(key)
    digest = sha256_bytes(data)
    entries = ledger.entries()
    if not any(entry.kind == "release" and entry.digest == digest for entry in entries):
        released = {entry.attempt for entry in _of(entries, workspace, adapter, "release")}
        unfinished = [e for e in _of(entries, workspace, adapter, "evaluation") if e.attempt not in released]
        if not unfinished or released:
            raise IntegrityError(
                f"{key} in {workspace.store.url}: its sha256 {digest} is not the one that the ledger of "
                f"{ledger.domain!r} released. The object was changed; restore it from a copy."
            )
        ledger.release_evaluation(account, unfinished[-1], digest)
    return DomainEvaluation.model_validate_json(data)


def _of(entries: list[LedgerEntry], workspace: Workspace, adapter: ArtifactRef, kind: str) -> list[LedgerEntry]:
    wanted = (kind, workspace.ref.run_id, adapter.sha256)
    return [entry for entry in entries if (entry.kind, entry.run_id, entry.adapter_sha256) == wanted]


def _check_unchanged(plan: ValidationPlan, data: EvaluationSet) -> None:
    found = fingerprint(str(row["unit_id"]) for row in data.rows)
    if found != plan.dataset_fingerprint:
        raise DataError(
            f"{plan.account}: its units changed since this study was planned (fingerprint {found[:12]}, planned "
            f"{plan.dataset_fingerprint[:12]}). Nothing was charged or evaluated. Restore the data, or start a new "
            "study with another --out."
        )


def _register_posts(workspace: Workspace, ledger: Ledger, plan: ValidationPlan, domain: str) -> None:
    """Store which posts the account protects: one that another account protects too loses the epsilons of both.

    So a post that was trained on under another split seed is found, and reported with what it loses in all.
    """
    config = workspace.config
    key = digest_key(config.data.digest_key_variable)
    posts = workspace.data[domain].post_digests(key, (plan.split,))
    join_account(
        workspace.ledger_store,
        key,
        Claim(plan.account, plan.dataset_fingerprint, shortened(posts)),
        siblings=study_accounts(workspace.plan),
        acknowledged=config.domain(domain).shares_posts_with,
        ledger=ledger,
    )


def _charge(
    workspace: Workspace, ledger: Ledger, account: PrivacyAccount, plan: ValidationPlan, adapter: ArtifactRef
) -> LedgerEntry:
    entries = ledger.entries()
    run_id = workspace.ref.run_id
    noise = noise_of_next_release(
        plan,
        account,
        spent_rdp=plan.spent_rdp_before + ledger.spent_rdp_by(run_id),
        released=len({entry.digest for entry in entries if entry.kind == "release" and entry.run_id == run_id}),
    )
    return ledger.charge_evaluation(
        account,
        run_id=run_id,
        adapter_sha256=adapter.sha256,
        attempt=len(_of(entries, workspace, adapter, "evaluation")),
        dataset_fingerprint=plan.dataset_fingerprint,
        noise_multiplier=noise,
        run_rdp_share=plan.run_rdp_share,
        seeded=workspace.config.privacy.noise_seed is not None,
    )


def _noised_means(
    workspace: Workspace,
    adapter: ArtifactRef,
    data: EvaluationSet,
    scorers: Scorers,
    charge: LedgerEntry,
    on_batch: OnBatch,
) -> ReleasedMeans:
    """Everything between the rows and what may be published of them."""
    units = [str(row["unit_id"]) for row in data.rows]
    n_units = len(set(units))
    with turn(workspace.evaluation_lock) as on_written:
        scored = score_rows(
            workspace.evaluation_model_with(adapter),
            workspace.backbone.tokenizer,
            data,
            scorers,
            workspace.config.evaluation,
            device=workspace.backbone.device,
            width=workspace.config.backbone.max_length - workspace.config.evaluation.max_new_tokens,
            on_batch=lambda done, total: on_batch(done * n_units // total, n_units),
            on_written=on_written,
        )
    assert charge.noise_multiplier is not None
    vectors = unit_scores(scored, units, data.form.answers)
    return release_means(vectors, charge.noise_multiplier, _dice(workspace, charge))


def _dice(workspace: Workspace, charge: LedgerEntry) -> random.Random:
    seed = workspace.config.privacy.noise_seed
    if seed is None:
        return secret_dice()
    return random.Random(derive_seed(seed, "metrics", charge.domain, charge.adapter_sha256, charge.attempt))
