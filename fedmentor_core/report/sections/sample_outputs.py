"""Sample outputs, of public gate sets only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmentor_core.config import StudyConfig
from fedmentor_core.records import Sample, StudySummary
from fedmentor_core.report import words


@dataclass(frozen=True, slots=True)
class SampleGroup:
    """Samples of one domain."""

    domain: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class SampleSet:
    """Samples of one adapter."""

    title: str
    groups: tuple[SampleGroup, ...]


def sample_sets(
    summary: StudySummary,
    config: StudyConfig,
    samples: Sequence[Sample],
    round_samples: Mapping[int, Sequence[Sample]] | None,
) -> list[SampleSet]:
    """Samples to show; none at all where the gate set is private, whatever was passed in."""
    if config.evaluation.gate_data != "public":
        return []
    offset = words.round_offset(summary)
    sets = []
    if samples:
        selected = summary.selected_round
        title = "The last adapter" if selected is None else f"Round {selected + offset} (selected)"
        sets.append(SampleSet(title, _by_domain(samples)))
    for index, some in sorted((round_samples or {}).items()):
        if some and tuple(some) != tuple(samples):
            sets.append(SampleSet(f"Round {index + offset}", _by_domain(some)))
    return sets


def _by_domain(samples: Sequence[Sample]) -> tuple[SampleGroup, ...]:
    names = list(dict.fromkeys(sample.domain for sample in samples))
    return tuple(SampleGroup(name, tuple(s for s in samples if s.domain == name)) for name in names)
