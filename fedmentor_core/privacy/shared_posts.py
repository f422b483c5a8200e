"""The fingerprint rule, and posts that several accounts hold: no new budget for old posts.

An account belongs to a domain's **name**. When a run first draws from it with some data, the site stores the keyed
digests of the posts that the account protects (``ledger-posts/<account>/<fingerprint>/<sha256>.json``, with
create-if-absent, before the first charge). The rule:

1. Rows added, dropped or reordered, a file renamed, another split seed: the same name, so the same account and budget.
2. The same posts under another name: refused. Posts are *new* to an account until it was charged with data that held
   them. Where more than 1 % of either side's posts are both new to an account and in an account of another name, the
   domain is refused, and nothing is written. Ways out: use the old name, or name it in ``shares_posts_with``.
3. Domains of one study, and those that ``shares_posts_with`` names, may share posts. Such a post loses what all its
   accounts spend. By basic composition, which also holds for interactive mechanisms that run side by side (Vadhan and
   Zhang 2023, arXiv 2207.08335), epsilons and deltas add up. The sum is reported for every set of accounts with common
   posts; ``privacy.max_composed_epsilon`` bounds it.
4. Digests made under another key cannot be compared, so nothing is trained (LedgerError). The same holds for a stored
   set that was changed. An account that was charged for data whose digests are missing is held to share everything.

A post is what ``data/text.py`` takes for the same post, so small edits do not make a new one. Digests are cut to 64
bits: among a million posts the chance that any two differ and collide is below 1e-7. Under the public default key,
whoever can read the store can test whether a post he holds is in it; a site's own key stops that.
"""

import contextlib
import functools
import hashlib
import hmac
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pydantic import ValidationError

from fedmentor_core.config import StudyConfig
from fedmentor_core.data.units import Split, digest_key
from fedmentor_core.errors import LedgerError, SharedPostsError
from fedmentor_core.hashing import canonical_json, sha256_bytes
from fedmentor_core.privacy.ledger import Ledger, ledger_domains, promise_in, spent_rdp_in
from fedmentor_core.privacy.refusals import refused
from fedmentor_core.records import DomainPlan, LedgerEntry, Record, SharedPosts, StudyPlan
from fedmentor_core.storage.base import ArtifactStore

if TYPE_CHECKING:
    from fedmentor_core.data.loading import DomainData

LARGEST_OVERLAP = 0.01
"""Share of either side's posts above which a new name for posts of another account is refused."""

_FOLDER = "ledger-posts"
_DIGEST_LETTERS = 16  # 64 bits


class PostSet(Record):
    """The stored object: which posts an account protected under one dataset."""

    account: str
    fingerprint: str
    key_identity: str
    posts: tuple[str, ...]


class Claim(NamedTuple):
    """What a study wants to draw from one account for."""

    account: str
    fingerprint: str
    posts: frozenset[str]
    """Shortened digests; see ``shortened``."""


class Standing(NamedTuple):
    """An account's promise and what is spent of it."""

    epsilon_spent: float
    epsilon_budget: float
    delta: float


def shortened(digests: Iterable[str]) -> frozenset[str]:
    """Digests as they are stored and compared: the first 64 bits."""
    return frozenset(digest[:_DIGEST_LETTERS] for digest in digests)


def key_identity(key: bytes) -> str:
    """Names a digest key without telling it: an HMAC of a constant, 32 hex digits."""
    return hmac.new(key, b"fedmentor: identity of a digest key", hashlib.sha256).hexdigest()[:32]


def register_posts(store: ArtifactStore, account: str, fingerprint: str, key: bytes, digests: Iterable[str]) -> None:
    """Store which posts an account protects, before its first charge for them. Storing the same again does nothing.

    Args:
        store: the ledgers' store.
        account: name of the ledger.
        fingerprint: of the dataset, as the account's charges carry it.
        key: that the digests were made with.
        digests: ``DomainData.post_digests(key, ...)`` of the protected split.

    Raises:
        StorageError: it cannot be stored; then nothing may be charged.
    """
    name, data = _stored_form(account, fingerprint, key, digests)
    store.put(name, data)


