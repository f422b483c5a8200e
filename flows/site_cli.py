"""``fedmentor site``: make a site's signing key, and look at everything its file names before it takes part."""

import os
from pathlib import Path
from typing import Annotated

import typer

from fedmentor_core.errors import ConfigError

site_app = typer.Typer(help="For the people of a site: its signing key and its file.", no_args_is_help=True)


@site_app.command("keygen")
def keygen(
    out: Annotated[Path, typer.Option("--out", "-o", help="New file for the private key (mode 0600).")],
) -> None:
    """Make the key that a site signs its answers with, and print the public key for the study's **sites**.

    Example: **fedmentor site keygen --out site.key**
    """
    from fedmentor_core.site.signing import make_key_file

    print(make_key_file(out))


@site_app.command("check")
def check(
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="The site's file; default: FEDMENTOR_SITE_FILE.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Read key, policies and data, verify the ledgers and try out the stores of a site. Shows no text.

    Run it at the site, as its worker's user and with its environment.

    Example: **fedmentor site check --file site.yaml**

    Exit codes: 0 nothing failed, 2 bad input, 3 something failed.
    """
    from flows.quiet import silence_libraries

    silence_libraries()
    from fedmentor_core.site.examine import examine_site
    from fedmentor_core.site.file import VARIABLE, load_site_file
    from flows.doctor import print_diagnosis

    path = file or os.environ.get(VARIABLE)
    if path is None:
        raise ConfigError(f"give --file FILE, or set {VARIABLE}. Example: infra/sites/site_example.yaml")
    diagnosis = examine_site(load_site_file(path))
    if as_json:
        print(diagnosis.model_dump_json(indent=2))
    else:
        print_diagnosis(diagnosis)
    if not diagnosis.passed:
        raise typer.Exit(3)
