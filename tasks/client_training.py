"""The mapped client-training task.

A retry is a new attempt with a charge of its own, unless the attempt had already released its update; the ledger
decides, never Prefect's cache: results are neither cached nor persisted. Prefect stores exceptions and logs, so the
task is ``discreet``.
"""

import sys

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from fedmentor_core.discretion import discreet
from fedmentor_core.records import ClientAssignment, ClientUpdate
from fedmentor_core.steps import train_one
from fedmentor_core.study_ref import StudyRef
from fedmentor_core.workspace import workspace_of
from tasks.gpu_slots import prefect_slot
from tasks.listening import tell
from tasks.policies import worth_retrying
from tasks.sites import deliver


@task(
    name="train-client",
    task_run_name="train {assignment.domain} round {assignment.round_index}",
    cache_policy=NO_CACHE,
    persist_result=False,
    log_prints=False,  # whatever an operator's settings say: a library may print the text it works on
    retry_condition_fn=worth_retrying,
    retry_delay_seconds=1,
)
@discreet
def train_client(ref: StudyRef, assignment: ClientAssignment) -> ClientUpdate:
    """One client's part of a round: charge, train, store, release; on this machine, or at the domain's site."""
    _log_place(assignment)
    is_here = ref.config.domain(assignment.domain).site is None
    with prefect_slot(ref.config.execution.gpu_limit if is_here else None):
        return train_one(workspace_of(ref), assignment, tell, deliver)


def _log_place(assignment: ClientAssignment) -> None:
    """Say in the task's log, which Prefect shows, which machine of a Ray cluster it was given to."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        node = ray.get_runtime_context().get_node_id()
        get_run_logger().info("client %s trains on Ray node %s", assignment.domain, node)
