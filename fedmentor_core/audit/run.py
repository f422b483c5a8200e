"""An audit: train once with canaries by the production path, then ask what was released about them.

    canaries   coins by the system's entropy; a unit that lost stays without targets        (``canaries.py``)
    train      assignments -> run_client (policy, filter, charge, DP-SGD, release) -> aggregate -> adapt,
               the functions of ``rounds/`` and ``client_round.py`` unchanged, watched by a step meter
    attack     two scores of each canary: how much the released updates lowered its loss, and how much of its gradient
               is in the noised gradients                                                   (``attack.py``)
    judge      lower bound against the ledger's epsilon; the ledger against a recount; noise and norm of every
               step that really happened; white-box probes                      (``bound``, ``recount``, ``probes``)

The adaptation rule is fed the worst utility there is after every round, so the schedule under audit is the one with
the least noise that the rule and the filter would ever allow.

It is a study of its own: own folder and store, no registry, no evaluation, no validation account. The released model
never saw a canary. By default it trains on invented text in the place of every domain's own (``standin.py``) and keeps
an account of its own, so it costs nobody anything. With the domains' own data, canaries are added to their units and
the run is charged to the lifetime accounts of ``privacy.ledger_url``, whose filters may refuse it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmentor_core import rounds
from fedmentor_core.audit import membership
from fedmentor_core.audit.attack import Attack, ClientTrace, gradient_scores, loss_scores
from fedmentor_core.audit.bound import best_bound, highest_reachable
from fedmentor_core.audit.canaries import AuditWorkspace, CanarySet, make_canaries
from fedmentor_core.audit.mechanism import Mechanism
from fedmentor_core.audit.meter import StepMeter
from fedmentor_core.audit.probes import ALARM, AuditCheck, run_probes
from fedmentor_core.audit.records import AuditReport, CurvePoint, DomainAudit, Interval, RocPoint
from fedmentor_core.audit.recount import (
    RoundDone,
    epsilon_of_ledger,
    epsilon_pld_elsewhere,
    epsilon_rdp_elsewhere,
    ledger_findings,
)
from fedmentor_core.audit.standin import canaries_that_fit, check_units, count_units, standin_config
from fedmentor_core.config import StudyConfig
from fedmentor_core.errors import BudgetError, ConfigError, OutputExistsError
from fedmentor_core.privacy.ledger import Ledger
from fedmentor_core.progress import Listener, ProgressEvent, silent
from fedmentor_core.records import ArtifactRef, DomainPlan, EvaluationMetrics, Metrics
from fedmentor_core.rounds import RoundState
from fedmentor_core.steps import train_with_retries
from fedmentor_core.study_ref import MARKER, claim_study, find_study
from fedmentor_core.workspace import client_key

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole audit run: every client of every round, and the final global adapter."""

    clients: tuple[ClientTrace, ...]
    final: ArtifactRef

    def of(self, domain: str) -> list[ClientTrace]:
        """One domain's rounds in which it trained, in order."""
        return [one for one in self.clients if one.assignment.domain == domain and one.update.status == "trained"]


