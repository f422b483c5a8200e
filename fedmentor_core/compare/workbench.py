"""What all cells of a comparison share in one process: data, tokens, scorers, and the untrained model's scores."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from fedmentor_core import rounds
from fedmentor_core.compare.arms import POOLED
from fedmentor_core.data.loading import DomainData
from fedmentor_core.hashing import canonical_sha256
from fedmentor_core.privacy.validation_plan import SetName
from fedmentor_core.progress import Listener, ProgressEvent
from fedmentor_core.records import ArtifactRef, DomainEvaluation, SafetyEvaluation
from fedmentor_core.study_ref import StudyRef
from fedmentor_core.training.client import TrainingSet
from fedmentor_core.workspace import Workspace

if TYPE_CHECKING:
    from fedmentor_core.evaluation.scores import EvaluationSet


class CellWorkspace(Workspace):
    """One cell's workspace: its own adapters, store and ledgers, on rows and scorers that are loaded once for all.

    The domain ``POOLED``, of the arm that has one client for all data, holds every domain's training units.
    """

    def __init__(self, ref: StudyRef, common: Workspace) -> None:
        """``common``: of the study that all cells start from."""
        super().__init__(ref)
        self.common = common

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Names of the domains whose gate and test sets every cell is evaluated on."""
        return tuple(domain.name for domain in self.common.config.domains)

    @cached_property
    def _data(self) -> Mapping[str, DomainData]:
        found: Mapping[str, DomainData] = self.common.data
        if POOLED not in {domain.name for domain in self.config.domains}:
            return found
        return {**found, POOLED: pool_data(list(found.values()))}

    @cached_property
    def _scorers(self) -> object:
        return self.common.scorers

    def training_set(self, domain: str) -> TrainingSet:
        """A domain's tokenised training rows, the same for all cells."""
        if domain == POOLED:
            return pool([self.common.training_set(name) for name in self.evaluated])
        return self.common.training_set(domain)

    def evaluation_set(self, domain: str, split: Literal["gate", "test"]) -> "EvaluationSet":
        """A domain's gate or test rows, the same for all cells."""
        found: EvaluationSet = self.common.evaluation_set(domain, split)
        return found


def evaluate(
    workspace: CellWorkspace, adapter: ArtifactRef, domain: str, split: SetName, listen: Listener
) -> DomainEvaluation:
    """``rounds.evaluate`` with progress; the untrained adapter's scores are shared."""
    if adapter == workspace.untrained_adapter:
        return untrained(workspace.common, domain, split, listen)
    return rounds.evaluate(workspace, adapter, domain, split, _told(listen, domain))


def answer_safety(workspace: CellWorkspace, adapter: ArtifactRef) -> SafetyEvaluation | None:
    """``rounds.evaluate_safety``; the untrained adapter's answers are shared. None: no prompts are configured."""
    if adapter == workspace.untrained_adapter:
        return rounds.evaluate_safety(workspace.common, workspace.common.untrained_adapter)
    return rounds.evaluate_safety(workspace, adapter)


def untrained(common: Workspace, domain: str, split: SetName, listen: Listener) -> DomainEvaluation:
    """The untrained backbone on one set, evaluated once for all cells and found again by content.

    An untrained adapter changes nothing, because its B (or core) is zero, whatever the seed of its A.
    """
    return rounds.evaluate(common, common.untrained_adapter, domain, split, _told(listen, domain))


def pool(sets: Sequence[TrainingSet]) -> TrainingSet:
    """Training sets as one; every unit stays a unit of its own."""
    rows_of_unit: list[list[int]] = []
    first = 0
    for one in sets:
        rows_of_unit += [[first + row for row in rows] for rows in one.rows_of_unit]
        first += len(one.input_ids)
    return TrainingSet(
        input_ids=[row for one in sets for row in one.input_ids],
        labels=[row for one in sets for row in one.labels],
        rows_of_unit=rows_of_unit,
        pad_id=sets[0].pad_id,
    )


def pool_data(parts: Sequence[DomainData]) -> DomainData:
    """The domains' rows as one client's; its gate and test sets are never looked at."""
    first = parts[0]
    return DomainData(
        name=POOLED,
        rows={**first.rows, "train": [row for part in parts for row in part.rows["train"]]},
        n_units={split: sum(part.n_units[split] for part in parts) for split in first.n_units},
        fingerprint=canonical_sha256([part.fingerprint for part in parts]),
        repairs=first.repairs,
    )


def _told(listen: Listener, domain: str) -> Callable[[int, int], None]:
    return lambda done, total: listen(ProgressEvent("evaluate", domain=domain, completed=done, total=total))