def read_posts(store: ArtifactStore, key: bytes | None = None) -> dict[str, list[PostSet]]:
    """All stored sets by account.

    Args:
        store: the ledgers' store.
        key: the digest key in use; None: only check that all sets were made with one key.

    Raises:
        LedgerError: a set was changed, or was made with another key.
    """
    identity = None if key is None else key_identity(key)
    found: dict[str, list[PostSet]] = {}
    for name in store.list_keys(_FOLDER):
        one = _parse(store, name)
        identity = identity or one.key_identity
        if one.key_identity != identity:
            raise LedgerError(
                f"the posts of account {one.account!r} were digested with another key than this one (identity "
                f"{one.key_identity[:12]}, this one has {identity[:12]}), so nobody can tell which posts are shared. "
                "Nothing is charged or trained. Set the environment variable that data.digest_key_variable names back "
                "to the key that the store was begun with."
            )
        found.setdefault(one.account, []).append(one)
    return found


def claim_refusal(
    store: ArtifactStore, key: bytes, claim: Claim, *, siblings: Collection[str], acknowledged: Collection[str]
) -> str | None:
    """Why the posts of ``claim`` may not be trained on under its name, or None (rule 2 above).

    Args:
        store: the ledgers' store.
        key: digest key.
        claim: account and posts.
        siblings: accounts of the same study, with whom posts may be shared.
        acknowledged: domains named in ``shares_posts_with``.

    Raises:
        LedgerError: stored digests cannot be compared, or a ledger is broken.
    """
    return _judge(read_posts(store, key), _Ledgers(store), claim, siblings, acknowledged)


def _judge(
    stored: Mapping[str, Sequence[PostSet]],
    ledgers: "_Ledgers",
    claim: Claim,
    siblings: Collection[str],
    acknowledged: Collection[str],
) -> str | None:
    charged = ledgers.charged_fingerprints(claim.account)
    known = {post for one in stored.get(claim.account, []) if one.fingerprint in charged for post in one.posts}
    new = claim.posts - known
    if not new:
        return None
    for account in sorted({*stored, *ledgers.accounts} - {claim.account, *siblings}):
        if account.split(".")[0] in acknowledged:
            continue
        theirs = frozenset(post for one in stored.get(account, []) for post in one.posts)
        share = len(new & theirs) / max(1, min(len(claim.posts), len(theirs)))
        ways_out = (
            f"If they are the same posts, give the domain that account's name ({account.split('.')[0]!r}): a new name "
            "buys no new budget. If they are meant to be shared, name it in the domain's shares_posts_with: such posts "
            "then lose the epsilons of both."
        )
        if share > LARGEST_OVERLAP:
            return (
                f"account {claim.account!r}: {share:.0%} of its posts, or of the other's, are also in account "
                f"{account!r}, which belongs to no domain of this study (allowed without saying so: "
                f"{LARGEST_OVERLAP:.0%}). {ways_out}"
            )
        if ledgers.charged_fingerprints(account) - {one.fingerprint for one in stored.get(account, [])}:
            return (
                f"account {claim.account!r}: account {account!r} was charged for posts whose digests are not stored "
                f"(100% must be taken as shared; allowed without saying so: {LARGEST_OVERLAP:.0%}). {ways_out}"
            )
    return None


def join_account(
    store: ArtifactStore,
    key: bytes,
    claim: Claim,
    *,
    siblings: Collection[str],
    acknowledged: Collection[str],
    ledger: Ledger | None = None,
) -> None:
    """Register the posts of a claim and admit it, before its account is charged.

    Registered first and judged second: of two studies that bring the same posts under two names at the same moment,
    each finds the other's set, and neither is admitted until one acknowledges the other.

    Args:
        store: the ledgers' store.
        key: digest key.
        claim: account and posts.
        siblings: accounts of the same study, with whom posts may be shared.
        acknowledged: domains named in ``shares_posts_with``.
        ledger: the claim's account, where it is open already.

    Raises:
        SharedPostsError: the posts are another account's.
        LedgerError: stored digests cannot be compared.
    """
    name, data = _stored_form(claim.account, claim.fingerprint, key, claim.posts)
    own = ledger or Ledger(store, claim.account)
    if store.exists(name) and claim.fingerprint in _charged_fingerprints(own.entries()):
        return  # admitted before, with the very same posts
    read_posts(store, key)  # a set under another key must not be added to those that are there
    store.put(name, data)
    refusal = claim_refusal(store, key, claim, siblings=siblings, acknowledged=acknowledged)
    if refusal is not None:
        raise SharedPostsError(refusal)