def run_audit(
    config: StudyConfig,
    out_dir: str | Path,
    *,
    domain: str | None = None,
    n_canaries: int | None = None,
    confidence: float = CONFIDENCE,
    units: Mapping[str, int] | None = None,
    own_data: bool = False,
    listen: Listener = silent,
) -> AuditReport:
    """Audit a study's configuration and this installation's code.

    Args:
        config: the study; its rounds, sampling, clip and budgets are used as they are.
        out_dir: a folder that holds no study yet.
        domain: put canaries in this domain alone; default: in every domain.
        n_canaries: per audited domain; default: ``config.audit.canaries``.
        confidence: with which all lower bounds hold together.
        units: training units of every domain, a public number; default: counted in the data. Not for ``own_data``.
        own_data: train on the domains' own posts and charge the accounts at ``privacy.ledger_url``.
        listen: told of progress.

    Guarantees:
        Without ``own_data`` nothing of the domains is trained on, charged or written; with ``units`` none of it is
        even read.

    Raises:
        ConfigError: nothing to audit (privacy is off, or promised to clients rather than units), an unknown domain,
            an impossible number, ``own_data`` without a lifetime ledger.
        OutputExistsError: the folder is taken: an audit is never resumed, its coins are thrown once.
        BudgetError: a domain to be audited cannot train under its budget.
    """
    started = rounds.now()
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence: got {confidence}; allowed: between 0 and 1, such as 0.95.")
    asked = config.audit.canaries if n_canaries is None else n_canaries
    listen(ProgressEvent("prepare", "loading backbone, data and canaries", n_rounds=config.rounds))
    workspace = _prepare(config, Path(out_dir), domain, asked, units=units, own_data=own_data)
    plan = workspace.preflight()  # bad input is refused here, before anything is written
    refused = [one for one in plan.domains if one.domain in workspace.canaries and one.refusals]
    if refused:
        raise BudgetError("; ".join(refusal for one in refused for refusal in one.refusals))
    claim_study(workspace.ref)
    workspace.store.put_json(workspace.key("plan.json"), plan)
    trace = train_with_canaries(workspace, listen)
    each = 1.0 - (1.0 - confidence) / len(workspace.canaries)
    audits = []
    for name in workspace.canaries:
        listen(ProgressEvent("evaluate", "scoring canaries and probing", domain=name))
        audits.append(judge_domain(workspace, trace, name, each))
    listen(ProgressEvent("done", "audit done"))
    mechanism = Mechanism.of(config, workspace.backbone.sha256)
    return AuditReport.model_validate(
        {
            **_figures(audits),
            "study": workspace.config.name,
            "run_id": workspace.ref.run_id,
            "confidence": confidence,
            "warnings": _warnings(audits, asked),
            "data": "own" if own_data else "invented",
            "mechanism": mechanism,
            "mechanism_sha256": mechanism.sha256,
            "seconds": rounds.now() - started,
        }
    )


def _prepare(
    config: StudyConfig,
    out: Path,
    domain: str | None,
    n_canaries: int,
    *,
    units: Mapping[str, int] | None = None,
    own_data: bool = False,
) -> AuditWorkspace:
    """Refuse what cannot be audited, throw the coins, and set up the audit's own study. Writes nothing."""
    names = [one.name for one in config.domains]
    _refuse_without_promise(config)
    if domain is not None and domain not in names:
        raise ConfigError(f"domain: got {domain!r}; allowed: {', '.join(names)}.")
    if (out / MARKER).exists():
        raise OutputExistsError(
            f"output folder {out} already holds a study or an audit. An audit is not resumed, because its coins are "
            "thrown once. Nothing was changed. Give another --out."
        )
    audited = [name for name in names if domain in (None, name)]
    if own_data:
        _refuse_uncharged(config, units)
        canaries = {name: make_canaries(n_canaries) for name in audited}
        return AuditWorkspace(find_study(audit_config(config), out), canaries)
    units = count_units(config) if units is None else units
    check_units(config, units)
    canaries = {name: make_canaries(canaries_that_fit(n_canaries, units[name])) for name in audited}
    invented = {name: units[name] - len(canaries.get(name, ())) for name in names}
    return AuditWorkspace(find_study(audit_config(standin_config(config, invented)), out), canaries)


def _refuse_without_promise(config: StudyConfig) -> None:
    if config.privacy.mode != "dp":
        raise ConfigError("privacy.mode is 'none': nothing is claimed, so there is nothing to audit. Set it to 'dp'.")
    if config.privacy.level != "unit":
        raise ConfigError(
            f"privacy.level: got {config.privacy.level!r}; an audit allows 'unit' only. Canaries are units, and "
            "client-level privacy promises nothing about one unit's step by step gradient. Audit the study with "
            "privacy.level 'unit', or rely on the tests of the client-level mechanism."
        )


def _refuse_uncharged(config: StudyConfig, units: Mapping[str, int] | None) -> None:
    if units is not None:
        raise ConfigError("units: not allowed with the domains' own data, whose units are counted. Leave one out.")
    if config.privacy.ledger_url is None:
        raise ConfigError(
            "an audit on the domains' own data is a release like any other and must be charged to their lifetime "
            "accounts, but privacy.ledger_url is not set. Set it to the store that holds those accounts "
            "(file:///path or s3://bucket/prefix), or audit on invented data, which costs nobody anything."
        )


def audit_config(config: StudyConfig) -> StudyConfig:
    """The study as the audit runs it: the same mechanism, with a name and a store of its own and nothing evaluated.

    The gate and test sets are never looked at; calling them public keeps the plan from opening validation accounts.
    Where training starts is public, so it is no part of the mechanism: a new adapter serves as well as the champion.
    """
    return config.model_copy(
        update={
            "name": audit_name(config),
            "start_from": "backbone",
            "storage": config.storage.model_copy(update={"url": None}),
            "evaluation": config.evaluation.model_copy(update={"gate_data": "public"}),
            "tracking": config.tracking.model_copy(update={"enabled": False}),
        }
    )


