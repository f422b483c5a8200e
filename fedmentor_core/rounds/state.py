"""Where a study stands before a round, what each client is asked to do in it, and the rounds that are committed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmentor_core.records import ArtifactRef, ClientAssignment, ClientSummary, ClientUpdate, RoundManifest
from fedmentor_core.workspace import Workspace


@dataclass(frozen=True)
class RoundState:
    """Where a study stands before a round."""

    round_index: int
    adapter: ArtifactRef
    noise: Mapping[str, float | None]
    rounds_below: Mapping[str, int]

    @classmethod
    def first(cls, workspace: Workspace) -> "RoundState":
        """Before round 0: the planned noise."""
        return cls(
            round_index=0,
            adapter=workspace.initial_adapter.trained,
            noise={plan.domain: plan.noise_multiplier for plan in workspace.plan.domains},
            rounds_below={plan.domain: 0 for plan in workspace.plan.domains},
        )

    @classmethod
    def after(cls, manifest: RoundManifest) -> "RoundState":
        """After a committed round."""
        return cls(
            round_index=manifest.round_index + 1,
            adapter=manifest.adapter,
            noise=manifest.next_noise,
            rounds_below=manifest.rounds_below,
        )


def assignments_for(workspace: Workspace, state: RoundState) -> list[ClientAssignment]:
    """What the server asks of each client in this round."""
    return [
        ClientAssignment(
            run_id=workspace.ref.run_id,
            round_index=state.round_index,
            domain=plan.domain,
            global_adapter=state.adapter,
            noise_multiplier=state.noise[plan.domain],
            sample_rate=plan.sample_rate,
            steps=plan.steps_per_round,
            clip_norm=plan.clip_norm,
        )
        for plan in workspace.plan.domains
    ]


def find_manifest(workspace: Workspace, round_index: int) -> RoundManifest | None:
    """A committed round, or None: resume means finding the first that is missing."""
    key = manifest_key(workspace, round_index)
    if not workspace.store.exists(key):
        return None
    return RoundManifest.model_validate(workspace.store.get_json(key))


def manifest_key(workspace: Workspace, round_index: int) -> str:
    """Store key of a round's manifest."""
    return workspace.key(f"rounds/{round_index:04d}/manifest.json")


def client_history(
    workspace: Workspace, domain: str, round_index: int, updates: Sequence[ClientUpdate] = ()
) -> list[ClientUpdate | ClientSummary]:
    """A domain's record of every committed round before ``round_index``, and of ``updates``."""
    manifests = (find_manifest(workspace, earlier) for earlier in range(round_index))
    found: list[ClientUpdate | ClientSummary] = []
    for manifest in manifests:
        found.extend(() if manifest is None else manifest.summary.clients)
    return [client for client in (*found, *updates) if client.domain == domain]
