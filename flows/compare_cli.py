"""``fedmentor compare``: the headline table, with one command."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmentor_core.errors import ConfigError, FedMentorError

if TYPE_CHECKING:
    from fedmentor_core.compare.comparison import Comparison
    from fedmentor_core.compare.records import ComparisonTable
    from fedmentor_core.compare.settings import CompareSettings
    from fedmentor_core.config import StudyConfig

_QUICKSTART = Path(__file__).resolve().parent.parent / "infra" / "configs" / "quickstart.yaml"


def compare(
    config: Annotated[Path, typer.Option("--config", "-c", help="Study configuration (YAML).")] = _QUICKSTART,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Output folder; default: runs/NAME-compare, by the name of the config file."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the study. Repeatable.")
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            help="Which arms, by comma: base, local, centralized, federated, uniform, fedmentor-fixed, fedmentor. "
            "Default: all."
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds, counted up from the study's; default 3.")] = None,
    against: Annotated[str | None, typer.Option(help="Arm that differences are taken from; default federated.")] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Frontier: every domain gets each of these epsilons; default 0.5,1,2,4,8; none: no frontier."
        ),
    ] = None,
    budget_seeds: Annotated[int | None, typer.Option(help="Seeds of each point of the frontier; default 1.")] = None,
    uniform_epsilon: Annotated[
        float | None, typer.Option(help="Budget of the arm 'uniform'; default: the strictest domain's.")
    ] = None,
    data_is_public: Annotated[
        bool, typer.Option("--data-is-public", help="State that the data of every domain is public.")
    ] = False,
    reuse: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Take finished cells that are the same from this comparison. Repeatable."),
    ] = None,
    join: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Run nothing: one table of the cells of these comparisons. Repeatable."),
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="Refuse, before it starts, a grid that is estimated to take longer.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would run and how long it takes.")] = False,
    no_tracking: Annotated[bool, typer.Option("--no-tracking", help="Do not log to MLflow.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the table.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Progress as plain lines even on a terminal.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print table.json instead of text.")] = False,
) -> None:
    """Compare ways to make a model: untrained, local, centralized, federated, and FedMentor, with several seeds.

    All arms have the same data, splits, backbone, steps and evaluation. Leaves table.json, table.csv, table.md and
    compare.html in the output folder. Interrupted, it goes on from the cells that are finished; one that fails does not
    stop the others. For public or invented data only: some arms have no privacy, and many models are published.

    Example: **fedmentor compare --config infra/configs/quickstart.yaml --seeds 3 --budgets 0.5,1,2,4,8
    --out runs/compare**

    Exit codes: 0 done, 2 bad input, a grid that takes too long, or cells that cannot be compared; 3 a budget cannot
    carry its rounds; 1 some cells failed, or anything else.
    """
    given: dict[str, Any] = {
        "arms": None if arms is None else _words(arms),
        "seeds": seeds,
        "against": against,
        "budgets": None if budgets is None else _numbers(budgets),
        "budget_seeds": budget_seeds,
        "uniform_epsilon": uniform_epsilon,
        "max_minutes": max_minutes,
    }
    given = {name: value for name, value in given.items() if value is not None}
    folder = out or Path("runs") / f"{config.stem}-compare"
    mode = "quiet" if quiet or as_json else "plain" if plain else "auto"
    if join:
        table = _join(join, folder, {name: value for name, value in given.items() if name != "against"}, against)
    else:
        from fedmentor_core.config_io import load_config

        study, settings = load_config(config, overrides or []), settings_of({**given, "data_is_public": data_is_public})
        made = _run(study, settings, folder, reuse or [], mode, dry_run=dry_run, track=not no_tracking)
        if made is None:
            return
        table = made
    if as_json:
        from fedmentor_core.compare.outputs import table_json

        print(table_json(table), end="")
    else:
        from flows.compare_view import print_table

        print_table(table, folder)
    if table.failures:
        raise typer.Exit(1)


def settings_of(given: dict[str, Any]) -> "CompareSettings":
    """The settings, or an error that names the option.

    Raises:
        ConfigError: an unknown arm, an impossible number.
    """
    from pydantic import ValidationError

    from fedmentor_core.compare.settings import CompareSettings

    try:
        return CompareSettings.model_validate(given)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            option = f"--{str(problem['loc'][0]).replace('_', '-')}: " if problem["loc"] else ""
            lines.append(f"  {option}{problem['msg'].removeprefix('Value error, ')}")
        raise ConfigError("this grid cannot be run:\n" + "\n".join(lines)) from None


def _run(
    study: "StudyConfig",
    settings: "CompareSettings",
    folder: Path,
    reuse: list[Path],
    mode: Any,
    *,
    dry_run: bool,
    track: bool,
) -> "ComparisonTable | None":
    from flows.quiet import silence_libraries

    silence_libraries()
    from fedmentor_core.compare.budgets import check_budgets
    from fedmentor_core.compare.comparison import Comparison
    from fedmentor_core.compare.run import run_comparison
    from fedmentor_core.compare.timing import estimate_time, refuse_too_long
    from fedmentor_core.progress import ProgressEvent
    from fedmentor_core.report.words import hide_credentials
    from flows.compare_view import make_grid_listener, print_grid

    made = Comparison.open(study, settings, folder)
    try:
        with make_grid_listener("quiet" if dry_run else mode) as listen:
            listen(ProgressEvent("prepare", "loading backbone, data and scorers, planning"))
            planned = check_budgets(made)
            if not dry_run:
                made.adopt(reuse)
            if dry_run or settings.max_minutes is not None:
                listen(ProgressEvent("prepare", "timing a few steps"))
                found = estimate_time(made)
                refuse_too_long(made, found)
            if not dry_run:
                command = hide_credentials(shlex.join(["fedmentor", *sys.argv[1:]]))
                table = run_comparison(made, listen, command=command)
    except KeyboardInterrupt:
        raise FedMentorError("interrupted. Finished cells are kept; run the same command again to go on.") from None
    if dry_run:
        print_grid(made, planned, found)
        return None
    if track and study.tracking.enabled:
        _track(made, table)
    return table


def _track(made: "Comparison", table: "ComparisonTable") -> None:
    from fedmentor_core.compare.comparison import read_file
    from flows.environment import tracking_uri_of
    from tasks.comparison_tracking import log_comparison

    uri = tracking_uri_of(made.config, made.out)
    missing = log_comparison(made.config, read_file(made.out), table, made.out, uri)
    if missing is not None:
        print(f"fedmentor: {missing}", file=sys.stderr)


def _join(folders: list[Path], out: Path, given: dict[str, Any], against: str | None) -> "ComparisonTable":
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"--join runs nothing, so {options} has no meaning there. Leave it out.")
    from fedmentor_core.compare.arms import find_arm
    from fedmentor_core.compare.run import join_comparisons

    if against is not None:
        find_arm(against)
    return join_comparisons(folders, out, against=against)


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[float, ...]:
    if text.strip().lower() == "none":
        return ()
    try:
        return tuple(float(part) for part in _words(text))
    except ValueError:
        raise ConfigError(f"--budgets needs numbers by comma, such as 0.5,1,2,4,8, or none; got {text!r}.") from None
