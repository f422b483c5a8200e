"""All accounts of a store, each verified by itself: what ``fedmentor ledger`` prints and a run keeps a copy of."""

from collections.abc import Sequence

from pydantic import Field

from fedmentor_core.errors import LedgerError
from fedmentor_core.privacy.ledger import Ledger, ledger_domains
from fedmentor_core.privacy.ledger_view import LedgerView
from fedmentor_core.privacy.shared_posts import stored_shared_posts
from fedmentor_core.records import Record, SharedPosts
from fedmentor_core.storage.base import ArtifactStore


class LedgerReport(Record):
    """``fedmentor ledger --json``: a stable contract; keys may be added."""

    verified: bool
    domains: tuple[LedgerView, ...]
    shared_posts: tuple[SharedPosts, ...] = ()
    problems: tuple[str, ...] = Field(default=(), description="Why it is not verified; empty when it is.")


def read_ledgers(store: ArtifactStore, names: Sequence[str] = ()) -> LedgerReport:
    """Read and verify accounts; a broken one is reported and does not hide the others.

    Args:
        store: the ledgers' store.
        names: accounts to show; default: all. Shared posts are those of all accounts, or of the named ones.
    """
    views = [_view(store, name) for name in names or ledger_domains(store)]
    problems = [view.problem for view in views if not view.verified]
    shared: tuple[SharedPosts, ...] = ()
    try:
        shared = stored_shared_posts(store)
    except LedgerError as error:
        if str(error) not in problems:
            problems.append(str(error))
    if names:
        shared = tuple(one for one in shared if set(names).intersection(one.accounts))
    return LedgerReport(verified=not problems, domains=tuple(views), shared_posts=shared, problems=tuple(problems))


def _view(store: ArtifactStore, name: str) -> LedgerView:
    try:
        return Ledger(store, name).view()
    except LedgerError as error:
        return LedgerView(domain=name, verified=False, problem=str(error), epsilon_spent=None)
