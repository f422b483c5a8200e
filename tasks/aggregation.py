"""The server's aggregation task."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from fedmentor_core import rounds
from fedmentor_core.discretion import discreet
from fedmentor_core.records import ArtifactRef, ClientUpdate
from fedmentor_core.study_ref import StudyRef
from fedmentor_core.workspace import workspace_of


@task(name="aggregate", cache_policy=NO_CACHE, persist_result=False, log_prints=False)
@discreet
def aggregate(ref: StudyRef, base: ArtifactRef, updates: list[ClientUpdate]) -> tuple[ArtifactRef, list[ClientUpdate]]:
    """Check each update, stream the usable ones into the next global adapter."""
    return rounds.aggregate(workspace_of(ref), base, updates)
