"""The command line. Heavy libraries are imported inside the commands, so that ``--help`` is quick."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmentor_core import __version__
from fedmentor_core.discretion import WithheldError, failure_reason, places_of, texts_withheld
from fedmentor_core.errors import ConfigError, FedMentorError
from flows.compare_cli import compare
from flows.site_cli import site_app
from flows.track import track, try_to_catch_up

if TYPE_CHECKING:
    from fedmentor_core.config import StorageConfig, StudyConfig
    from fedmentor_core.nights import NightReport
    from fedmentor_core.records import StudySummary

app = typer.Typer(
    name="fedmentor",
    help="Fine-tune a language model across organisations that may not share their text: private, useful, safe.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Look at a study's data, or fetch a public corpus.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(site_app, name="site")
app.command()(track)
app.command()(compare)

CONFIGS = Path(__file__).resolve().parent.parent / "infra" / "configs"
DEFAULT_CONFIG = CONFIGS / "quickstart.yaml"

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="Study configuration (YAML).")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: --set rounds=2. Repeatable.")
]
EndpointOption = Annotated[
    str | None, typer.Option("--endpoint-url", help="S3-compatible endpoint; default: AWS_ENDPOINT_URL, else Amazon's.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def main() -> None:
    """Entry point: our own errors become one message and an exit code, never a traceback."""
    try:
        with texts_withheld():
            app(standalone_mode=True)
    except FedMentorError as error:
        hint = "; its text is withheld, because it may quote data. Where it was raised is in the folder's run.log."
        print(f"fedmentor: {error}{hint if isinstance(error, WithheldError) else ''}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        print(f"fedmentor: {failure_reason(error)}; its text is withheld, because it may quote data. Raised at:\n"
              f"{places_of(error)}", file=sys.stderr)  # fmt: skip
        sys.exit(1)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"fedmentor {__version__}")
        raise typer.Exit()


@app.command()
def run(
    config: ConfigOption = DEFAULT_CONFIG,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Output folder; default: runs/<name of the config file>.")
    ] = None,
    overrides: SetOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Progress as plain lines even on a terminal.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a federated study: train, gate, register. An interrupted study resumes; a finished one is shown again.

    Leaves summary.json, report.html, the artifact store and the MLflow database in the output folder.

    Example: **fedmentor run --config infra/configs/quickstart.yaml --out runs/quickstart**

    Exit codes: 0 promoted, 2 bad input, 3 the gate or the budget said no, 1 anything else.
    """
    study = _load(config, overrides)
    folder = out or Path("runs") / config.stem
    from flows.environment import prepare_environment

    prepare_environment(folder)
    if caught_up := try_to_catch_up(folder):
        print(caught_up, file=sys.stderr)
    summary = _finished(study, folder)
    if summary is None:
        summary = _run(study, folder, "quiet" if quiet or as_json else "plain" if plain else "auto")
    elif not (quiet or as_json):
        print(f"{folder} already holds this finished study; showing its result.", file=sys.stderr)
    if as_json:
        print(summary.model_dump_json(by_alias=True, indent=2))
    else:
        from flows.result_view import print_summary

        print_summary(summary, folder)
    if summary.status != "promoted":
        raise typer.Exit(3)