def audit_name(config: StudyConfig) -> str:
    """The audit's own name as a study: the study's, as far as a name may be long."""
    return f"{config.name[:57]}-audit"


def train_with_canaries(workspace: AuditWorkspace, listen: Listener = silent) -> Trace:
    """Every round by the production functions; only evaluation is left out, and assumed at its worst."""
    config = workspace.config
    state = RoundState.first(workspace)
    seen: list[ClientTrace] = []
    for index in range(config.rounds):
        updates = []
        for assignment in rounds.assignments_for(workspace, state):
            drawn = workspace.draws(assignment.domain)
            with StepMeter(add=True, drawn=lambda drawn=drawn: drawn.total) as meter:  # type: ignore[misc]
                update = train_with_retries(workspace, assignment, listen)
            updates.append(update)
            seen.append(ClientTrace(assignment, update, tuple(meter.steps), meter.total))
        adapter, _ = rounds.aggregate(workspace, state.adapter, updates)
        _, noise, below = rounds.adapt(workspace, state, _metrics(workspace, 0.0), _best_comparisons(workspace))
        state = RoundState(index + 1, adapter, noise, below)
    return Trace(tuple(seen), state.adapter)


def _best_comparisons(workspace: AuditWorkspace) -> Mapping[str, EvaluationMetrics | None]:
    best = _metrics(workspace, 1.0)
    return {"baseline": best, "reference": best}


def _metrics(workspace: AuditWorkspace, value: float) -> EvaluationMetrics:
    one = Metrics(
        bertscore_f1=value, rouge_l=value, label_f1=value, safe_rate=value, toxicity_mean=1 - value,
        toxicity_max=1 - value, empty_rate=1 - value, n_examples=0,
    )  # fmt: skip
    by_domain = {domain.name: one for domain in workspace.config.domains}
    return EvaluationMetrics(**one.model_dump(), by_domain=by_domain)


def judge_domain(workspace: AuditWorkspace, trace: Trace, domain: str, confidence: float) -> DomainAudit:
    """Everything that is to be said of one audited domain."""
    plan = next(plan for plan in workspace.plan.domains if plan.domain == domain)
    canaries, done = workspace.canaries[domain], trace.of(domain)
    delta, order = plan.delta, plan.rdp_order
    assert delta is not None
    assert order is not None
    run_id = workspace.ref.run_id  # a lifetime account also holds other runs
    account = Ledger(workspace.ledger_store, domain).entries()  # from its first entry
    entries = [e for e in account if e.kind == "plan" or e.run_id == run_id]
    claimed = epsilon_of_ledger(entries)
    history = [round_done(workspace, one) for one in done]
    recomputed = epsilon_rdp_elsewhere([one.spend for one in history], order, delta)
    scores, model_scores = loss_scores(workspace, done, trace.final, domain)
    inner_scores = gradient_scores(workspace, done, plan)
    each_attack = 1.0 - (1.0 - confidence) / 2  # two attacks share the error
    by_attack: dict[Attack, list[float]] = {"loss": scores, "gradient": inner_scores}
    bounds = {attack: best_bound(found, canaries.included, delta, each_attack) for attack, found in by_attack.items()}
    best = max((bound for bound, _ in bounds.values()), key=lambda point: point.epsilon)
    estimate, inner = (membership.auc_estimate(found, canaries.included) for found in (scores, inner_scores))
    tpr_1, tpr_01 = (membership.tpr_estimate(scores, canaries.included, fpr) for fpr in (0.01, 0.001))
    exposed = membership.exposure(scores, canaries.included)
    drawn = _canary_draws(workspace, domain)
    least_noise = min((one.noise_multiplier for one in history), default=plan.noise_multiplier or 0.0)
    checks = [
        trained_check(workspace, trace, domain),
        bound_check(best.epsilon, claimed, confidence),
        ledger_check(ledger_findings(entries, history, recomputed), claimed, recomputed),
        *step_checks(workspace, plan, done),
        sampling_check(workspace, plan, done, n_attempts=sum(one.n_attempts for one in history)),
        *run_probes(workspace, plan, least_noise),
    ]
    return DomainAudit(
        domain=domain,
        passed=all(check.passed for check in checks),
        n_units=plan.n_units,
        n_canaries=len(canaries),
        n_included=sum(canaries.included),
        mean_draws=sum(drawn) / max(1, len(drawn)),
        steps=sum(one.steps for one in history),
        noise_multiplier=least_noise,
        clip_norm=plan.clip_norm,
        delta=delta,
        epsilon_lower_bound=best.epsilon,
        epsilon_reachable=highest_reachable(len(canaries), delta, each_attack),
        epsilon_claimed=claimed,
        epsilon_recomputed=recomputed,
        epsilon_recomputed_pld=epsilon_pld_elsewhere([one.spend for one in history], delta),
        bound_curve=tuple(
            CurvePoint(attack=attack, n_guesses=p.n_guesses, n_correct=p.n_correct, epsilon=p.epsilon)
            for attack, (_, curve) in bounds.items()
            for p in curve
        ),
        mia_auc=estimate.value,
        mia_auc_interval=_interval(estimate),
        tpr_at_1pct_fpr=tpr_1.value,
        tpr_at_1pct_fpr_interval=_interval(tpr_1),
        tpr_at_01pct_fpr=tpr_01.value,
        tpr_at_01pct_fpr_interval=_interval(tpr_01),
        mia_auc_model=membership.auc(model_scores, canaries.included),
        mia_auc_gradient=inner.value,
        mia_auc_gradient_interval=_interval(inner),
        exposure_mean=exposed.mean,
        exposure_max=exposed.highest,
        exposure_limit=exposed.limit,
        roc=tuple(
            RocPoint(attack=attack, fpr=fpr, tpr=tpr)
            for attack, found in by_attack.items()
            for fpr, tpr in membership.roc(found, canaries.included)
        ),
        checks=tuple(checks),
    )


