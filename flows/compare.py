"""The comparison flow: every cell of the grid a mapped task. ``fedmentor compare`` runs the same cells without Prefect.

A finished cell is found by its content, so that a flow run that was cut short is started again and goes on.
"""

from typing import Any

from prefect import flow, unmapped
from prefect.task_runners import ThreadPoolTaskRunner

from fedmentor_core.compare.budgets import check_budgets
from fedmentor_core.compare.comparison import Comparison
from fedmentor_core.compare.records import ComparisonTable, FailedCell
from fedmentor_core.compare.run import failed, finish
from fedmentor_core.compare.settings import CompareSettings
from fedmentor_core.compare.timing import estimate_time, refuse_too_long
from fedmentor_core.config import StudyConfig
from fedmentor_core.discretion import discreet
from fedmentor_core.errors import FedMentorError
from flows.compare_progress import GridProgress
from flows.environment import tracking_uri_of
from tasks.comparison import run_cell, table_artifact
from tasks.comparison_tracking import log_comparison
from tasks.listening import InterruptedByUserError, tell

DEFAULTS = CompareSettings()


@flow(name="comparison", flow_run_name="{config.name}", persist_result=False, log_prints=False)
@discreet
def comparison(
    config: StudyConfig, settings: CompareSettings = DEFAULTS, out_dir: str = "runs/compare"
) -> ComparisonTable:
    """Compare ways to make a model on the same data, splits, backbone and steps, with several seeds.

    For public or invented data only: a comparison publishes many models of it, and some arms have no privacy.

    Args:
        config: The study that all arms start from.
        settings: Which arms, how many seeds, which budgets.
        out_dir: Folder for cells and table, on the worker's machine. The same folder and study again resume it.
    """
    made = Comparison.open(config, settings, out_dir)
    check_budgets(made)
    if settings.max_minutes is not None:
        refuse_too_long(made, estimate_time(made))
    file = made.claim()
    failures = _run_cells(made, file.comparison_id)
    table = finish(made, failures, command="deployment compare")
    table_artifact(file.comparison_id, table)
    if config.tracking.enabled:
        uri = tracking_uri_of(config, made.out)
        log_comparison(config, file, table, made.out, uri)
    if failures:
        raise FedMentorError(
            f"{len(failures)} of {len(made.cells)} cells failed, the table has the others: "
            + "; ".join(f"{one}: {one.reason}" for one in failures)
        )
    return table


def _run_cells(made: Comparison, comparison_id: str) -> list[FailedCell]:
    """Map the cells; those that fail are facts about the table."""
    runner: Any = ThreadPoolTaskRunner(max_workers=made.settings.max_parallel_cells)

    @flow(
        name="comparison-cells",
        task_runner=runner,
        persist_result=False,
        log_prints=False,
    )
    def cells() -> list[FailedCell]:
        futures = run_cell.map(
            unmapped(made.config), unmapped(made.settings), unmapped(str(made.out)), list(made.cells)
        )
        failures: list[FailedCell] = []
        progress = GridProgress(made, comparison_id)
        for cell, future in zip(made.cells, futures, strict=True):
            result = future.result(raise_on_failure=False)
            if isinstance(result, InterruptedByUserError):
                raise result
            if isinstance(result, BaseException):
                failures.append(failed(cell, result))
            progress.ended(cell, failed=isinstance(result, BaseException))
        return failures

    if any(made.result(cell) is None for cell in made.cells):
        made.prepare(tell)
    return cells()
