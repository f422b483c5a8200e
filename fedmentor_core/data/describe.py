"""What the data of a study looks like: counts, units, lengths, labels, repairs, overlap; never a text.

These are exact statistics of private data: they are for the people who own the data, and stay at the site.
"""

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from fedmentor_core.data.loading import DomainData
from fedmentor_core.data.text import post_key
from fedmentor_core.data.units import SPLITS, Split
from fedmentor_core.evaluation.labels import YES_NO

if TYPE_CHECKING:
    from rich.console import Group

QUANTILES = (0.05, 0.5, 0.95, 1.0)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Lengths(_Frozen):
    """Quantiles of a text's length in words, by nearest rank."""

    p05: int
    p50: int
    p95: int
    max: int


class SplitReport(_Frozen):
    """One split of one domain."""

    n_rows: int
    n_units: int
    n_posts: int = Field(description="Distinct posts, by post key.")
    labels: dict[str, int] = Field(description="Rows by label; '' is a row without one.")


class DomainReport(_Frozen):
    """One domain over all its splits."""

    name: str
    fingerprint: str
    splits: dict[Split, SplitReport]
    n_rows: int
    n_units: int
    rows_per_unit_mean: float
    rows_per_unit_max: int
    post_words: Lengths
    response_words: Lengths
    yes_share: float | None = Field(description="Share of yes among rows labelled yes or no; None without any.")
    gold_share: float = Field(description="Share of rows whose label a person gave.")
    repairs: dict[str, int]


class Overlap(_Frozen):
    """Posts and units that two domains share.

    Units are compared by digest: where both domains name their units by number, equal numbers count as shared.
    """

    domains: tuple[str, str]
    shared_posts: int
    shared_units: int
    shared_posts_across_splits: int = Field(description="Shared posts that are in different splits: must be 0.")


class DescribeReport(_Frozen):
    """What ``fedmentor data describe`` shows."""

    domains: list[DomainReport]
    overlaps: list[Overlap]


def describe(data: dict[str, DomainData]) -> DescribeReport:
    """Describe loaded domains."""
    posts = {name: _posts_by_split(domain) for name, domain in data.items()}
    names = list(data)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return DescribeReport(
        domains=[_describe_domain(domain, posts[name]) for name, domain in data.items()],
        overlaps=[_overlap(data[a], data[b], posts[a], posts[b]) for a, b in pairs],
    )


def _posts_by_split(domain: DomainData) -> dict[Split, set[str]]:
    return {split: {post_key(post) for post in table["post"][:]} for split, table in domain.splits().items()}


def _describe_domain(domain: DomainData, posts: dict[Split, set[str]]) -> DomainReport:
    splits: dict[Split, SplitReport] = {}
    rows_of_unit: dict[str, int] = {}
    labels: list[str] = []
    gold = 0
    post_words: list[int] = []
    response_words: list[int] = []
    for split, table in domain.splits().items():
        split_labels = table["label"][:]
        splits[split] = SplitReport(
            n_rows=len(table),
            n_units=domain.n_units[split],
            n_posts=len(posts[split]),
            labels={label: split_labels.count(label) for label in sorted(set(split_labels))},
        )
        for unit in table["unit_id"][:]:
            rows_of_unit[unit] = rows_of_unit.get(unit, 0) + 1
        labels += split_labels
        gold += sum(table["gold"][:])
        post_words += [len(text.split()) for text in table["post"][:]]
        response_words += [len(text.split()) for text in table["response"][:]]
    yes_or_no = sum(label in YES_NO for label in labels)
    return DomainReport(
        name=domain.name,
        fingerprint=domain.fingerprint,
        splits=splits,
        n_rows=len(labels),
        n_units=len(rows_of_unit),
        rows_per_unit_mean=len(labels) / len(rows_of_unit),
        rows_per_unit_max=max(rows_of_unit.values()),
        post_words=_lengths(post_words),
        response_words=_lengths(response_words),
        yes_share=labels.count("yes") / yes_or_no if yes_or_no else None,
        gold_share=gold / len(labels),
        repairs={name: getattr(domain.repairs, name) for name in domain.repairs.__slots__},
    )


def _lengths(words: list[int]) -> Lengths:
    ordered = sorted(words)
    p05, p50, p95, most = (ordered[max(0, -(-int(q * 100) * len(ordered) // 100) - 1)] for q in QUANTILES)
    return Lengths(p05=p05, p50=p50, p95=p95, max=most)


def _overlap(a: DomainData, b: DomainData, posts_a: dict[Split, set[str]], posts_b: dict[Split, set[str]]) -> Overlap:
    across = sum(len(posts_a[s] & posts_b[t]) for s in SPLITS for t in SPLITS if s != t)
    return Overlap(
        domains=(a.name, b.name),
        shared_posts=len(set().union(*posts_a.values()) & set().union(*posts_b.values())),
        shared_units=len(a.unit_digests() & b.unit_digests()),
        shared_posts_across_splits=across,
    )


def render(report: DescribeReport) -> "Group":
    """The report as rich tables."""
    from rich.console import Group
    from rich.table import Table

    counts = Table(title="Rows and privacy units", title_justify="left")
    for name in ("domain", "split"):
        counts.add_column(name)
    for name in ("rows", "units", "posts", "yes", "no", "other"):
        counts.add_column(name, justify="right")
    for domain in report.domains:
        for split, part in domain.splits.items():
            answers = [part.labels.get(label, 0) for label in YES_NO]
            numbers = [part.n_rows, part.n_units, part.n_posts, *answers, part.n_rows - sum(answers)]
            counts.add_row(domain.name, split, *(f"{number:,}" for number in numbers))
        counts.add_section()

    shape = Table(title="Shape", title_justify="left", caption="Lengths in words: 5 % / median / 95 % / longest.")
    for name in ("domain", "rows per unit", "post", "response", "yes", "gold", "repairs"):
        shape.add_column(name)
    for domain in report.domains:
        repairs = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in domain.repairs.items() if n)
        shape.add_row(
            domain.name,
            f"{domain.rows_per_unit_mean:.2f} (at most {domain.rows_per_unit_max})",
            _show(domain.post_words),
            _show(domain.response_words),
            "-" if domain.yes_share is None else f"{domain.yes_share:.1%}",
            f"{domain.gold_share:.1%}",
            repairs or "none",
        )

    labels = Table(title="Labels other than yes and no", title_justify="left")
    labels.add_column("domain")
    labels.add_column("label")
    for split in SPLITS:
        labels.add_column(split, justify="right")
    for domain in report.domains:
        known = {label for part in domain.splits.values() for label in part.labels} - {*YES_NO, ""}
        for label in sorted(known):
            counted = (domain.splits[split].labels.get(label, 0) for split in SPLITS)
            labels.add_row(domain.name, label, *(f"{number:,}" for number in counted))

    overlap = Table(title="Overlap between domains", title_justify="left")
    overlap.add_column("domains")
    for name in ("shared posts", "shared units", "posts in different splits"):
        overlap.add_column(name, justify="right")
    for pair in report.overlaps:
        numbers = [pair.shared_posts, pair.shared_units, pair.shared_posts_across_splits]
        overlap.add_row(" and ".join(pair.domains), *(f"{number:,}" for number in numbers))
    return Group(counts, shape, *(table for table in (labels, overlap) if table.row_count))


def _show(lengths: Lengths) -> str:
    return f"{lengths.p05} / {lengths.p50} / {lengths.p95} / {lengths.max}"