@app.command()
def nightly(
    config: ConfigOption = CONFIGS / "nightly.yaml",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of all nights; each gets one in it.")] = Path(
        "runs/nightly"
    ),
    overrides: SetOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Progress as plain lines even on a terminal.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Retrain from the champion on what is new, within tonight's share of the budgets; or say why there is no need.

    A night that was cut short is taken up again. The new adapter becomes champion only if it passes its gate, which
    must look at the present champion too. Leaves night.json in the night's own folder.

    Example: **fedmentor nightly --config infra/configs/nightly.yaml --out runs/nightly**

    Exit codes: 0 promoted, or nothing new; 2 bad input; 3 the gate or the budget said no; 1 anything else.
    """
    study = _load(config, overrides)
    from flows.environment import prepare_environment

    prepare_environment(out)
    report = _run_night(study, out, "quiet" if quiet or as_json else "plain" if plain else "auto")
    print(report.model_dump_json(indent=2) if as_json else report)
    if report.outcome not in ("promoted", "nothing_new"):
        raise typer.Exit(3)


@app.command()
def plan(
    config: ConfigOption = DEFAULT_CONFIG,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A study's folder: plan with what its ledgers say is spent.")
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show, before any training, what each domain is promised and what the schedule will cost it.

    Example: **fedmentor plan --config infra/configs/quickstart.yaml --json**
    """
    study = _load(config, overrides)
    import tempfile

    from fedmentor_core.study_ref import find_study
    from fedmentor_core.workspace import Workspace
    from flows.environment import default_store
    from flows.quiet import silence_libraries

    silence_libraries()
    with tempfile.TemporaryDirectory(prefix="fedmentor-plan-") as scratch:
        made = Workspace(find_study(study, out or scratch, default_store())).make_plan(from_files=True)
    if as_json:
        print(made.model_dump_json(indent=2))
    else:
        from flows.result_view import print_plan

        print_plan(made)
    if made.refusals and all(domain.refusals for domain in made.domains):
        raise typer.Exit(3)


@app.command()
def ledger(
    store: Annotated[
        str | None, typer.Option(help="Store URL (file:///path or s3://bucket/prefix) that holds the ledgers.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Or a study's output folder.")] = None,
    domain: Annotated[str | None, typer.Option(help="Only this domain.")] = None,
    endpoint_url: EndpointOption = None,
    encryption_key_file: Annotated[
        Path | None, typer.Option(help="Key file of an encrypted store (storage.encryption_key_file).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show and verify the privacy ledgers: how much of each domain's budget is gone, and how much is left for tonight.

    Example: **fedmentor ledger --out runs/quickstart**

    Exit codes: 0 every chain is verified, 2 bad input, 3 a chain is broken (the others are still shown).
    """
    from fedmentor_core.privacy.ledger_report import read_ledgers
    from fedmentor_core.storage.base import open_store
    from fedmentor_core.study_ref import ledgers_url

    if (store is None) == (out is None):
        raise ConfigError("give exactly one of --store URL and --out DIR. Example: --out runs/quickstart")
    if out is not None:
        store = ledgers_url(out)
    settings = _storage_settings(
        endpoint_url=endpoint_url, encryption_key_file=None if encryption_key_file is None else str(encryption_key_file)
    )
    found = read_ledgers(open_store(str(store), settings), [domain] if domain else [])
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        from flows.result_view import print_ledger

        print_ledger(found)
    if not found.verified:
        raise typer.Exit(3)


@app.command()
def audit(
    config: ConfigOption = DEFAULT_CONFIG,
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for the audit's own run and report.")] = Path(
        "runs/audit"
    ),
    domain: Annotated[str | None, typer.Option(help="Put canaries in this domain only; default: in every one.")] = None,
    canaries: Annotated[int | None, typer.Option(help="Canaries per audited domain; default: audit.canaries.")] = None,
    confidence: Annotated[float, typer.Option(help="With which all lower bounds hold together.")] = 0.95,
    units: Annotated[
        list[str] | None,
        typer.Option(metavar="N or NAME=N", help="Training units of each domain; default: counted in its data."),
    ] = None,
    with_own_data: Annotated[
        bool, typer.Option(help="Train on the domains' own posts, charged to the accounts at privacy.ledger_url.")
    ] = False,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Try to catch the code breaking its promise: train once with canaries, attack, count the ledger again, probe.

    Apart from the released model, and on invented posts, so that it costs nobody any budget: with --units it reads no
    data at all. Leaves audit.json and audit.html in the folder.

    Example: **fedmentor audit --config infra/configs/quickstart.yaml --out runs/audit**

    Exit codes: 0 passed, 2 bad input, 3 the audit failed or the budget said no, 1 anything else.
    """
    study = _load(config, overrides)
    from flows.quiet import silence_libraries

    silence_libraries()
    from flows.auditing import audit_command, units_of

    made = audit_command(
        study,
        out,
        domain=domain,
        n_canaries=canaries,
        confidence=confidence,
        units=units_of(study, units or []),
        own_data=with_own_data,
        as_json=as_json,
    )
    if not made.passed:
        raise typer.Exit(3)


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="A study's output folder.")],
) -> None:
    """Rebuild report.html of a finished study from its store.

    Example: **fedmentor report runs/quickstart**
    """
    from fedmentor_core.config_io import load_config
    from fedmentor_core.records import StudySummary
    from flows.quiet import silence_libraries

    silence_libraries()
    for name in ("summary.json", "config.yaml", "study.json"):
        if not (out / name).is_file():
            raise ConfigError(f"{out} holds no {name}: not a finished study. Run 'fedmentor run' first.")
    from fedmentor_core.study_ref import open_study
    from fedmentor_core.workspace import workspace_of
    from flows.outputs import write_outputs

    ref = open_study(load_config(out / "config.yaml"), out)
    summary = StudySummary.model_validate_json((out / "summary.json").read_text(encoding="utf-8"))
    print(write_outputs(ref, workspace_of(ref), summary).report)


