"""Shows a stack on a terminal."""

from rich.console import Console
from rich.table import Table

from flows.stack.health import StackStatus


def print_status(status: StackStatus) -> None:
    """Print services, workers and deployments, and how to point a program at them."""
    console = Console()
    if not status.services:
        console.print(f"No stack in {status.directory}. Start one with: fedmentor up")
        return
    table = Table(title=f"Stack in {status.directory}", title_justify="left")
    for column in ("service", "healthy", "url", "pid", "up", "what it says"):
        table.add_column(column, no_wrap=column != "what it says")
    for row in status.services:
        mark = "[green]yes[/green]" if row.healthy else "[red]no[/red]"
        uptime = "" if row.uptime_seconds is None else _duration(row.uptime_seconds)
        table.add_row(row.name, mark, row.url or "", "" if row.pid is None else str(row.pid), uptime, row.detail)
    console.print(table)
    console.print(f"logs:           {status.directory}/logs/SERVICE.log", soft_wrap=True, highlight=False)
    console.print(f"workers online: {', '.join(status.workers_online) or 'none'}", highlight=False)
    console.print(f"deployments:    {', '.join(status.deployments) or 'none'}", highlight=False)
    if status.healthy:
        console.print(
            f"\nexport PREFECT_API_URL={status.prefect_api_url}"
            f"\nexport MLFLOW_TRACKING_URI={status.mlflow_tracking_uri}"
            + (f"\nexport AWS_ENDPOINT_URL_S3={status.s3_endpoint_url}" if status.s3_endpoint_url else "")
            + (f"\nset -a; . {status.s3_credentials_file}; set +a" if status.s3_credentials_file else ""),
            soft_wrap=True,
            highlight=False,
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
