"""``fedmentor site``: make a site's signing key, look at all its file names, and find a ledger entry again."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmentor_core.errors import ConfigError

if TYPE_CHECKING:
    from fedmentor_core.site.file import SiteFile

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


FileOption = Annotated[Path | None, typer.Option("--file", "-f", help="The site's file; default: FEDMENTOR_SITE_FILE.")]


@site_app.command("check")
def check(
    file: FileOption = None,
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
    from flows.doctor import print_diagnosis

    diagnosis = examine_site(_site_file(file))
    if as_json:
        print(diagnosis.model_dump_json(indent=2))
    else:
        print_diagnosis(diagnosis)
    if not diagnosis.passed:
        raise typer.Exit(3)


@site_app.command("entry")
def entry(
    told: Annotated[str, typer.Argument(help="What a model's lineage names in the registry, in hex digits.")],
    file: FileOption = None,
) -> None:
    """Show that the ledger still holds the entry that paid for a model; its lineage names it under the site's key.

    Example: **fedmentor site entry 5f0c... --file site.yaml**

    Exit codes: 0 it holds it, 2 bad input, 3 it does not.
    """
    from fedmentor_core.site.examine import find_entry

    found = find_entry(_site_file(file), told)
    if found is None:
        print("no ledger of this site holds it: it was lost, or told under another signing key")
        raise typer.Exit(3)
    print(f"account {found.domain}, entry {found.sequence} ({found.kind}) of {found.created_at}, run {found.run_id}")


def _site_file(file: Path | None) -> "SiteFile":
    from fedmentor_core.site.file import VARIABLE, load_site_file

    path = file or os.environ.get(VARIABLE)
    if path is None:
        raise ConfigError(f"give --file FILE, or set {VARIABLE}. Example: infra/sites/site_example.yaml")
    return load_site_file(path)
