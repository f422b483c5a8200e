"""What ``fedmentor site check`` looks at, before a site takes part in anything: file, key, policies, data, stores.

All of it stays at the site: what is found may name folders and counts.
"""

from collections.abc import Callable
from pathlib import Path

from fedmentor_core.check import Check, Diagnosis
from fedmentor_core.data.loading import load_domain_data
from fedmentor_core.data.sources import DataConfig, LocalSource
from fedmentor_core.discretion import failure_reason
from fedmentor_core.evaluation._libraries import sha256_of
from fedmentor_core.privacy.ledger import Ledger, ledger_domains
from fedmentor_core.privacy.policy import load_policy
from fedmentor_core.records import LedgerEntry, Record
from fedmentor_core.site.file import SiteDomain, SiteFile, SiteScorer
from fedmentor_core.site.signing import public_key_of, read_key_file, told_entry
from fedmentor_core.storage.base import open_store
from fedmentor_core.storage.probe import probe_store


class _OneDomain(Record):
    """What the loader needs to know."""

    name: str
    source: LocalSource


def examine_site(file: SiteFile) -> Diagnosis:
    """Read everything that the file names and try out the stores it writes to; leaves nothing behind."""
    checks = [
        _check(
            "signing key",
            "The server believes what this key signs; put the public key into the study's 'sites'.",
            "Make one with: fedmentor site keygen --out FILE",
            lambda: f"public key {public_key_of(read_key_file(Path(file.signing_key_file)))}",
        )
    ]
    for name, domain in file.domains.items():
        checks += [_policy(name, domain), _data(name, domain, file), _ledger(name, file)]
    checks += [_scorer(name, one) for name, one in file.scorers.items()]
    checks += [_writable("ledger store", file.ledger_url, file), _writable("store", str(file.written.url), file)]
    return Diagnosis(subject=f"site {file.site}", checks=tuple(checks))


def find_entry(file: SiteFile, told: str) -> LedgerEntry | None:
    """The ledger entry that the site told a server of by ``told``; None where no ledger of the site holds it.

    Raises:
        ConfigError: the signing key cannot be read.
        LedgerError: a chain is broken.
    """
    key = read_key_file(Path(file.signing_key_file))
    store = open_store(file.ledger_url, file.written)
    for account in ledger_domains(store):
        for stored in Ledger(store, account).chain():
            if told_entry(key, stored.sha256) == told.lower():
                return stored.entry
    return None


def _policy(name: str, domain: SiteDomain) -> Check:
    def read() -> str:
        policy = load_policy(domain.policy_file, name)
        backbones = "any backbone" if policy.allowed_backbones is None else f"{len(policy.allowed_backbones)} backbones"
        return f"epsilon {policy.epsilon:g}, noise at least {policy.min_noise_multiplier:g}, {backbones}"

    return _check(f"{name}: policy", "It is the site's last word on every request.", "Correct the policy file.", read)


def _data(name: str, domain: SiteDomain, file: SiteFile) -> Check:
    def read() -> str:
        settings = DataConfig(root=domain.data_root, digest_key_variable=file.digest_key_variable)
        found = load_domain_data(_OneDomain(name=name, source=domain.source), settings)
        units = ", ".join(f"{count} {split}" for split, count in found.n_units.items())
        return f"{units} units with the usual split; gate and test posts are {domain.gate_data}"

    return _check(f"{name}: data", "Without posts nothing can be trained.", "Correct source and data_root.", read)


def _scorer(name: str, scorer: SiteScorer) -> Check:
    def digest() -> str:
        folder = Path(scorer.folder)
        files = [path for path in (folder / "model.safetensors",) if path.is_file()] or list(folder.glob("*.ckpt"))
        if len(files) != 1:
            raise _NotReliableError(f"{folder} holds neither model.safetensors nor one .ckpt")
        found = sha256_of(files[0])
        if found != scorer.sha256:
            raise _NotReliableError(f"its weights have sha256 {found}, the site's file says {scorer.sha256}")
        return f"weights {found[:12]}"

    return _check(
        f"scorer {name}", "Scores of other weights cannot be compared.", "Correct folder or sha256 in the file.", digest
    )


def _ledger(name: str, file: SiteFile) -> Check:
    def read() -> str:
        view = Ledger(open_store(file.ledger_url, file.written), name).view()
        return f"epsilon {view.epsilon_spent or 0.0:.4g} spent; chain verified"

    return _check(
        f"{name}: ledger", "A broken account stops all training on its posts.", "Restore it from a copy.", read
    )


def _writable(name: str, url: str, file: SiteFile) -> Check:
    def probe() -> str:
        failed = [check for check in probe_store(url, file.written).checks if check.status == "fail"]
        if failed:
            raise _NotReliableError("; ".join(f"{check.name}: {check.found}" for check in failed))
        return url

    return _check(name, "What is charged and released is written there.", f"Try: fedmentor doctor --store {url}", probe)


class _NotReliableError(Exception):
    pass


def _check(name: str, why: str, remedy: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name=name, status="pass", found=look(), why=why)
    except _NotReliableError as error:
        return Check(name=name, status="fail", found=str(error), why=why, remedy=remedy)
    except Exception as error:  # whatever is wrong with one part, the others are still looked at
        return Check(name=name, status="fail", found=failure_reason(error), why=why, remedy=remedy)
