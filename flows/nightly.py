"""Nightly retraining: one night's story, from the lifetime ledgers to the champion's alias.

A night looks at tonight's data and the ledgers, skips and says why where there is nothing to do, and otherwise runs an
ordinary study that starts from the champion, draws on the lifetime accounts, and is judged against the champion too.
Each night has a folder of its own in the output folder, with ``night.json`` written last: a night that was cut short
has none, and the next start takes it up again.
"""

from pathlib import Path

from prefect import flow

from fedmentor_core.config import StudyConfig
from fedmentor_core.discretion import discreet
from fedmentor_core.errors import BudgetError, FedMentorError, OutputExistsError, SiteError
from fedmentor_core.nights import NightReport, check_nightly, domain_nights, domains_with_news, why_not_tonight
from fedmentor_core.progress import ProgressEvent
from fedmentor_core.records import StudyPlan, StudySummary
from fedmentor_core.study_ref import StudyRef, claim_study, find_study
from fedmentor_core.workspace import Workspace, workspace_of
from flows.environment import default_store, tracking_uri_of
from flows.federated_training import PrefectEngine, federated_training
from flows.night_folders import next_night, nights, only_one_night, unfinished_night, write_report
from flows.track import try_to_catch_up
from tasks.champion import champion_data
from tasks.listening import InterruptedByUserError, tell
from tasks.night_report import night_artifact


@flow(name="nightly-retraining", flow_run_name="{config.name}", persist_result=False, log_prints=False)
@discreet
def nightly_retraining(config: StudyConfig, out_dir: str = "runs/nightly") -> NightReport:
    """Retrain from the champion on what is new, within tonight's share of the lifetime budgets, or say why not.

    The new adapter becomes champion when it passes every threshold, those relative to the champion included.

    Args:
        config: What is trained every night. At least one threshold must be relative to the champion, and real data
            needs privacy.ledger_url.
        out_dir: Folder of all nights, on the worker's machine; each night gets a folder in it.
    """
    check_nightly(config)
    root = Path(out_dir)
    with only_one_night(root):
        report = _night(night_config(config, root), root)
        night_artifact(report)
    return report


def night_config(config: StudyConfig, root: Path) -> StudyConfig:
    """The study of any night: it starts from the champion, and what outlives a night lies beside the nights."""
    privacy = config.privacy
    if privacy.ledger_url is None:  # of invented data, else ``check_nightly`` refused it
        privacy = privacy.model_copy(update={"ledger_url": (root.resolve() / "ledgers").as_uri()})
    uri = tracking_uri_of(config, root)
    tracking = config.tracking.model_copy(update={"uri": uri})
    return config.model_copy(update={"start_from": "champion", "privacy": privacy, "tracking": tracking})


def nightly_command(config: StudyConfig, root: Path) -> NightReport:
    """Body of ``fedmentor nightly``.

    Raises:
        ConfigError: what cannot be repeated every night, or another night that is running.
        FedMentorError: the night failed; the next start takes it up again.
    """
    return nightly_retraining(config, str(root))


def _night(config: StudyConfig, root: Path) -> NightReport:
    assert config.tracking.uri is not None  # ``night_config`` set it
    for folder in nights(root):  # the champion may be a night that MLflow has not heard of yet
        if caught_up := try_to_catch_up(folder):
            tell(ProgressEvent("prepare", caught_up))
    champion = champion_data(config.tracking.uri, config.tracking.registered_model)
    ref = _unfinished(config, root)
    resumed = ref is not None
    ref = ref or find_study(config, next_night(root), default_store())
    report = NightReport(
        night=Path(ref.out_dir).name,
        study=config.name,
        outcome="failed",
        reason="",
        resumed=resumed,
        champion_before=None if champion is None else champion.version,
        private=config.is_private,
    )
    try:
        plan = _plan(ref, resumed)
    except (BudgetError, SiteError) as error:
        outcome = "site_down" if isinstance(error, SiteError) else "no_budget"
        return write_report(Path(ref.out_dir), report.model_copy(update={"outcome": outcome, "reason": str(error)}))
    news = domains_with_news(
        {one.domain: one.dataset_fingerprint for one in plan.domains},
        None if champion is None else champion.fingerprints,
    )
    skip = None if resumed else why_not_tonight(plan, news, report.champion_before, config)
    if skip is not None:
        outcome, reason = skip
        report = report.model_copy(update={"outcome": outcome, "reason": reason, "domains": domain_nights(plan, news)})
        return write_report(Path(ref.out_dir), report)
    claim_study(ref)
    try:
        summary = federated_training(config, ref.out_dir)
    except InterruptedByUserError:
        raise
    except FedMentorError as error:
        if resumed:  # what fails twice would fail every night
            _give_up(config, Path(ref.out_dir), f"it failed again: {error}")
        raise
    judged = next(one for one in summary.rounds if one.round_index == summary.selected_round)
    report = report.model_copy(
        update={
            "outcome": summary.status,
            "reason": "; ".join(judged.gate.reasons) or _why(summary),
            "run_id": summary.run_id,
            "model": summary.model,
            "domains": domain_nights(summary.plan, news, summary.rounds),
            "warnings": summary.warnings,
        }
    )
    return write_report(Path(ref.out_dir), report)


def _plan(ref: StudyRef, resumed: bool) -> StudyPlan:
    """Tonight's plan, or the one that a night that is taken up again began with.

    Raises:
        BudgetError: no domain can train.
        SiteError: too few sites answered.
    """
    workspace = workspace_of(ref)
    if workspace.domains_at_sites:
        return PrefectEngine(ref, workspace, None, "").plan()  # kept under the run's id; asks each site once
    return workspace.plan if resumed else workspace.make_plan()


def _why(summary: StudySummary) -> str:
    """Why a study whose gate passed ended as it did."""
    if summary.model is None:
        return "the gate passed, and its adapter is registered as soon as MLflow answers"
    return {"promoted": "every threshold passed", "budget_exhausted": "every client rested"}.get(
        summary.status, "the gate passed, and the registry held it back: see its tag fedmentor.held"
    )


def _unfinished(config: StudyConfig, root: Path) -> StudyRef | None:
    """The night that a crash cut short, to be taken up again; one of another study or other data is given up.

    What it charged stays charged either way. Of data at sites only the sites can tell: they then refuse to train.
    """
    folder = unfinished_night(root)
    if folder is None:
        return None
    try:
        ref = find_study(config, folder)
    except OutputExistsError:
        return _give_up(config, folder, "the study's configuration changed since")
    workspace = Workspace(ref)  # not the one this process may have had then: the data is read anew
    if not workspace.store.exists(workspace.key("plan.json")):
        return ref  # it was cut short before it had a plan
    begun = {one.domain: one.dataset_fingerprint for one in workspace.plan.domains}
    now = {one.domain: one.dataset_fingerprint for one in workspace.make_plan().domains}
    if any(begun[name] != found for name, found in now.items() if name in begun):
        return _give_up(config, folder, "its data changed since")
    return ref


def _give_up(config: StudyConfig, folder: Path, reason: str) -> None:
    report = NightReport(
        night=folder.name, study=config.name, outcome="abandoned", reason=reason, private=config.is_private
    )
    write_report(folder, report)
