"""Two sites and a transport that calls their real code: what a study over sites is tested with, without Prefect."""

from dataclasses import dataclass, field
from pathlib import Path

import yaml

from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import SiteUnavailableError
from fedmentor_core.site.answering import answer_request
from fedmentor_core.site.file import SiteFile, load_site_file
from fedmentor_core.site.signing import make_key_file
from fedmentor_core.study import InProcess
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import Workspace, workspace_of


@dataclass
class Sites:
    """Both sites' files, and a transport that calls their code; a site can be down."""

    folder: Path
    files: dict[str, Path]
    public_keys: dict[str, str]
    down: set[str] = field(default_factory=set)
    delivered: list = field(default_factory=list)

    def file(self, site: str) -> SiteFile:
        return load_site_file(self.files[site])

    def change(self, site: str, **changes) -> None:
        raw = yaml.safe_load(self.files[site].read_text())
        raw.update(changes)
        self.files[site].write_text(yaml.safe_dump(raw))

    def deliver(self, site, settings, request, answered) -> None:
        self.delivered.append((site, request))
        if site in self.down:
            raise SiteUnavailableError(f"site {site!r} is down.")
        answer_request(request, self.file(site))


def make_sites(folder: Path, domains: list[dict], store_url: str, *, gate_data: str = "public") -> Sites:
    """One site for each domain, with a policy, a key and a ledger of its own."""
    files, keys = {}, {}
    for site, domain in zip(("site-a", "site-b"), domains, strict=True):
        place = folder / site
        place.mkdir(parents=True)
        keys[site] = make_key_file(place / "site.key")
        policy = {"domain": domain["name"], "epsilon": 8.0, "validation_epsilon": 50.0}
        (place / "policy.yaml").write_text(yaml.safe_dump(policy))
        raw = {
            "site": site,
            "store": {"url": store_url},
            "ledger_url": (place / "ledger").as_uri(),
            "signing_key_file": "site.key",
            "domains": {
                domain["name"]: {
                    "source": domain["source"],
                    "policy_file": "policy.yaml",
                    "gate_data": gate_data,
                }
            },
        }
        files[site] = place / "site.yaml"
        files[site].write_text(yaml.safe_dump(raw))
    return Sites(folder, files, keys)


def at_sites(study: dict, sites: Sites, **settings) -> dict:
    """The study as its server holds it: no source, only who is asked."""
    domains = [
        domain | {"source": {"kind": "site"}, "site": site}
        for site, domain in zip(sites.files, study["domains"], strict=True)
    ]
    return study | {
        "domains": domains,
        "sites": {name: {"public_key": key, **settings} for name, key in sites.public_keys.items()},
        "execution": {"client_retries": 0},
    }


def server_of(tiny_study: dict, sites: Sites, out: Path, store_url: str, **changes) -> tuple[Workspace, InProcess]:
    """The server's side of a study over two sites: its workspace, and an engine that asks the sites."""
    config = validate_config(at_sites(tiny_study, sites) | {"storage": {"url": store_url}} | changes)
    workspace = workspace_of(open_study(config, out))
    return workspace, InProcess(workspace, deliver=sites.deliver)