# --- the checks on the run itself ------------------------------------------------------------------------------------


def trained_check(workspace: AuditWorkspace, trace: Trace, domain: str) -> AuditCheck:
    """The domain must have trained, and its run must be one that claims privacy."""
    statuses = [one.update.status for one in trace.clients if one.assignment.domain == domain]
    problems = sorted(
        {
            one.update.reason or one.update.status
            for one in trace.clients
            if one.assignment.domain == domain and one.update.status in ("failed", "rejected")
        }
    )
    if "trained" not in statuses:
        problems.append("it released nothing, so nothing was audited")
    if workspace.config.privacy.noise_seed is not None:
        problems.append("privacy.noise_seed is set: seeded noise can be subtracted, whatever its law")
    return AuditCheck(
        name="production run",
        passed=not problems,
        detail="; ".join(problems) or f"{statuses.count('trained')} of {len(statuses)} rounds trained and released",
    )


def bound_check(lower: float, claimed: float, confidence: float) -> AuditCheck:
    """The empirical lower bound must not exceed what the ledger says."""
    return AuditCheck(
        name="one-run bound",
        passed=lower <= claimed,
        detail=f"canaries show epsilon >= {lower:.3f} with {confidence:.1%} confidence; the ledger says {claimed:.3f}",
    )


def ledger_check(findings: Sequence[str], claimed: float, recomputed: float) -> AuditCheck:
    """See ``recount.py``."""
    agrees = f"the ledger says epsilon {claimed:.4f}; what was done costs {recomputed:.4f} by dp-accounting"
    return AuditCheck(name="ledger", passed=not findings, detail="; ".join(findings) or agrees)


def step_checks(workspace: AuditWorkspace, plan: DomainPlan, done: Sequence[ClientTrace]) -> list[AuditCheck]:
    r"""Noise and norm of every step of the run itself.

    With S the clipped sum, ||G q N / (sigma C)||^2 is a noncentral chi-square of d degrees of freedom with
    noncentrality ||S||^2 / (sigma C)^2 <= (|batch| / sigma)^2. So, whatever the data, it lies in the lower tail of the
    central one no more often than that tail says (else noise is missing), and in the upper tail of the one with the
    largest noncentrality no more often (else the clip does not bound).
    """
    from scipy.stats import chi2, ncx2

    lower, upper, n_steps = 1.0, 1.0, 0
    expected = plan.sample_rate * workspace.training_set(plan.domain).n_units
    for one in done:
        sigma = one.assignment.noise_multiplier or 0.0
        for step in one.steps:
            n_steps += 1
            if sigma <= 0 or step.n_coordinates == 0:
                lower = 0.0
                continue
            energy = (step.norm * expected / (sigma * one.assignment.clip_norm)) ** 2
            noncentrality = max(1e-12, (step.n_drawn / sigma) ** 2)
            lower = min(lower, float(chi2.cdf(energy, step.n_coordinates)))
            upper = min(upper, float(ncx2.sf(energy, step.n_coordinates, noncentrality)))
    limit = ALARM / max(1, n_steps)
    return [
        AuditCheck(
            name="noise of the run",
            passed=n_steps > 0 and lower > limit,
            detail=f"every one of {n_steps} steps that were taken must carry at least the noise it was charged for",
            p_value=min(1.0, lower * max(1, n_steps)),
        ),
        AuditCheck(
            name="norm of the run",
            passed=n_steps > 0 and upper > limit,
            detail="no step may be longer than its clipped units and its noise allow",
            p_value=min(1.0, upper * max(1, n_steps)),
        ),
    ]


