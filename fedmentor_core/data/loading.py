"""Rows of every domain: read, repaired, grouped into units and split. Nothing is written to disk.

``load_study_data`` is for one machine that holds all domains; ``load_domain_data`` is for a site that holds
one and puts a shared post in the same split without talking to anyone (see ``units.py`` for the rule and its
one limit).

Units, counts and fingerprints follow from the texts alone: nothing is tokenised, and the library ``datasets`` is
imported when somebody asks for a table, not when a plan counts units.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fedmentor_core.data.corpora import read_corpus
from fedmentor_core.data.mapping import map_rows, read_hub, read_table
from fedmentor_core.data.records import Counter, Repairs, Row, clean
from fedmentor_core.data.sources import (
    ColumnMapping,
    CorpusSource,
    DataConfig,
    DomainSpec,
    HubSource,
    InventedSource,
    SiteSource,
    TableSource,
)
from fedmentor_core.data.units import (
    SPLITS,
    NamedRow,
    Split,
    check_disjoint,
    digest,
    digest_key,
    fingerprint,
    name_rows,
    pick_units,
    representatives,
    split_of,
    unit_digest,
)
from fedmentor_core.errors import ConfigError, DataError, FedMentorError

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ("unit_id", "post", "question", "response", "label", "gold")
_INVENTED_COLUMNS = ColumnMapping(
    post="post",
    question="question",
    response="response",
    label="label",
    unit="unit_id",
    yes_values=("yes",),
    no_values=("no",),
)


@dataclass(frozen=True)
class DomainData:
    """One domain's rows in three splits; as tables they have columns ``COLUMNS``, and ``unit_id`` is a keyed digest."""

    name: str
    rows: Mapping[Split, Sequence[NamedRow]] = field(repr=False)  # texts have no place in a message or a log
    n_units: dict[Split, int]
    fingerprint: str
    """Digest of the set of units of all splits (rule in ``units.py``): what a privacy ledger is kept for."""
    repairs: Repairs

    @cached_property
    def train(self) -> "Dataset":
        """The training rows as a table; made when it is first asked for, like the other two."""
        return _dataset(self.rows["train"])

    @cached_property
    def gate(self) -> "Dataset":
        """The gate's rows as a table."""
        return _dataset(self.rows["gate"])

    @cached_property
    def test(self) -> "Dataset":
        """The test rows as a table."""
        return _dataset(self.rows["test"])

    def splits(self) -> dict[Split, "Dataset"]:
        """The three tables by name."""
        return {"train": self.train, "gate": self.gate, "test": self.test}

    def unit_digests(self, splits: Iterable[Split] = SPLITS) -> frozenset[str]:
        """Keyed digests of the units, to find later whether two datasets share units."""
        return frozenset(row.unit for split in splits for row in self.rows[split])

    def post_digests(self, key: bytes, splits: Iterable[Split] = SPLITS) -> frozenset[str]:
        """Keyed digests of the posts: finds overlap also where units are named in different ways."""
        return frozenset(
            digest(key, "post", post) for post in {row.post for split in splits for row in self.rows[split]}
        )


def load_study_data(domains: Sequence[DomainSpec], data: DataConfig) -> dict[str, DomainData]:
    """Load every domain and split by unit over all of them together.

    Guarantees: no post is in two splits of any domain (verified, not only constructed); the result depends on
    the rows and the configuration, not on the order of domains or files.

    Raises:
        ConfigError: ``data.root`` is needed and not usable, or an unknown invented corpus.
        DataError: a source cannot be read, or a split that was asked for has no rows.
    """
    names = [domain.name for domain in domains]
    if len(set(names)) < len(names):
        raise ConfigError(f"domains: got the names {', '.join(names)}; allowed: each name once. Rename one domain.")
    key = digest_key(data.digest_key_variable)
    read = {domain.name: _read_domain(domain, data, key) for domain in domains}
    groups = representatives((f"{name}\0{row.unit}", row.post) for name, (rows, _) in read.items() for row in rows)
    picked = {name: _pick(rows, data.max_units) for name, (rows, _) in read.items()}
    split_rows = {name: _split(name, rows, groups, data) for name, rows in picked.items()}
    check_disjoint(split_rows)
    return {name: _domain_data(name, split_rows[name], read[name][1]) for name in names}


