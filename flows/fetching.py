"""``fedmentor data fetch``: the download with a progress bar."""

from pathlib import Path

from fedmentor_core.data.catalogue import RAW_URL, catalogue
from fedmentor_core.data.fetch import FetchReport, fetch


def fetch_with_progress(name: str, destination: Path, base_url: str | None) -> list[FetchReport]:
    """Fetch one corpus, or 'all' of them, and say what was done.

    Raises:
        ConfigError: unknown corpus or URL.
        DataError: a file is not what the catalogue lists, or cannot be had.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    names = sorted(catalogue()) if name == "all" else [name]
    reports = []
    with Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console
    ) as bars:
        shown: dict[str, int] = {}

        def on_bytes(file: str, done: int, total: int) -> None:
            if file not in shown:
                shown[file] = int(bars.add_task(file, total=total))
            bars.update(shown[file], completed=done, total=total)  # type: ignore[arg-type]

        for one in names:
            reports.append(fetch(one, destination, base_url=base_url or RAW_URL, progress=on_bytes))
    for report in reports:
        print(
            f"{report.name}: {len(report.fetched)} fetched, {len(report.already_right)} already right, "
            f"in {report.folder}"
        )
    return reports
