"""Bodies of ``fedmentor up``, ``status`` and ``down``."""

import sys
from collections.abc import Sequence
from pathlib import Path

from fedmentor_core.errors import ConfigError
from flows.stack import lifecycle
from flows.stack.health import StackStatus
from flows.stack.settings import StackSettings, checked_settings, load_settings, parse_site, parse_study, postgres_url
from flows.stack.state import StackFolder
from flows.stack.view import print_status


def up_command(
    directory: Path,
    *,
    config: Path | None,
    sites: Sequence[str],
    studies: Sequence[str],
    options: dict[str, object],
    postgres: str | None,
    as_json: bool,
) -> StackStatus:
    """Start or mend a stack and show it. Options win over ``config``, and that over what the folder remembers.

    Raises:
        ConfigError: settings that cannot be.
        StackError: a service that does not start.
    """
    folder = StackFolder(directory)
    remembered = folder.load()
    base = load_settings(config) if config else remembered.settings if remembered else StackSettings()
    given = {name: value for name, value in options.items() if value is not None}
    url = postgres_url(postgres)
    if postgres is not None and given.setdefault("database", "postgresql") != "postgresql":
        raise ConfigError("--postgres-url goes with --database postgresql.")
    if sites:
        given["sites"] = [parse_site(text) for text in sites]
    if studies:
        given["studies"] = {**base.studies, **dict(parse_study(text) for text in studies)}
    settings = checked_settings({**dict(base), **given}, "fedmentor up")
    status = lifecycle.up(folder, settings, url, _say)
    show(status, as_json=as_json)
    return status


def down_command(directory: Path) -> None:
    """Stop a stack."""
    stopped = lifecycle.down(StackFolder(directory), _say)
    _say(f"{directory} is down; its data and logs are kept" if stopped else f"nothing of {directory} is up")


def status_command(directory: Path, *, as_json: bool) -> StackStatus:
    """Ask every service and show what they say."""
    status = lifecycle.status(StackFolder(directory))
    show(status, as_json=as_json)
    return status


def show(status: StackStatus, *, as_json: bool) -> None:
    """Print a status as a table, or as one JSON object."""
    if as_json:
        print(status.model_dump_json(indent=2))
    else:
        print_status(status)


def _say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)
