"""Privacy units and splits.

**Unit.** All rows of one unit are protected together. The unit is the source's unit id where there is one (a
patient, or the Reddit post that Dreaddit's segments were cut from), else the post, named by its key
(``text.py``).

**Split.** A post's place in train, gate or test is a function of the split seed and its key alone, so that
sites that share posts but do not talk put them in the same split::

    place = sha256("split", seed, sha256(key)) / 2**256
    test if place < test_fraction, gate if place < test_fraction + gate_fraction, else train

A unit with several posts, and units that share a post, form one connected group; it takes the place of
its post with the smallest sha256(key). Groups are formed over all data at hand. A site alone sees its own:
where a post of a unit with several posts is also in another domain, the site alone and all domains together
can put it in different splits. With the post as the unit, as in IRF and MultiWD, they never do.

**Digest.** A unit leaves this package as ``HMAC-SHA256(key, kind, name)``, cut to 128 bits: the same unit has
the same digest under the same key in every dataset, and its name cannot be read back from it. Under the
public default key a holder of a post can still recognise its digest; a site sets its own key to stop that.

**Fingerprint.** ``sha256`` over the sorted distinct unit digests (hex, one per line): it depends neither on
row order nor on file names nor on the split, and it changes when a unit is added or removed.
"""

import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from fedmentor_core.data.records import Row
from fedmentor_core.data.text import post_key
from fedmentor_core.errors import DataError

Split = Literal["train", "gate", "test"]
SPLITS: tuple[Split, ...] = ("train", "gate", "test")

_PUBLIC_KEY = b"fedmentor: public default key for unit digests"


def digest_key(variable: str) -> bytes:
    """The key of unit digests: the named environment variable, or a public key where it is unset or empty."""
    value = os.environ.get(variable, "")
    return value.encode() if value else _PUBLIC_KEY


def digest(key: bytes, kind: Literal["unit", "post"], name: str) -> str:
    """Keyed digest of a unit id or a post key: 32 hex digits."""
    return hmac.digest(key, f"{kind}\0{name}".encode(), "sha256").hex()[:32]


class NamedRow(NamedTuple):
    """A row with the digest of its unit and the key of its post."""

    row: Row
    unit: str
    post: str


def unit_digest(key: bytes, row: Row) -> str:
    """The digest that names a row's unit outside this package."""
    if row.unit is not None:
        return digest(key, "unit", row.unit)
    return digest(key, "post", post_key(row.post))


def name_rows(key: bytes, rows: Iterable[Row]) -> list[NamedRow]:
    """Work out unit and post of every row, once."""
    return [NamedRow(row, unit_digest(key, row), post_key(row.post)) for row in rows]


def fingerprint(unit_digests: Iterable[str]) -> str:
    """Digest of a set of units; see the module's rule."""
    return hashlib.sha256("\n".join(sorted(set(unit_digests))).encode()).hexdigest()


def pick_units(unit_digests: Iterable[str], at_most: int | None) -> set[str]:
    """The units to keep: all, or the ``at_most`` smallest by a hash that is not tied to the split."""
    units = set(unit_digests)
    if at_most is None or len(units) <= at_most:
        return units
    return set(sorted(units, key=lambda unit: hashlib.sha256(f"pick\0{unit}".encode()).digest())[:at_most])


def split_of(representative: str, seed: int, gate_fraction: float, test_fraction: float) -> Split:
    """The split of a post or group, named by the sha256 of its (representative) key."""
    place = int.from_bytes(hashlib.sha256(f"split\0{seed}\0{representative}".encode()).digest()[:8], "big") / 2**64
    if place < test_fraction:
        return "test"
    return "gate" if place < test_fraction + gate_fraction else "train"


def representatives(memberships: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Join units and posts into connected groups.

    Args:
        memberships: Pairs of (unit, post key), over every domain at hand. A unit is any string; the loader
            puts the domain's name in front, so that equal patient numbers of two services are not joined.

    Returns:
        For every post key, the sha256 of the key that represents its group.
    """
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def find(node: tuple[str, str]) -> tuple[str, str]:
        parent.setdefault(node, node)
        root = node
        while parent[root] != root:
            root = parent[root]
        while parent[node] != root:
            parent[node], node = root, parent[node]
        return root

    posts = set()
    for unit, post in memberships:
        posts.add(post)
        parent[find(("unit", unit))] = find(("post", post))
    hashes = {post: hashlib.sha256(post.encode()).hexdigest() for post in posts}
    smallest: dict[tuple[str, str], str] = {}
    for post in posts:
        group = find(("post", post))
        smallest[group] = min(smallest.get(group, hashes[post]), hashes[post])
    return {post: smallest[find(("post", post))] for post in posts}


def check_disjoint(splits_by_domain: Mapping[str, Mapping[Split, Sequence[NamedRow]]]) -> None:
    """Check that no post is in two splits of any two domains.

    Raises:
        DataError: with counts and domain names.
    """
    seen: dict[str, tuple[Split, str]] = {}
    clashes: dict[tuple[str, str], int] = {}
    for domain, splits in splits_by_domain.items():
        for split, rows in splits.items():
            for key in {row.post for row in rows}:
                first_split, first_domain = seen.setdefault(key, (split, domain))
                if first_split != split:
                    pair = (f"{first_split} of {first_domain}", f"{split} of {domain}")
                    clashes[pair] = clashes.get(pair, 0) + 1
    if clashes:
        listed = "; ".join(f"{count} posts in {a} and in {b}" for (a, b), count in sorted(clashes.items()))
        raise DataError(
            f"posts are in two splits: {listed}. Allowed: none. Load the domains together (load_study_data) "
            "and with one split_seed."
        )
