"""The end of a round: the next noise is decided and the manifest written, create-if-absent."""

import time
from collections.abc import Sequence

from fedmentor_core.evaluation.evaluate import combine
from fedmentor_core.privacy.adaptation import change_of
from fedmentor_core.records import (
    ArtifactRef,
    ClientSummary,
    ClientUpdate,
    DomainEvaluation,
    GateSummary,
    GateVerdict,
    RoundManifest,
    RoundSummary,
    SafetyEvaluation,
)
from fedmentor_core.rounds.noise import Comparisons, adapt
from fedmentor_core.rounds.state import RoundState, manifest_key
from fedmentor_core.workspace import Workspace


def commit_round(
    workspace: Workspace,
    state: RoundState,
    adapter: ArtifactRef,
    updates: Sequence[ClientUpdate],
    evaluations: Sequence[DomainEvaluation],
    verdict: GateVerdict,
    comparisons: Comparisons,
    seconds: float,
    safety: SafetyEvaluation | None = None,
) -> RoundManifest:
    """Decide the next noise and write the round's manifest, create-if-absent: the commit point."""
    metrics = combine(evaluations)
    decisions, noise, below = adapt(workspace, state, metrics, comparisons, updates)
    manifest = RoundManifest(
        run_id=workspace.ref.run_id,
        round_index=state.round_index,
        config_sha256=workspace.ref.config_sha256,
        adapter=adapter,
        summary=RoundSummary(
            round_index=state.round_index,
            clients=tuple(
                ClientSummary.model_validate(u.model_dump(include=set(ClientSummary.model_fields))) for u in updates
            ),
            metrics=metrics,
            safety=safety,
            gate=GateSummary(passed=verdict.passed, reasons=verdict.reasons, results=verdict.results),
            noise_changes=tuple(change for change in map(change_of, decisions) if change is not None),
            noise_decisions=tuple(decisions),
            bytes_total=sum(update.bytes_up + update.bytes_down for update in updates),
            seconds=seconds,
        ),
        samples=tuple(sample for evaluation in evaluations for sample in evaluation.samples),
        next_noise=noise,
        rounds_below=below,
    )
    workspace.store.put_json(manifest_key(workspace, state.round_index), manifest)
    return manifest


def now() -> float:
    """A clock for durations, in seconds."""
    return time.perf_counter()
