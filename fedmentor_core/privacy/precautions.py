"""What a study on real text should have set and has not: said in the plan and in every output, or refused.

A ledger's store also holds keyed digests of the posts it protects (``shared_posts.py``). They are made from private
data, so they stay where the site alone can read.
"""

import os

from fedmentor_core.config import StudyConfig


def on_real_text(config: StudyConfig) -> tuple[str, ...]:
    """Names of the domains on this machine whose text is not invented."""
    return tuple(domain.name for domain in config.domains if domain.source.kind not in ("invented", "site"))


def missing_precautions(config: StudyConfig) -> tuple[str, ...]:
    """Warnings about a study on real text; none for invented text or where no account is opened."""
    real = on_real_text(config)
    if not real or not _opens_accounts(config):
        return ()
    said = []
    if config.privacy.ledger_url is None:
        said.append(
            "privacy.ledger_url is not set: the accounts live in this output folder alone, and another --out would "
            "start new ones. Set it to one place for all runs, so that a lifetime budget is one."
        )
    variable = config.data.digest_key_variable
    if not os.environ.get(variable):
        said.append(
            f"the environment variable {variable} is not set: post digests in the ledger's store are made with a "
            "public key, and whoever can read them can tell whether a post they hold is in the data. Set it to a "
            "secret of the site before the first run, and keep it."
        )
    return tuple(said)


def shared_ledger_refusal(config: StudyConfig) -> str | None:
    """Why the ledgers may not live in the study's store, or None: a server can read a bucket that sites share."""
    real = on_real_text(config)
    store = config.storage.url or ""
    if not real or not _opens_accounts(config) or not store.startswith("s3://"):
        return None
    if config.privacy.ledger_url is not None and not _overlap(config.privacy.ledger_url, store):
        return None
    return (
        f"privacy.ledger_url: the ledgers of {', '.join(real)} would live in the study's store {store}, which others "
        "read. They hold digests of posts. Allowed: a store of the site's own, such as "
        "file:///var/lib/fedmentor/ledgers. Set privacy.ledger_url"
    )


def _opens_accounts(config: StudyConfig) -> bool:
    """A private gate set has accounts of its own even where training is a baseline without privacy."""
    return config.privacy.mode == "dp" or config.evaluation.gate_data == "private"


def _overlap(one: str, other: str) -> bool:
    """Whether one store lies in the other, or is the same."""
    left, right = (url.rstrip("/") + "/" for url in (one, other))
    return left.startswith(right) or right.startswith(left)
