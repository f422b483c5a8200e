"""What a process is told by its environment: settings that must stand before Prefect is imported, and where things go.

Only flows and commands look here. The core is told, so that a comparison's cell or an audit's run, which keep accounts
of their own, never follow a worker's environment into a store that others share.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmentor_core.config import StudyConfig

STORE_VARIABLE = "FEDMENTOR_STORE_URL"


def default_store() -> str | None:
    """Store of a new study whose configuration names none; None: a folder of its own in its output folder."""
    return os.environ.get(STORE_VARIABLE) or None


def tracking_uri_of(config: "StudyConfig", out_dir: str | Path) -> str:
    """Where MLflow keeps a study's runs: as configured, else the server of MLFLOW_TRACKING_URI, else beside them."""
    given = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return given or f"sqlite:///{Path(out_dir).resolve() / 'mlflow.db'}"


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
