"""Outputs of every arm on the same prompts, side by side. Records hold prompts of public gate sets only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmentor_core.compare.records import CellResult
from fedmentor_core.records import Sample


@dataclass(frozen=True, slots=True)
class Output:
    """What one arm wrote."""

    arm: str
    sample: Sample


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt with the outputs of every arm that saw it."""

    domain: str
    post: str
    question: str
    reference: str
    outputs: tuple[Output, ...]


def seed_shown(cells: Mapping[str, Sequence[CellResult]]) -> int | None:
    """The seed that most arms have outputs of, the lowest of several; None without outputs."""
    seeds = [cell.seed for some in cells.values() for cell in some if cell.samples]
    return min(set(seeds), key=lambda seed: (-seeds.count(seed), seed), default=None)


def prompts(cells: Mapping[str, Sequence[CellResult]], seed: int | None) -> list[Prompt]:
    """Every prompt of one seed, in the order of the first arm that has it."""
    found: dict[tuple[str, str, str, str], list[Output]] = {}
    for name, some in cells.items():
        for cell in some:
            for sample in cell.samples if cell.seed == seed else ():
                place = (sample.domain, sample.post, sample.question, sample.reference)
                found.setdefault(place, []).append(Output(name, sample))
    return [Prompt(*place, tuple(outputs)) for place, outputs in found.items()]