def sampling_check(
    workspace: AuditWorkspace, plan: DomainPlan, done: Sequence[ClientTrace], n_attempts: int
) -> AuditCheck:
    """Units must not be drawn more often, all together or any one of them, than the charged rate says."""
    from scipy.stats import binom

    counted = workspace.draws(plan.domain)
    steps = sum(len(one.steps) for one in done) + n_attempts - len(done)  # a failed attempt may have drawn once more
    n_units = len(counted)
    p_all = float(binom.sf(counted.total - 1, n_units * steps, plan.sample_rate))
    p_one = min(1.0, n_units * float(binom.sf(max(counted.draws) - 1, steps, plan.sample_rate)))
    p = min(1.0, 2 * min(p_all, p_one))
    return AuditCheck(
        name="sampling",
        passed=p > ALARM,
        detail=f"{counted.total} draws of {n_units} units in {steps} steps, "
        f"{plan.sample_rate * n_units * steps:.0f} expected; the unit drawn most often: {max(counted.draws)}",
        p_value=p,
    )


def round_done(workspace: AuditWorkspace, one: ClientTrace) -> RoundDone:
    """What a client did in a round, from what was seen and what lies in the store."""
    assignment, update = one.assignment, one.update
    prefix = client_key(workspace, assignment.round_index, assignment.domain, "update-")
    folder = prefix.rsplit("/", 1)[0]
    stored = [key for key in workspace.store.list_keys(folder) if key.startswith(prefix)]
    assert assignment.noise_multiplier is not None
    assert update.update is not None
    return RoundDone(
        round_index=assignment.round_index,
        noise_multiplier=assignment.noise_multiplier,
        sample_rate=assignment.sample_rate,
        steps=len(one.steps),
        n_attempts=max(1, -(-len(one.steps) // assignment.steps)),
        n_stored=len(stored),
        handed_out=update.update.sha256,
    )


def _canary_draws(workspace: AuditWorkspace, domain: str) -> list[int]:
    canaries: CanarySet = workspace.canaries[domain]
    draws = workspace.draws(domain).draws[-len(canaries) :]
    return [count for count, included in zip(draws, canaries.included, strict=True) if included]


# --- the report -----------------------------------------------------------------------------------------------------


def _figures(audits: Sequence[DomainAudit]) -> dict[str, object]:
    """Verdict, and the figures of the domain that is nearest to its claim."""
    worst = max(audits, key=lambda one: (not one.passed, one.epsilon_lower_bound - one.epsilon_claimed))
    flat = ("epsilon_lower_bound", "epsilon_claimed", "mia_auc", "tpr_at_1pct_fpr", "n_canaries", "domain")
    return {
        **{name: getattr(worst, name) for name in flat},
        "passed": all(one.passed for one in audits),
        "reasons": tuple(
            f"{one.domain}: {check.name}: {check.detail}" for one in audits for check in one.checks if not check.passed
        ),
        "domains": tuple(audits),
    }


def _warnings(audits: Sequence[DomainAudit], asked: int) -> tuple[str, ...]:
    said = []
    for one in audits:
        if one.n_canaries < asked:
            said.append(
                f"{one.domain}: {one.n_canaries} canaries rather than {asked}, for it has {one.n_units} units, and the "
                "audited schedule is that of so many."
            )
        if one.epsilon_reachable <= one.epsilon_claimed:
            said.append(
                f"{one.domain}: even with every guess right, {one.n_canaries} canaries would show epsilon "
                f"{one.epsilon_reachable:.2f}, below the {one.epsilon_claimed:.2f} claimed: here the one-run bound "
                "cannot fail, and the verdict rests on the other checks."
            )
    return tuple(said)


def _interval(estimate: membership.Estimate) -> Interval:
    return Interval(low=estimate.low, high=estimate.high)
