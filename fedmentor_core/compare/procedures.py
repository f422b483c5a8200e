"""How the cells of an arm are made: not at all, by clients that exchange nothing, or federated.

All of them take ``rounds`` times ``steps_per_round`` optimiser steps with a new optimiser every round, start from the
same adapter of the seed, and end with the adapter after the last round: no gate chooses among rounds, so that no arm
gains from looking at the gate set. Each stores what it finished, round by round, and goes on from there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedmentor_core import rounds
from fedmentor_core.compare.arms import POOLED, Procedure
from fedmentor_core.compare.workbench import CellWorkspace, answer_safety, evaluate
from fedmentor_core.errors import FedMentorError
from fedmentor_core.evaluation.evaluate import combine
from fedmentor_core.privacy.validation_plan import SetName
from fedmentor_core.progress import Listener, ProgressEvent
from fedmentor_core.records import (
    ArtifactRef,
    ClientAssignment,
    ClientSummary,
    ClientUpdate,
    DomainEvaluation,
    EvaluationMetrics,
    GateSummary,
    GateVerdict,
    RoundSummary,
    SafetyEvaluation,
    Sample,
)
from fedmentor_core.rounds import Comparisons, RoundState
from fedmentor_core.steps import train_with_retries
from fedmentor_core.study import Evaluations, InProcess, answered, run_study

NO_GATE = "a comparison promotes nothing: the adapter after the last round is final"


@dataclass(frozen=True)
class Outcome:
    """What a procedure made; ``seconds`` of all that was computed, whichever start computed it."""

    final: EvaluationMetrics
    rounds: tuple[RoundSummary, ...]
    samples: tuple[Sample, ...]
    seconds: float
    epsilon_spent: Mapping[str, float]
    safety: SafetyEvaluation | None = None
    warnings: tuple[str, ...] = ()


def untrained(workspace: CellWorkspace, listen: Listener) -> Outcome:
    """The backbone as it is."""
    return _outcome(workspace, (), dict.fromkeys(workspace.evaluated, workspace.untrained_adapter), listen)


def alone(workspace: CellWorkspace, listen: Listener) -> Outcome:
    """Each domain trains an adapter of its own and is evaluated with it; nothing is exchanged."""
    return _without_exchange(workspace, {name: (name,) for name in workspace.evaluated}, listen)


def pooled(workspace: CellWorkspace, listen: Listener) -> Outcome:
    """One client holds all domains' units, and every step takes the sum of their batches."""
    return _without_exchange(workspace, {POOLED: workspace.evaluated}, listen)


def federated(workspace: CellWorkspace, listen: Listener) -> Outcome:
    """The whole study by ``run_study``, with or without privacy."""
    engine = CellEngine(workspace, listen)
    summary = run_study(workspace.ref, engine, _without_verdict(listen))
    last = rounds.find_manifest(workspace, summary.rounds[-1].round_index)
    assert last is not None
    assert summary.final is not None
    private = workspace.config.privacy.mode == "dp"
    clients = summary.rounds[-1].clients if private else ()
    rested = sorted({one.domain for each in summary.rounds for one in each.clients if one.status == "rested"})
    return Outcome(
        final=summary.final,
        rounds=summary.rounds,
        samples=last.samples,
        seconds=_seconds(summary.rounds) + _seconds(engine.tests),
        epsilon_spent={one.domain: one.epsilon_spent for one in clients if one.epsilon_spent is not None},
        safety=summary.safety_final,
        warnings=(
            *(warning for domain in summary.plan.domains for warning in domain.warnings),
            *(f"domain {name!r} rested in some rounds: its budget was used up" for name in rested),
        ),
    )


PROCEDURES: Mapping[Procedure, Callable[[CellWorkspace, Listener], Outcome]] = {
    "untrained": untrained,
    "alone": alone,
    "pooled": pooled,
    "federated": federated,
}


class CellEngine(InProcess):
    """Plain function calls, where no client may be missing and no gate decides anything."""

    workspace: CellWorkspace

    def __init__(self, workspace: CellWorkspace, listen: Listener) -> None:
        """Carry out the steps of ``workspace``'s study."""
        super().__init__(workspace, listen)
        self.tests: list[DomainEvaluation] = []

    def train(self, assignments: Sequence[ClientAssignment]) -> list[ClientUpdate]:
        """As ever; but a round without one of its clients would compare unlike things.

        Raises:
            FedMentorError: a client failed. The round is not committed, so that the next start tries again.
        """
        return [_present(update) for update in super().train(assignments)]

    def evaluate(self, adapter: ArtifactRef, split: SetName, meanwhile: Sequence[ClientAssignment] = ()) -> Evaluations:
        """As ever; the untrained adapter's scores are shared by all cells."""
        if adapter == self.workspace.untrained_adapter:
            return [evaluate(self.workspace, adapter, name, split, self.listen) for name in self.workspace.evaluated]
        found = answered(super().evaluate(adapter, split))
        self.tests += found if split == "test" else []
        return found

    def safety(self, adapter: ArtifactRef) -> SafetyEvaluation | None:
        """As ever; the untrained adapter's answers are shared by all cells."""
        return answer_safety(self.workspace, adapter)

    def gate(self, metrics: EvaluationMetrics, comparisons: Comparisons) -> GateVerdict:
        """Never passed, so that no round is chosen and the last one's adapter is final."""
        return GateVerdict(passed=False, results=(), reasons=(NO_GATE,))


