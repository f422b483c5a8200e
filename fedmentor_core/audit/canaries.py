"""Canaries: invented posts with answers that nothing but training on them would teach.

Each is a privacy unit of its own, in the training set with probability 1/2 by a coin from the system's entropy. A
canary that lost its coin stays as a unit **without targets**: its gradient is exactly zero, so it adds nothing to any
sum, while the number of units, the sampling rate and the denominator stay what they are. What was released therefore
depends on the coins through the canaries' clipped gradients alone, which is what the promise is about.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fedmentor_core.data.encode import IGNORED
from fedmentor_core.data.records import Row
from fedmentor_core.data.text import post_key
from fedmentor_core.data.units import NamedRow
from fedmentor_core.errors import ConfigError
from fedmentor_core.hashing import canonical_sha256
from fedmentor_core.study_ref import StudyRef
from fedmentor_core.training.client import TrainingSet
from fedmentor_core.workspace import Workspace

QUESTION = "Which words belong to this note?"
MIN_CANARIES, MAX_CANARIES = 8, 20_000
_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z")
_VOWELS = ("a", "e", "i", "o", "u")
_POST_WORDS, _ANSWER_WORDS = 7, 10


@dataclass(frozen=True, slots=True)
class CanarySet:
    """The canaries of one domain and how their coins fell.

    Attributes:
        posts: distinct random texts.
        responses: distinct random answers.
        included: whether the canary was trained on.
    """

    posts: tuple[str, ...]
    responses: tuple[str, ...]
    included: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.posts)

    def rows(self) -> list[NamedRow]:
        """One row per canary."""
        return [
            NamedRow(
                Row(post=post, question=QUESTION, response=response, label="", gold=False),
                unit=canonical_sha256(["canary", post])[:32],  # a unit of no other domain
                post=post_key(post),
            )
            for post, response in zip(self.posts, self.responses, strict=True)
        ]


def make_canaries(n: int) -> CanarySet:
    """Draw ``n`` canaries and their coins from the system's entropy.

    Raises:
        ConfigError: too few for any statement, or more than an audit needs.
    """
    if not MIN_CANARIES <= n <= MAX_CANARIES:
        raise ConfigError(
            f"canaries: got {n}; allowed: {MIN_CANARIES} to {MAX_CANARIES}. A few hundred are a good number: fewer "
            "cannot refute an epsilon above 2."
        )
    return CanarySet(
        posts=_texts(n, _POST_WORDS),
        responses=_texts(n, _ANSWER_WORDS),
        included=tuple(secrets.randbits(1) == 1 for _ in range(n)),
    )


def _texts(n: int, n_words: int) -> tuple[str, ...]:
    found: set[str] = set()
    while len(found) < n:
        found.add(" ".join(_word() for _ in range(n_words)))
    return tuple(found)


def _word() -> str:
    return "".join(secrets.choice(_ONSETS) + secrets.choice(_VOWELS) for _ in range(3))


class CountedUnits(Sequence[Sequence[int]]):
    """Rows of each unit, counting how often a unit is drawn: the sampler is watched without a change to it."""

    def __init__(self, rows_of_unit: Sequence[Sequence[int]]) -> None:
        """Nothing was drawn yet."""
        self._rows = rows_of_unit
        self.draws = [0] * len(rows_of_unit)
        self.total = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, unit: Any) -> Any:
        self.draws[unit] += 1
        self.total += 1
        return self._rows[unit]


class AuditWorkspace(Workspace):
    """A study's workspace whose audited domains have canaries among their training units.

    The fingerprint stays that of the data without them: canaries are nobody's, and an account is kept for people.
    """

    def __init__(self, ref: StudyRef, canaries: Mapping[str, CanarySet]) -> None:
        """``canaries``: by domain; the other domains train as ever."""
        super().__init__(ref)
        self.canaries = canaries
        self._watched: dict[str, CountedUnits] = {}
        self._audited: dict[str, TrainingSet] = {}

    @cached_property
    def _data(self) -> Any:
        found = dict(super()._data)
        for name, canaries in self.canaries.items():
            data = found[name]
            found[name] = replace(
                data,
                rows={**data.rows, "train": [*data.rows["train"], *canaries.rows()]},
                n_units={**data.n_units, "train": data.n_units["train"] + len(canaries)},
            )
        return found

    def training_set(self, domain: str) -> TrainingSet:
        """The domain's training units; canaries come last, those that were left out without targets."""
        with self._lock:
            if domain not in self._audited:
                whole = super().training_set(domain)
                labels = list(whole.labels)
                canaries = self.canaries.get(domain)
                if canaries is not None:
                    first = whole.n_units - len(canaries)
                    for position, included in enumerate(canaries.included):
                        for row in whole.rows_of_unit[first + position]:
                            labels[row] = labels[row] if included else [IGNORED] * len(labels[row])
                self._watched[domain] = CountedUnits(whole.rows_of_unit)
                self._audited[domain] = replace(whole, labels=labels, rows_of_unit=self._watched[domain])
            return self._audited[domain]

    def canary_set(self, domain: str) -> TrainingSet:
        """The canaries alone, all with their targets: what is scored, and what probes train on."""
        whole = super().training_set(domain)
        units = whole.rows_of_unit[whole.n_units - len(self.canaries[domain]) :]
        rows = [row for unit in units for row in unit]
        return TrainingSet(
            input_ids=[whole.input_ids[row] for row in rows],
            labels=[whole.labels[row] for row in rows],
            rows_of_unit=[[position] for position in range(len(rows))],
            pad_id=whole.pad_id,
        )

    def draws(self, domain: str) -> CountedUnits:
        """How often each training unit was drawn so far."""
        self.training_set(domain)
        return self._watched[domain]
