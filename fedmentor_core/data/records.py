"""What the readers hand to the loader: rows of one domain and the count of what was repaired on the way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fedmentor_core.data.text import repair_mojibake, squeeze


@dataclass(frozen=True, slots=True)
class Row:
    """One question about one post, with its reference answer."""

    post: str
    question: str
    response: str
    label: str
    """One of the domain's labels (``"yes"`` and ``"no"``, or its closed set); ``""`` where it has none."""
    gold: bool
    """Whether a person gave the label."""
    unit: str | None = None
    """Unit id from the source (a post id, a patient id); None: the post itself is the unit."""


@dataclass(frozen=True, slots=True)
class Repairs:
    """What was changed or left out while reading, in rows of the source unless stated otherwise."""

    mojibake: int = 0
    """Rows with at least one text whose characters were repaired."""
    duplicates_dropped: int = 0
    """Built rows dropped because the same post and question came before."""
    conflicting_labels: int = 0
    """Of those, rows whose label differed from the one that was kept."""
    empty_dropped: int = 0
    """Built rows dropped because post, question or response was empty."""
    malformed: int = 0
    """Rows that do not follow their form but could be read (the template's marker stands inside the post)."""
    malformed_dropped: int = 0
    """Rows that do not follow their form and were left out."""
    without_human_label: int = 0
    """Rows of an IMHI form for which the raw files hold no label, where they were asked for."""
    answer_against_label: int = 0
    """Rows whose reference answer opens with another word than the human label says."""

    def __add__(self, other: "Repairs") -> "Repairs":
        return Repairs(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})


@dataclass(slots=True)
class Counter:
    """Counts repairs while a reader runs."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, amount: int = 1) -> None:
        """Raise one count; ``name`` is a field of ``Repairs``."""
        self.counts[name] = self.counts.get(name, 0) + amount

    def repair(self, *texts: str) -> list[str]:
        """Repair the texts of one row, strip them, and count the row once if any of them changed."""
        done = [repair_mojibake(text) for text in texts]
        if any(changed for _, changed in done):
            self.add("mojibake")
        return [text.strip() for text, _ in done]

    def total(self) -> Repairs:
        """The counts so far."""
        return Repairs(**self.counts)


def clean(rows: Sequence[Row], unit_of: Callable[[Row], str], counter: Counter) -> list[Row]:
    """Drop rows with an empty part, and all but one of the rows that ask the same of the same post.

    Which of several equal rows stays depends on their content (unit, answer, label) and not on the order of
    the files, so that the result describes the same set of units however the rows are shuffled.
    """
    kept: dict[tuple[str, str], Row] = {}
    for row in rows:
        if not (row.post and row.question and row.response):
            counter.add("empty_dropped")
            continue
        key = (squeeze(row.post), squeeze(row.question))
        other = kept.get(key)
        if other is None:
            kept[key] = row
            continue
        counter.add("duplicates_dropped")
        if row.label != other.label:
            counter.add("conflicting_labels")
        kept[key] = min(row, other, key=lambda r: (not r.gold, unit_of(r), r.response, r.label))
    return list(kept.values())
