"""Process settings that must stand before Prefect is imported: embedded mode needs no server of the user's."""

import os
from pathlib import Path


def prepare_environment(out_dir: Path) -> None:
    """Point Prefect at its own database inside ``out_dir`` unless the user named a server, and keep it quiet.

    Without ``PREFECT_API_URL`` Prefect starts an ephemeral server; left alone, that would write to the database in
    the user's home.
    """
    from flows.quiet import silence_libraries

    silence_libraries()
    settings = {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
    }
    if "PREFECT_API_URL" not in os.environ:
        settings |= {
            "PREFECT_HOME": str(out_dir.resolve() / "prefect"),
            "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
