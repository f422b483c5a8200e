"""Whole domains: the same split alone and together, fingerprints, limits, and clear errors."""

import json
import random
from dataclasses import dataclass

import pytest

from fedmentor_core.data.describe import describe, render
from fedmentor_core.data.loading import COLUMNS, load_domain_data, load_study_data
from fedmentor_core.data.sources import DataConfig, InventedSource, TableSource
from fedmentor_core.data.units import digest_key
from fedmentor_core.errors import ConfigError, DataError

WORDS = ("river", "lamp", "quiet", "morning", "paper", "garden", "slow", "bridge", "window", "cold", "bread")


@dataclass(frozen=True)
class Domain:
    name: str
    source: object


def posts(seed, n):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=40)).capitalize() + "." for _ in range(n)]


def table(tmp_path, name, rows, unit=None):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = {"post": "text", "label": "y", "question": "q", "unit": unit}
    return Domain(name, TableSource(kind="jsonl", path=str(path), columns=columns))


def rows_of(texts, questions=("Is it cold?",)):
    return [{"text": t, "q": q, "y": len(t) % 2} for t in texts for q in questions]


@pytest.fixture
def two_services(tmp_path):
    shared, one, other = posts(1, 60), posts(2, 60), posts(3, 60)
    return [
        table(tmp_path, "one", rows_of(shared + one)),
        table(tmp_path, "other", rows_of(other + shared, ("Is it late?", "Is it loud?"))),
    ]


def place_of_posts(domain):
    return {post: split for split, rows in domain.splits().items() for post in rows["post"]}


def test_a_shared_post_is_in_one_split_of_all_domains_together_or_alone(two_services):
    data = load_study_data(two_services, DataConfig(split_seed=5))
    places = place_of_posts(data["one"])
    other = place_of_posts(data["other"])
    shared = set(places) & set(other)
    assert len(shared) == 60
    assert all(places[post] == other[post] for post in shared)
    for domain in two_services:
        alone = load_domain_data(domain, DataConfig(split_seed=5))
        assert place_of_posts(alone) == place_of_posts(data[domain.name])
        assert alone.fingerprint == data[domain.name].fingerprint
    report = describe(data)
    (overlap,) = report.overlaps
    assert (overlap.shared_posts, overlap.shared_units, overlap.shared_posts_across_splits) == (60, 60, 0)
    assert load_study_data(two_services[::-1], DataConfig(split_seed=5))["one"].train.to_list() == (
        data["one"].train.to_list()
    )


def test_columns_types_and_counts(two_services):
    data = load_study_data(two_services, DataConfig())["other"]
    for split, rows in data.splits().items():
        assert tuple(rows.column_names) == COLUMNS
        assert data.n_units[split] * 2 == len(rows)
        assert set(rows["label"]) <= {"yes", "no"}
        assert all(rows["gold"])
        assert all(len(unit) == 32 for unit in rows["unit_id"])
    assert sum(data.n_units.values()) == 120


def test_fingerprint_ignores_order_file_name_split_and_questions_but_not_units(tmp_path):
    texts = posts(4, 80)
    base = load_domain_data(table(tmp_path, "a", rows_of(texts)), DataConfig())
    same = load_domain_data(table(tmp_path, "b", rows_of(texts[::-1], ("Other?", "Third?"))), DataConfig(split_seed=9))
    fewer = load_domain_data(table(tmp_path, "c", rows_of(texts[1:])), DataConfig())
    assert base.fingerprint == same.fingerprint != fewer.fingerprint
    assert len(base.unit_digests() & fewer.unit_digests()) == 79
    assert base.unit_digests(["train"]) | base.unit_digests(["gate", "test"]) == base.unit_digests()
    key = digest_key("FEDMENTOR_UNIT_KEY")
    assert base.post_digests(key) == base.unit_digests()  # the unit is the post


def test_a_site_key_changes_every_digest_and_no_split(tmp_path, monkeypatch):
    domain = table(tmp_path, "a", rows_of(posts(4, 80)))
    public = load_domain_data(domain, DataConfig())
    monkeypatch.setenv("FEDMENTOR_UNIT_KEY", "held by the site")
    keyed = load_domain_data(domain, DataConfig())
    assert not keyed.unit_digests() & public.unit_digests()
    assert place_of_posts(keyed) == place_of_posts(public)


