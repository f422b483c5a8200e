"""One cell of a comparison as a Prefect task, and the table as an artifact."""

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from fedmentor_core.compare.comparison import Comparison
from fedmentor_core.compare.outputs import table_markdown
from fedmentor_core.compare.records import ComparisonTable, KeyedCell
from fedmentor_core.compare.settings import CompareSettings
from fedmentor_core.config import StudyConfig
from fedmentor_core.discretion import discreet
from tasks.listening import tell


@task(
    name="compare-cell",
    task_run_name="{cell}",
    cache_policy=NO_CACHE,  # a finished cell is found by its content
    persist_result=False,
    log_prints=False,
)
@discreet
def run_cell(config: StudyConfig, settings: CompareSettings, out_dir: str, cell: KeyedCell) -> str:
    """Run one cell to its end, or find that it is finished; returns its key."""
    return Comparison.open(config, settings, out_dir).run(cell, tell).key


def table_artifact(comparison_id: str, table: ComparisonTable) -> None:
    """Publish the table; one key for all starts of a comparison."""
    create_markdown_artifact(
        key=f"{comparison_id}-table".replace("_", "-"),
        markdown=table_markdown(table),
        description="Comparison: public or invented data, final metrics of the test set.",
    )