@app.command()
def generate(
    model: Annotated[
        str, typer.Option(help="models:/NAME@champion, another alias, or models:/NAME/VERSION.")
    ] = "models:/fedmentor-adapter@champion",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The study's output folder.")] = None,
    tracking_uri: Annotated[str | None, typer.Option(help="Or MLflow's tracking URI.")] = None,
    post: Annotated[str | None, typer.Option(help="The text to ask about.")] = None,
    question: Annotated[str | None, typer.Option(help="What to ask.")] = None,
    input_file: Annotated[
        Path | None, typer.Option("--input", help="JSONL with post and question on each line, instead of --post.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Where the backbone is now, if it moved.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a registered model.

    Example: **fedmentor generate --out runs/quickstart --post "I cannot sleep before exams."
    --question "Does the writer feel overloaded?"**
    """
    from flows.quiet import silence_libraries

    silence_libraries()
    from flows.generate import generate_command

    generate_command(
        model,
        _tracking_uri(out, tracking_uri),
        post=post,
        question=question,
        input_file=input_file,
        max_new_tokens=max_new_tokens,
        backbone=backbone,
        as_json=as_json,
    )


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="Version to make champion; it must have passed its gate.")],
    name: Annotated[str, typer.Option(help="Registered model.")] = "fedmentor-adapter",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A study's output folder.")] = None,
    tracking_uri: Annotated[str | None, typer.Option(help="Or MLflow's tracking URI.")] = None,
    reason: Annotated[str, typer.Option(help="Recorded with the version.")] = "by hand",
    audit: Annotated[
        Path | None, typer.Option(help="audit.json, or its folder: promote only if it passed on this mechanism.")
    ] = None,
) -> None:
    """Make a version champion by hand.

    Example: **fedmentor promote 2 --out runs/quickstart --audit runs/audit --reason "reviewed"**

    Exit codes: 0 promoted, 2 bad input, 3 its gate or its audit says no, 1 anything else.
    """
    from flows.quiet import silence_libraries

    silence_libraries()
    from flows.promote import promote_command

    made = promote_command(_tracking_uri(out, tracking_uri), name, version, reason=reason, audit=audit)
    print(f"{made.name} version {made.version} is now {', '.join(made.aliases)}")


@app.command()
def rollback(
    name: Annotated[str, typer.Option(help="Registered model.")] = "fedmentor-adapter",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A study's output folder.")] = None,
    tracking_uri: Annotated[str | None, typer.Option(help="Or MLflow's tracking URI.")] = None,
    reason: Annotated[str, typer.Option(help="Recorded with both versions.")] = "by hand",
) -> None:
    """Give the champion alias back to the version that was champion before.

    Example: **fedmentor rollback --out runs/quickstart --reason "complaint 17"**
    """
    from flows.quiet import silence_libraries

    silence_libraries()
    from tasks.registry import rollback as roll_back

    made = roll_back(_tracking_uri(out, tracking_uri), name, reason=reason)
    print(f"{made.name} version {made.version} is champion again")


@app.command()
def doctor(
    store: Annotated[
        str | None, typer.Option(help="Store to try out (file:///path or s3://bucket/prefix); default: this machine.")
    ] = None,
    endpoint_url: EndpointOption = None,
    region: Annotated[str, typer.Option(help="The bucket's region.")] = "us-east-1",
    addressing_style: Annotated[str, typer.Option(help="path, virtual or auto.")] = "path",
    as_json: JsonOption = False,
) -> None:
    """Try out a store for everything FedMentor relies on, or look at this machine; say what is missing and what to do.

    Writes a few small objects (one of 5 MB) below the store's prefix and removes them again, or says what it left.

    Example: **fedmentor doctor --store s3://fedmentor/site-a --endpoint-url http://localhost:9000**

    Exit codes: 0 nothing failed, 2 bad input, 3 something we rely on is missing.
    """
    from flows.doctor import doctor_command

    settings = _storage_settings(
        endpoint_url=endpoint_url, region=region, addressing_style=addressing_style, deadline_seconds=15
    )
    if not doctor_command(store, settings, as_json=as_json):
        raise typer.Exit(3)


@app.command()
def metrics(
    store: Annotated[list[str], typer.Option(help="Store to read (file:///path or s3://bucket/prefix). Repeatable.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve /metrics on.")] = 9464,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    endpoint_url: EndpointOption = None,
    encryption_key_file: Annotated[Path | None, typer.Option(help="Key file of an encrypted store.")] = None,
) -> None:
    """Serve Prometheus metrics from ledgers and round manifests: budget left, noise, gate, clients, time, bytes.

    Needs to read ledgers and manifests only (infra/policies/store_monitor.json); shows public numbers only.

    Example: **fedmentor metrics --store s3://fedmentor-site-a/ledger --port 9464**
    """
    from fedmentor_core.storage.base import open_store
    from flows.metrics_exporter import serve_metrics

    settings = _storage_settings(
        endpoint_url=endpoint_url,
        encryption_key_file=None if encryption_key_file is None else str(encryption_key_file),
        deadline_seconds=15,  # a scrape gives up before Prometheus does
    )
    thread = serve_metrics([open_store(url, settings) for url in store], port, host)
    print(f"http://{host}:{port}/metrics", file=sys.stderr)
    thread.join()


@data_app.command("describe")
def data_describe(
    config: ConfigOption = DEFAULT_CONFIG,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Counts, units, lengths, label balance, repairs and overlap between domains. Shows no text.

    Example: **fedmentor data describe --config infra/configs/mental_health_small.yaml --set data.root=DATA**
    """
    study = _load(config, overrides)
    from flows.quiet import silence_libraries

    silence_libraries()
    from fedmentor_core.data.describe import describe, render
    from fedmentor_core.data.loading import load_study_data

    made = describe(load_study_data(study.domains, study.data))
    if as_json:
        print(made.model_dump_json(indent=2))
    else:
        from rich.console import Console

        Console().print(render(made))


@data_app.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(help="Corpus: dreaddit, irf, multiwd, safety, counsel_chat or all.")],
    destination: Annotated[Path, typer.Option("--to", help="Folder that becomes data.root.")] = Path("data"),
    base_url: Annotated[
        str | None, typer.Option(help="Mirror to fetch from; digests are checked all the same.")
    ] = None,
) -> None:
    """Download a public corpus by pinned commit, and refuse any byte that differs from the known sha256.

    Example: **fedmentor data fetch dreaddit --to data**
    """
    from flows.fetching import fetch_with_progress

    fetch_with_progress(name, destination, base_url)


STACK_DIR = Path("runs/stack")
StackDirOption = Annotated[Path, typer.Option("--dir", "-d", help="The stack's folder: state, logs and data.")]


@app.command()
def up(
    directory: StackDirOption = STACK_DIR,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Stack settings (YAML), such as infra/stack/stack.yaml.")
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=DATA]", help="A site with its own worker, and its data folder. Repeatable."),
    ] = None,
    study: Annotated[
        list[str] | None,
        typer.Option(metavar="DEPLOYMENT=FILE", help="Deploy train, nightly or compare with this study. Repeatable."),
    ] = None,
    prefect_port: Annotated[int | None, typer.Option(help="Default 4200.")] = None,
    mlflow_port: Annotated[int | None, typer.Option(help="Default 5000.")] = None,
    s3_port: Annotated[int | None, typer.Option(help="Default 9000; the seven ports that follow too.")] = None,
    s3_endpoint: Annotated[str | None, typer.Option(help="Use this S3-compatible server; start none.")] = None,
    store: Annotated[
        str | None, typer.Option(help="s3 (default) or folder: artifacts in folders of the stack's own.")
    ] = None,
    database: Annotated[str | None, typer.Option(help="sqlite (default) or postgresql.")] = None,
    postgres_url: Annotated[
        str | None, typer.Option(help="postgresql://USER@HOST:PORT/postgres; better: FEDMENTOR_POSTGRES_URL.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for each service to answer; default 240.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Start Prefect, MLflow, an S3-compatible server and one worker per site on this machine, and deploy.

    Everything listens on 127.0.0.1 only. Run again, it leaves alone what works and mends what does not; settings that
    are not given stay as they were.

    Example: **fedmentor up --site site-a=data/a --site site-b=data/b**
    """
    from flows.stack.commands import up_command

    options = {
        "prefect_port": prefect_port,
        "mlflow_port": mlflow_port,
        "s3_port": s3_port,
        "s3_endpoint": s3_endpoint,
        "store": store,
        "database": database,
        "start_timeout_seconds": timeout,
    }
    made = up_command(
        directory,
        config=config,
        sites=site or [],
        studies=study or [],
        options=options,
        postgres=postgres_url,
        as_json=as_json,
    )
    if not made.healthy:
        raise typer.Exit(1)


@app.command()
def status(directory: StackDirOption = STACK_DIR, as_json: JsonOption = False) -> None:
    """Ask every service of the stack whether it works; list workers and deployments.

    Example: **fedmentor status --json**

    Exit codes: 0 everything is healthy, 1 something is not, or nothing is up.
    """
    from flows.stack.commands import status_command

    if not status_command(directory, as_json=as_json).healthy:
        raise typer.Exit(1)


@app.command()
def down(directory: StackDirOption = STACK_DIR) -> None:
    """Stop everything that **up** started, children included. Data and logs stay.

    Example: **fedmentor down**
    """
    from flows.stack.commands import down_command

    down_command(directory)


def _load(config: Path, overrides: list[str] | None) -> "StudyConfig":
    from fedmentor_core.config_io import load_config

    return load_config(config, overrides or [])


def _storage_settings(**given: Any) -> "StorageConfig":
    from pydantic import ValidationError

    from fedmentor_core.config import StorageConfig

    try:
        return StorageConfig(**given)
    except ValidationError as error:
        option = str(error.errors()[0]["loc"][-1]).replace("_", "-")
        raise ConfigError(
            f"--{option} cannot be used. Allowed: an endpoint such as http://localhost:9000 (credentials come from the "
            "environment), and an addressing style of path, virtual or auto."
        ) from None


def _finished(study: "StudyConfig", folder: Path) -> "StudySummary | None":
    """The summary of the same study when it is finished; another study in the folder is an error."""
    from fedmentor_core.config_io import config_sha256
    from fedmentor_core.records import StudySummary

    if not (folder / "study.json").is_file() or not (folder / "summary.json").is_file():
        return None
    marker = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    if marker.get("config_sha256") != config_sha256(study):
        return None  # open_study says what is wrong
    return StudySummary.model_validate_json((folder / "summary.json").read_text(encoding="utf-8"))


def _run(study: "StudyConfig", folder: Path, mode: Any) -> "StudySummary":
    from fedmentor_core.progress import ProgressEvent
    from flows.progress_view import make_listener

    with make_listener(mode) as listener:
        listener(ProgressEvent("prepare", "loading backbone and data, planning", n_rounds=study.rounds))
        from fedmentor_core.study_ref import claim_study, find_study
        from fedmentor_core.workspace import workspace_of
        from flows.environment import default_store

        ref = find_study(study, folder, default_store())
        workspace_of(ref).preflight()  # bad input is refused here, before anything is written
        claim_study(ref)
        listener(ProgressEvent("prepare", "starting Prefect", n_rounds=study.rounds))
        with _library_output(folder):
            from flows.embedded import embedded_prefect
            from flows.federated_training import federated_training
            from tasks.listening import listening

            with embedded_prefect(), listening(listener), _responsive_ctrl_c():
                return federated_training(study, str(folder))


def _run_night(study: "StudyConfig", out: Path, mode: Any) -> "NightReport":
    from fedmentor_core.progress import ProgressEvent
    from flows.progress_view import make_listener

    out.mkdir(parents=True, exist_ok=True)
    with make_listener(mode) as listener:
        listener(ProgressEvent("prepare", "looking at tonight's data and budgets", n_rounds=study.rounds))
        with _library_output(out):
            from flows.embedded import embedded_prefect
            from flows.nightly import nightly_command
            from tasks.listening import listening

            with embedded_prefect(), listening(listener), _responsive_ctrl_c():
                return nightly_command(study, out)


@contextmanager
def _responsive_ctrl_c() -> Iterator[None]:
    """Ctrl-C also stops the client that trains in a worker thread, at its next step."""
    import signal

    from tasks.listening import InterruptedByUserError, stop_at_next_step

    def on_interrupt(signum: int, frame: object) -> None:
        stop_at_next_step()
        signal.signal(signal.SIGINT, previous)  # a second ctrl-C is the ordinary one
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedByUserError("interrupted. Run the same command again to resume.") from None
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _library_output(folder: Path) -> Iterator[None]:
    """Library warnings and logs go to a file in the output folder, not over the live view."""
    import logging
    import warnings

    handler = logging.FileHandler(folder / "run.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    on_terminal = [one for one in root.handlers if type(one) is logging.StreamHandler]
    for one in on_terminal:
        root.removeHandler(one)
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        handler.close()
        for one in on_terminal:
            root.addHandler(one)


def _tracking_uri(out: Path | None, tracking_uri: str | None) -> str:
    if (out is None) == (tracking_uri is None):
        raise ConfigError("give exactly one of --out DIR and --tracking-uri URI. Example: --out runs/quickstart")
    if tracking_uri is not None:
        return tracking_uri
    assert out is not None
    database, summary = out.resolve() / "mlflow.db", out / "summary.json"
    if database.is_file():  # also where the folder was moved since
        return f"sqlite:///{database}"
    tracked = json.loads(summary.read_text(encoding="utf-8")).get("tracking_uri") if summary.is_file() else None
    if not tracked:
        raise ConfigError(
            f"{out} holds no mlflow.db and no summary that names MLflow. Give a finished study's folder, or "
            "--tracking-uri."
        )
    return str(tracked)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