def test_patients_keep_their_rows_together_and_a_shared_post_joins_them(tmp_path):
    texts = posts(6, 120)
    rows = [{"text": text, "q": "Is it cold?", "y": 1, "p": f"patient {i // 3}"} for i, text in enumerate(texts)]
    again = {"text": texts[0], "q": "Is it late?", "y": 0, "p": "patient 39"}
    data = load_domain_data(table(tmp_path, "clinic", [*rows, again], unit="p"), DataConfig())
    assert sum(data.n_units.values()) == 40
    splits_of = {}
    for split, part in data.splits().items():
        for unit in part["unit_id"]:
            splits_of.setdefault(unit, set()).add(split)
    assert all(len(splits) == 1 for splits in splits_of.values())
    assert "patient" not in "".join(splits_of)
    assert len({place_of_posts(data)[post] for post in (texts[0], texts[1], texts[117])}) == 1


def test_equal_patient_numbers_of_two_services_are_not_joined(tmp_path):
    rows = [{"text": t, "q": "Cold?", "y": 1, "p": str(i // 2)} for i, t in enumerate(posts(7, 120))]
    more = [{"text": t, "q": "Cold?", "y": 1, "p": str(i // 2)} for i, t in enumerate(posts(8, 120))]
    domains = [table(tmp_path, "a", rows, unit="p"), table(tmp_path, "b", more, unit="p")]
    data = load_study_data(domains, DataConfig())
    for domain in domains:
        assert place_of_posts(load_domain_data(domain, DataConfig())) == place_of_posts(data[domain.name])


def test_max_units_keeps_whole_units_in_their_split(two_services):
    everything = load_study_data(two_services, DataConfig())["other"]
    some = load_study_data(two_services, DataConfig(max_units=50))["other"]
    assert sum(some.n_units.values()) == 50
    assert sum(len(rows) for rows in some.splits().values()) == 100
    places = place_of_posts(everything)
    assert all(places[post] == split for post, split in place_of_posts(some).items())


def test_invented_source_gives_the_asked_number_of_units():
    data = load_domain_data(Domain("forum", InventedSource(corpus="peer_forum", n_units=90)), DataConfig())
    assert sum(data.n_units.values()) == 90
    assert set(data.train["label"]) == {"yes", "no"}
    other = load_domain_data(Domain("forum", InventedSource(corpus="peer_forum", n_units=90, seed=1)), DataConfig())
    assert not data.unit_digests() & other.unit_digests()


def test_unknown_invented_corpus_is_refused():
    with pytest.raises(ConfigError, match=r"got 'nosuch'.*Allowed: .*peer_forum"):
        load_domain_data(Domain("forum", InventedSource(corpus="nosuch", n_units=9)), DataConfig())


def test_too_few_units_for_the_splits_says_which_and_what_to_do(tmp_path):
    domain = table(tmp_path, "tiny", rows_of(posts(9, 2)))
    with pytest.raises(DataError, match=r"domain 'tiny': no rows left for the \w+ split .2 rows in all"):
        load_domain_data(domain, DataConfig())
    load_domain_data(domain, DataConfig(gate_fraction=0, test_fraction=0))


def test_no_rows_left_and_repeated_names(tmp_path):
    empty = table(tmp_path, "empty", [{"text": " ", "q": "Cold?", "y": 1}])
    with pytest.raises(DataError, match=r"no rows left of its source \(1 empty_dropped\)"):
        load_domain_data(empty, DataConfig())
    with pytest.raises(ConfigError, match="each name once"):
        load_study_data([empty, empty], DataConfig())


def test_description_counts_and_renders_without_text_or_ids(two_services):
    import io

    from rich.console import Console

    data = load_study_data(two_services, DataConfig())
    report = describe(data)
    one = report.domains[0]
    assert (one.n_rows, one.n_units, one.rows_per_unit_max, one.gold_share) == (120, 120, 1, 1.0)
    assert (one.post_words.p05, one.post_words.p50, one.post_words.max) == (40, 40, 40)
    assert sum(part.n_rows for part in one.splits.values()) == 120
    assert sum(part.labels.get("yes", 0) for part in one.splits.values()) / 120 == one.yes_share
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(render(report))
    shown = console.export_text() + report.model_dump_json()
    assert "Overlap between domains" in shown
    assert "River" not in shown
    assert not any(unit in shown for unit in data["one"].unit_digests())
    assert type(report).model_validate_json(report.model_dump_json()) == report