def training_claim(config: StudyConfig, plan: DomainPlan, data: "DomainData") -> Claim:
    """What a domain's training account is drawn from for: the posts of its training split."""
    key = digest_key(config.data.digest_key_variable)
    return Claim(plan.domain, plan.dataset_fingerprint, shortened(data.post_digests(key, ("train",))))


def study_accounts(plan: StudyPlan) -> frozenset[str]:
    """Names of all accounts that a study may draw from."""
    return frozenset(one.domain for one in plan.domains) | {v.account for one in plan.domains for v in one.validation}


def with_shared_posts(
    plan: StudyPlan, config: StudyConfig, data: Mapping[str, "DomainData"], store: ArtifactStore
) -> StudyPlan:
    """A study's plan with its shared posts, and with refusals by rules 2 and 3. Writes nothing.

    Raises:
        LedgerError: stored digests cannot be compared, or a ledger is broken.
    """
    if config.privacy.mode == "none":
        return plan
    key = digest_key(config.data.digest_key_variable)
    stored, ledgers = read_posts(store, key), _Ledgers(store)
    siblings = study_accounts(plan)
    domains: list[DomainPlan] = []
    standings: dict[str, Standing] = {}
    held = {account: _union(sets) for account, sets in stored.items()}
    for one in plan.domains:
        claims = _claims(config, one, data[one.domain], key)
        acknowledged = config.domain(one.domain).shares_posts_with
        reasons = [_judge(stored, ledgers, claim, siblings, acknowledged) for claim, _ in claims]
        judged = refused(one, *(f"domain {one.domain!r}: {reason}" for reason in reasons if reason is not None))
        domains.append(judged)
        if not judged.refusals:
            for claim, promise in claims:
                held[claim.account] = held.get(claim.account, frozenset()) | claim.posts
                standings[claim.account] = promise
    standings |= ledgers.standings()  # a ledger's own promise is the one in force
    held = {account: posts for account, posts in held.items() if account in standings}
    shared = tuple(one for one in common_posts(held, standings) if siblings.intersection(one.accounts))
    bounded = _bounded(config, domains, shared)
    return plan.model_copy(
        update={
            "domains": bounded,
            "shared_posts": shared,
            "refusals": tuple(dict.fromkeys((*plan.refusals, *(text for one in bounded for text in one.refusals)))),
        }
    )


def stored_shared_posts(store: ArtifactStore) -> tuple[SharedPosts, ...]:
    """Posts that several accounts of a store hold, from what was registered alone.

    Raises:
        LedgerError: stored digests cannot be compared, or a ledger is broken.
    """
    standings = _Ledgers(store).standings()
    held = {account: _union(sets) for account, sets in read_posts(store).items() if account in standings}
    return common_posts(held, standings)


def common_posts(held: Mapping[str, Collection[str]], standings: Mapping[str, Standing]) -> tuple[SharedPosts, ...]:
    """For every set of accounts: how many posts exactly these hold, and what such a post loses in all."""
    holders: dict[str, tuple[str, ...]] = {}
    for account in sorted(held):
        for post in held[account]:
            holders[post] = (*holders.get(post, ()), account)
    counts: dict[tuple[str, ...], int] = {}
    for accounts in holders.values():
        if len(accounts) > 1:
            counts[accounts] = counts.get(accounts, 0) + 1
    return tuple(
        SharedPosts(
            accounts=accounts,
            n_posts=n_posts,
            epsilon_spent=sum(standings[account].epsilon_spent for account in accounts),
            epsilon_budget=sum(standings[account].epsilon_budget for account in accounts),
            delta=sum(standings[account].delta for account in accounts),
        )
        for accounts, n_posts in sorted(counts.items())
    )