def _without_exchange(workspace: CellWorkspace, clients: Mapping[str, Sequence[str]], listen: Listener) -> Outcome:
    """Clients that go on from their own last adapter, round by round, by the production steps.

    Args:
        workspace: of the cell.
        clients: for each client, the domains that its adapter is evaluated on.
        listen: told of progress.
    """
    adapters = dict.fromkeys(clients, workspace.initial_adapter.trained)
    summaries: list[RoundSummary] = []
    for index in range(workspace.config.rounds):
        listen(ProgressEvent("train", "clients train", round_index=index, n_rounds=workspace.config.rounds))
        updates = []
        for name in clients:
            state = RoundState(index, adapters[name], dict.fromkeys(clients), {})
            assignment = next(one for one in rounds.assignments_for(workspace, state) if one.domain == name)
            update = _present(train_with_retries(workspace, assignment, listen))
            adapters[name], _ = rounds.aggregate(workspace, adapters[name], [update])
            updates.append(update)
        summaries.append(_summarised(workspace, index, updates, _by_domain(clients, adapters), listen))
    return _outcome(workspace, tuple(summaries), _by_domain(clients, adapters), listen)


def _by_domain(clients: Mapping[str, Sequence[str]], adapters: Mapping[str, ArtifactRef]) -> dict[str, ArtifactRef]:
    return {domain: adapters[name] for name, domains in clients.items() for domain in domains}


def _present(update: ClientUpdate) -> ClientUpdate:
    """The update of a client that trained, or that rests because its budget is used up."""
    if update.status in ("trained", "rested"):
        return update
    raise FedMentorError(f"round {update.round_index}: client {update.domain!r} {update.status}: {update.reason}")


def _summarised(
    workspace: CellWorkspace,
    index: int,
    updates: Sequence[ClientUpdate],
    adapters: Mapping[str, ArtifactRef],
    listen: Listener,
) -> RoundSummary:
    """A round in which nothing was exchanged, with each domain's gate metrics."""
    listen(ProgressEvent("evaluate", "evaluating", round_index=index, n_rounds=workspace.config.rounds))
    found = [evaluate(workspace, adapter, name, "gate", listen) for name, adapter in adapters.items()]
    kept = set(ClientSummary.model_fields)
    nothing = {"bytes_up": 0, "bytes_down": 0}
    return RoundSummary(
        round_index=index,
        clients=tuple(ClientSummary.model_validate(one.model_dump(include=kept) | nothing) for one in updates),
        metrics=combine(found),
        gate=GateSummary(passed=False, reasons=(NO_GATE,)),
        noise_changes=(),
        bytes_total=0,
        seconds=_seconds(updates) + _seconds(found),
    )


def _outcome(
    workspace: CellWorkspace,
    summaries: tuple[RoundSummary, ...],
    adapters: Mapping[str, ArtifactRef],
    listen: Listener,
) -> Outcome:
    listen(ProgressEvent("final", "evaluating on the test set"))
    shown = [evaluate(workspace, adapter, name, "gate", listen) for name, adapter in adapters.items()]
    tests = [evaluate(workspace, adapter, name, "test", listen) for name, adapter in adapters.items()]
    return Outcome(
        final=combine(tests),
        rounds=summaries,
        samples=tuple(sample for one in shown for sample in one.samples),
        seconds=_seconds(summaries) + _seconds(tests),
        epsilon_spent={},
        safety=answer_safety(workspace, next(iter(adapters.values()))) if len(set(adapters.values())) == 1 else None,
    )


def _seconds(parts: Sequence[RoundSummary] | Sequence[ClientUpdate] | Sequence[DomainEvaluation]) -> float:
    return sum(part.seconds for part in parts)


def _without_verdict(listen: Listener) -> Listener:
    """Of the gate, which has no say here, only that the round is done."""

    def told(event: ProgressEvent) -> None:
        listen(replace(event, message="round done") if event.stage == "gate" else event)

    return told
