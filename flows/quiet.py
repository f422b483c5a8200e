"""Tames library noise, so that a study's own progress can be read; errors are never hidden.

Call ``silence_libraries`` first thing in a program: most libraries read their environment when imported.
Nothing heavy is imported here, and what the user has set in the environment always wins.
"""

import logging
import os
import sys
import warnings
from contextlib import suppress

ENVIRONMENT = {
    # telemetry: nothing about a study is anyone else's business
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    # progress bars: we draw our own
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # log levels and advice
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_INTERNAL_LEVEL": "ERROR",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    "GIT_PYTHON_REFRESH": "quiet",
}

LOGGERS = {
    "transformers": logging.ERROR,
    "datasets": logging.ERROR,
    "huggingface_hub": logging.ERROR,
    "bert_score": logging.ERROR,
    "absl": logging.ERROR,
    "alembic": logging.WARNING,
    "mlflow": logging.WARNING,
    "prefect": logging.WARNING,
    "prefect._internal": logging.ERROR,
    "prefect.flow_runs": logging.WARNING,
    "prefect.task_runs": logging.WARNING,
    "httpx": logging.WARNING,
    "httpcore": logging.WARNING,
    "botocore": logging.WARNING,
    "urllib3": logging.WARNING,
    "matplotlib": logging.WARNING,
}

WARNINGS = (
    # Opacus: advice on a mode that every output names, and on accounting that is on the safe side
    r"Secure RNG turned off.*",
    r"Optimal order is the (largest|smallest) alpha.*",
    r"Full backward hook is firing when gradients are computed.*",
    r"Using a non-full backward hook.*",
    # MLflow
    r"Type hint.*",
    r".*Saving scikit-learn models in the pickle.*",
    r".*Hint: Inferred schema contains integer column.*",
    r"Distutils was imported before Setuptools.*",
)


def silence_libraries() -> None:
    """Turn off telemetry, progress bars, chatty logs and known warnings; cheap, and safe to call again."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name, level in LOGGERS.items():
        logger = logging.getLogger(name)
        if logger.level < level:
            logger.setLevel(level)
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    _quiet_loaded()


def _quiet_loaded() -> None:
    """Tell libraries that are already imported, and so have read their environment."""
    for module, names in (
        ("transformers.utils.logging", ("set_verbosity_error", "disable_progress_bar")),
        ("datasets.utils.logging", ("set_verbosity_error",)),
        ("datasets.utils.tqdm", ("disable_progress_bars",)),
        ("huggingface_hub.utils.tqdm", ("disable_progress_bars",)),
    ):
        for name in names:
            with suppress(Exception):
                getattr(sys.modules[module], name)()
