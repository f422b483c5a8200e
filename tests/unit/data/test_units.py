"""Units, splits and digests: the rules as properties."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmentor_core.data.loading import DomainData
from fedmentor_core.data.records import Repairs, Row
from fedmentor_core.data.text import post_key
from fedmentor_core.data.units import (
    NamedRow,
    check_disjoint,
    digest,
    digest_key,
    fingerprint,
    pick_units,
    representatives,
    split_of,
    unit_digest,
)
from fedmentor_core.errors import DataError

KEY = b"a key for tests"
MEMBERSHIPS = st.lists(st.tuples(st.sampled_from("ABCDEFGH"), st.sampled_from("pqrstuvwxyz")), max_size=30)


def row(post="Today was long.", unit=None):
    return Row(post=post, question="Is it late?", response="Yes.", label="yes", gold=True, unit=unit)


@given(MEMBERSHIPS)
def test_groups_are_the_connected_components(pairs):
    groups = representatives(pairs)
    assert set(groups) == {post for _, post in pairs}
    # reference: merge overlapping sets until nothing changes
    components = [{post for u, post in pairs if u == unit} for unit in {unit for unit, _ in pairs}]
    merged = True
    while merged:
        merged = False
        for i, first in enumerate(components):
            for second in components[i + 1 :]:
                if first & second:
                    first |= second
                    components.remove(second)
                    merged = True
                    break
            if merged:
                break
    for component in components:
        assert len({groups[post] for post in component}) == 1
    assert len(set(groups.values())) == len(components)


@given(MEMBERSHIPS, st.randoms(use_true_random=False))
def test_groups_do_not_depend_on_order(pairs, random):
    shuffled = list(pairs)
    random.shuffle(shuffled)
    assert representatives(pairs) == representatives(shuffled)


def test_single_posts_are_placed_alone_as_they_are_together():
    alone = representatives([("irf", "p"), ("irf2", "q")])
    together = representatives([("irf", "p"), ("irf2", "q"), ("multiwd", "p")])
    assert alone == {post: together[post] for post in alone}


def test_split_fractions_come_out_and_seeds_differ():
    places = [split_of(str(i), 0, 0.15, 0.2) for i in range(20_000)]
    assert abs(places.count("test") / 20_000 - 0.2) < 0.01
    assert abs(places.count("gate") / 20_000 - 0.15) < 0.01
    other = [split_of(str(i), 1, 0.15, 0.2) for i in range(20_000)]
    assert places != other
    assert {split_of(str(i), 0, 0.0, 0.0) for i in range(1000)} == {"train"}


@settings(max_examples=50)
@given(st.sets(st.text(min_size=1, max_size=8), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_fingerprint_is_of_the_set(units, random):
    shuffled = [*units, *units]
    random.shuffle(shuffled)
    assert fingerprint(shuffled) == fingerprint(units)
    assert fingerprint({*units, "another unit"}) != fingerprint(units)


def test_digests_are_keyed_and_tell_nothing_apart_from_identity(monkeypatch):
    same, other = (digest(key, "post", post_key("today   was LONG")) for key in (KEY, b"other"))
    assert unit_digest(KEY, row()) == same != other
    assert unit_digest(KEY, row(unit="p1")) == digest(KEY, "unit", "p1") != digest(KEY, "post", "p1")
    assert len(unit_digest(KEY, row())) == 32
    monkeypatch.delenv("SITE_KEY", raising=False)
    public = digest_key("SITE_KEY")
    monkeypatch.setenv("SITE_KEY", "s3cret")
    assert digest_key("SITE_KEY") == b"s3cret" != public


def test_picked_units_do_not_depend_on_order_and_grow_with_the_limit():
    units = [f"u{i}" for i in range(100)]
    ten, twenty = pick_units(units, 10), pick_units(reversed(units), 20)
    assert len(ten) == 10
    assert ten < twenty
    assert pick_units(units, None) == pick_units(units, 100) == set(units)


def test_a_post_in_two_splits_is_refused_without_quoting_it():
    secret = NamedRow(row("Nobody may read this."), "u", "nobodymayreadthis")
    with pytest.raises(DataError, match="1 posts in train of a and in test of b") as caught:
        check_disjoint({"a": {"train": [secret]}, "b": {"test": [secret]}})
    assert "nobody" not in str(caught.value).lower()


def test_what_a_domain_shows_of_itself_holds_no_text():
    secret = NamedRow(row("Nobody may read this."), "u", "nobodymayreadthis")
    domain = DomainData("one", {"train": [secret]}, {"train": 1}, "f", Repairs())
    assert "nobody" not in repr(domain).lower()