def _claims(config: StudyConfig, plan: DomainPlan, data: "DomainData", key: bytes) -> list[tuple[Claim, Standing]]:
    """What a domain that is not refused would draw from, with the promises that its plan makes."""
    found = [
        (training_claim(config, plan, data), Standing(0.0, plan.epsilon_budget or 0.0, plan.delta or 0.0)),
    ]
    for one in plan.validation:
        splits: tuple[Split, ...] = (one.split,)
        claim = Claim(one.account, one.dataset_fingerprint, shortened(data.post_digests(key, splits)))
        found.append((claim, Standing(0.0, one.epsilon_budget, one.delta)))
    return found


def _bounded(
    config: StudyConfig, domains: Iterable[DomainPlan], shared: Iterable[SharedPosts]
) -> tuple[DomainPlan, ...]:
    """All domains refused where a shared post could lose more than the study allows."""
    limit = config.privacy.max_composed_epsilon
    beyond = [one for one in shared if limit is not None and one.epsilon_budget > limit]
    if not beyond:
        return tuple(domains)
    worst = max(beyond, key=lambda one: one.epsilon_budget)
    reason = (
        f"study {config.name!r}: {worst.n_posts} posts are held by the accounts {', '.join(worst.accounts)} and could "
        f"lose epsilon {worst.epsilon_budget:g} in all; privacy.max_composed_epsilon allows {limit:g}. Lower the "
        "budgets of accounts that are not open yet, leave a domain out, or raise the limit."
    )
    return tuple(refused(one, reason) for one in domains)


class _Ledgers:
    """The accounts of a store, each chain read and verified once."""

    def __init__(self, store: ArtifactStore) -> None:
        self.accounts = ledger_domains(store)
        self._entries = functools.cache(lambda account: Ledger(store, account).entries())

    def charged_fingerprints(self, account: str) -> frozenset[str]:
        """Of the data that ``account`` was charged for."""
        return _charged_fingerprints(self._entries(account))

    def standings(self) -> dict[str, Standing]:
        """Of every account that was opened."""
        found = {}
        for name in self.accounts:
            entries = self._entries(name)
            account = promise_in(entries)
            if account is not None:
                found[name] = Standing(account.epsilon_spent(spent_rdp_in(entries)), account.epsilon, account.delta)
        return found


def _charged_fingerprints(entries: Iterable[LedgerEntry]) -> frozenset[str]:
    return frozenset(entry.dataset_fingerprint for entry in entries if entry.kind in ("charge", "evaluation"))


def _union(sets: Iterable[PostSet]) -> frozenset[str]:
    return frozenset(post for one in sets for post in one.posts)


def _stored_form(account: str, fingerprint: str, key: bytes, digests: Iterable[str]) -> tuple[str, bytes]:
    """Key and bytes of a stored set; the key names the bytes, so that a changed set is found."""
    posts = tuple(sorted(shortened(digests)))
    found = PostSet(account=account, fingerprint=fingerprint, key_identity=key_identity(key), posts=posts)
    data = canonical_json(found.model_dump(mode="json"))
    return f"{_FOLDER}/{account}/{fingerprint}/{sha256_bytes(data)}.json", data


def _parse(store: ArtifactStore, name: str) -> PostSet:
    data = store.get_bytes(name)
    parts = name.split("/")
    one: PostSet | None = None
    with contextlib.suppress(ValidationError):
        one = PostSet.model_validate_json(data)
    if one is None or parts[1:] != [one.account, one.fingerprint, f"{sha256_bytes(data)}.json"]:
        raise LedgerError(
            f"the stored post digests {name} were changed or torn, so nobody can tell which posts are shared. Nothing "
            "is charged or trained until the object is restored from a copy."
        )
    return one
