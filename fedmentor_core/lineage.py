"""Lineage of a trained adapter: the rounds, ledgers and code it came from, as digests that can be checked later.

A chain entry's digest stands for the whole account up to it, because each entry holds the digest of the one before
(``privacy/chain.py``). So one digest per account, noted when an adapter is registered, shows later whether the account
that paid for it is still the one that is there: entries may have been added since, none may be gone or changed.
"""

import math
from collections.abc import Iterable, Sequence

from pydantic import Field

from fedmentor_core.config import StorageConfig
from fedmentor_core.errors import FedMentorError
from fedmentor_core.hashing import sha256_bytes
from fedmentor_core.privacy.ledger import Ledger
from fedmentor_core.privacy.ledger_view import view_of
from fedmentor_core.records import ArtifactRef, DomainPlan, Record, ScorerIdentities, StudySummary
from fedmentor_core.rounds import find_manifest, manifest_key
from fedmentor_core.storage.base import ArtifactStore, open_store
from fedmentor_core.workspace import Workspace


class LedgerHead(Record):
    """An account as it was at one moment."""

    account: str
    site: str = Field(default="", description="Where the account is kept, if not here: then nobody here can read it.")
    sha256: str = Field(description="Of its newest entry, or what the site signed in its place; empty: there is none.")
    n_entries: int = Field(description="0 of an account at a site, which tells no count.")
    epsilon_spent: float | None


class LedgerPlace(Record):
    """Where accounts are; credentials are no part of it."""

    url: str
    storage: StorageConfig = StorageConfig()

    def open(self) -> ArtifactStore:
        """The store.

        Raises:
            FedMentorError: it cannot be opened.
        """
        return open_store(self.url, self.storage)


class Lineage(Record):
    """Where an adapter comes from."""

    git_revision: str = Field(description="Commit of the code that ran; 'unknown' outside a checkout.")
    adapter: ArtifactRef = Field(description="The trained tensors in the run's store.")
    base_delta: ArtifactRef | None = Field(
        default=None, description="What the run added to the frozen backbone, in its store: the base's version."
    )
    manifests: tuple[str, ...] = Field(description="sha256 of each round's manifest, in order.")
    gate_manifest: str = Field(description="sha256 of the manifest whose verdict speaks for the adapter; empty: none.")
    scorers: ScorerIdentities
    ledger: LedgerPlace
    heads: tuple[LedgerHead, ...] = Field(description="Of every account of the study's domains.")
    started_from: str = Field(default="", description="Champion it was trained from, as NAME/VERSION; empty: anew.")


def lineage_of(workspace: Workspace, summary: StudySummary, adapter: ArtifactRef, git_revision: str) -> Lineage:
    """Read a finished study's lineage from its store and its ledgers.

    Raises:
        LedgerError: an account is broken; nothing may be registered then.
    """
    manifests = tuple(
        sha256_bytes(workspace.store.get_bytes(manifest_key(workspace, one.round_index))) for one in summary.rounds
    )
    judged = None if summary.selected_round is None else find_manifest(workspace, summary.selected_round)
    speaks = judged is not None and judged.adapter == adapter
    champion = workspace.champion if workspace.config.start_from == "champion" else None
    base = workspace.parts_of(adapter).base
    return Lineage(
        git_revision=git_revision,
        adapter=adapter,
        base_delta=None if base is None else base.beside(adapter),
        manifests=manifests,
        gate_manifest=manifests[judged.round_index] if judged is not None and speaks else "",
        scorers=summary.scorers,
        ledger=LedgerPlace(url=workspace.ledger_store.url, storage=workspace.config.storage),
        heads=_heads(workspace, summary),
        started_from="" if champion is None else f"{champion.name}/{champion.version}",
    )


def _heads(workspace: Workspace, summary: StudySummary) -> tuple[LedgerHead, ...]:
    """The newest entry of each account that is here; of one at a site, what the site said in its signed answers."""
    at_sites = {domain.name: domain.site for domain in workspace.domains_at_sites}
    heads = []
    for plan in summary.plan.domains:
        if plan.delta is None:
            continue
        site = at_sites.get(plan.domain)
        if site is not None:
            heads.append(_head_at_site(plan, site, summary))
            continue
        names = (plan.domain, *(validation.account for validation in plan.validation))
        heads += [head_of(Ledger(workspace.ledger_store, name)) for name in names]
    return tuple(heads)


def _head_at_site(plan: DomainPlan, site: str, summary: StudySummary) -> LedgerHead:
    """What the site signed with its last update: no update counts without it."""
    said = [client for one in summary.rounds for client in one.clients if client.domain == plan.domain]
    paid = [client.ledger_entry for client in said if client.status == "trained"]
    return LedgerHead(
        account=plan.domain,
        site=site,
        sha256=paid[-1] if paid else "",
        n_entries=0,
        epsilon_spent=said[-1].epsilon_spent if said else plan.epsilon_spent_before,
    )


def head_of(ledger: Ledger, n_entries: int | None = None) -> LedgerHead:
    """An account's newest entry, or its newest when it had only ``n_entries``.

    Raises:
        LedgerError: the chain is broken.
    """
    chain = ledger.chain()[:n_entries]
    return LedgerHead(
        account=ledger.domain,
        sha256=chain[-1].sha256 if chain else "",
        n_entries=len(chain),
        epsilon_spent=view_of(ledger.domain, chain).epsilon_spent,
    )


def stale_heads(store: ArtifactStore, heads: Iterable[LedgerHead]) -> Sequence[str]:
    """What is wrong with accounts that were noted before; empty when all of them are still what they were.

    An account is stale when its chain is broken, when the noted entry is no longer in it at its place, or when the
    entries up to it cost something else than was noted. Accounts at sites are the sites' to read: their own filters
    enforce them, and what they said is in the round manifests.
    """
    return [problem for head in heads if not head.site and (problem := _problem(store, head))]


def _problem(store: ArtifactStore, head: LedgerHead) -> str:
    try:
        now = head_of(Ledger(store, head.account), head.n_entries)
    except FedMentorError as error:
        return str(error).rstrip(".")
    if now.sha256 != head.sha256:
        return (
            f"the ledger of {head.account!r} no longer holds the entry {head.sha256[:12]} that paid last "
            f"(at place {head.n_entries} it has {now.sha256[:12] or 'none'})"
        )
    if not math.isclose(now.epsilon_spent or 0.0, head.epsilon_spent or 0.0, rel_tol=1e-9):
        return f"the ledger of {head.account!r} says another epsilon than was registered"
    return ""