def load_domain_data(domain: DomainSpec, data: DataConfig) -> DomainData:
    """Load one domain alone, as a site does; a post goes to the same split as in ``load_study_data``."""
    return load_study_data([domain], data)[domain.name]


def _read_domain(domain: DomainSpec, data: DataConfig, key: bytes) -> tuple[list[NamedRow], Repairs]:
    counter = Counter()
    if isinstance(domain.source, SiteSource):
        raise ConfigError(
            f"domain {domain.name!r}: its rows are at its site (source.kind 'site') and cannot be read anywhere else. "
            "Run this at the site, or give the domain a source of this machine."
        )
    rows = clean(_read_source(domain.source, data, counter), lambda row: unit_digest(key, row), counter)
    if not rows:
        raise DataError(
            f"domain {domain.name!r}: no rows left of its source "
            f"({', '.join(f'{count} {name}' for name, count in counter.counts.items())}). Allowed: rows "
            "with post, question and answer. Check the column mapping and the file."
        )
    return name_rows(key, rows), counter.total()


def _pick(rows: list[NamedRow], max_units: int | None) -> list[NamedRow]:
    units = pick_units((row.unit for row in rows), max_units)
    return [row for row in rows if row.unit in units]


def _read_source(
    source: InventedSource | CorpusSource | TableSource | HubSource, data: DataConfig, counter: Counter
) -> list[Row]:
    match source:
        case InventedSource():
            return _read_invented(source, counter)
        case CorpusSource():
            return read_corpus(source, data.root, counter)
        case TableSource():
            return read_table(source, data.root, counter)
        case HubSource():
            return read_hub(source, counter)


def _read_invented(source: InventedSource, counter: Counter) -> list[Row]:
    from fedmentor_core.data import invented

    try:
        records = invented.generate(source.corpus, source.n_units, source.seed)
    except FedMentorError:
        raise ConfigError(
            f"source.corpus: got {source.corpus!r}, which is not an invented corpus. Allowed: "
            f"{', '.join(sorted(invented.CORPORA))}. Correct source.corpus."
        ) from None
    # The generator numbers its units; another seed makes other people of them.
    texts = [{**record, "unit_id": f"{source.corpus}/{source.seed}/{record['unit_id']}"} for record in records]
    where = f"invented corpus {source.corpus!r}"
    return map_rows(where, list(texts[0]) if texts else [], texts, _INVENTED_COLUMNS, counter)


def _split(
    name: str, rows: Sequence[NamedRow], groups: dict[str, str], data: DataConfig
) -> dict[Split, list[NamedRow]]:
    places = {
        group: split_of(group, data.split_seed, data.gate_fraction, data.test_fraction)
        for group in set(groups.values())
    }
    found: dict[Split, list[NamedRow]] = {split: [] for split in SPLITS}
    for row in rows:
        found[places[groups[row.post]]].append(row)
    wanted: dict[Split, float] = {
        "train": 1.0 - data.gate_fraction - data.test_fraction,
        "gate": data.gate_fraction,
        "test": data.test_fraction,
    }
    for split, fraction in wanted.items():
        if fraction > 0 and not found[split]:
            raise DataError(
                f"domain {name!r}: no rows left for the {split} split ({len(rows)} rows in all, fraction "
                f"{fraction:g}). Allowed: at least one unit in every split that has a fraction above 0. "
                "Give the domain more units, raise data.max_units or the fraction, or use another "
                "data.split_seed."
            )
    return found


def _domain_data(name: str, splits: dict[Split, list[NamedRow]], repairs: Repairs) -> DomainData:
    return DomainData(
        name=name,
        rows=splits,
        n_units={split: len({row.unit for row in rows}) for split, rows in splits.items()},
        fingerprint=fingerprint(row.unit for rows in splits.values() for row in rows),
        repairs=repairs,
    )


def _dataset(named: Sequence[NamedRow]) -> "Dataset":
    from datasets import Dataset, Features, Value

    rows = [item.row for item in named]
    text = Value("string")
    features = Features({name: Value("bool") if name == "gold" else text for name in COLUMNS})
    columns: dict[str, list[Any]] = {
        "unit_id": [item.unit for item in named],
        "post": [row.post for row in rows],
        "question": [row.question for row in rows],
        "response": [row.response for row in rows],
        "label": [row.label for row in rows],
        "gold": [row.gold for row in rows],
    }
    return Dataset.from_dict(columns, features=features)
