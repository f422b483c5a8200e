"""A build step of prefect.yaml: a deployment's study parameters come from the same YAML files as the command line's."""

import os
from typing import Any

from fedmentor_core.config_io import load_config


def read_studies(**files: str) -> dict[str, dict[str, Any]]:
    """Read and validate study files; prefect.yaml refers to one as ``{{ STEP_ID.NAME }}``.

    All defaults are written out, so that the form of a deployment shows what will happen, field by field.

    Args:
        files: by name, a study's YAML file, relative to the checkout; FEDMENTOR_STUDY_NAME in the environment names
            another one.

    Returns:
        By the same names, plain parameters.

    Raises:
        ConfigError: a file that is no valid study; nothing is deployed.
    """
    chosen = {name: os.environ.get(study_variable(name)) or path for name, path in files.items()}
    return {name: load_config(path).model_dump(mode="json") for name, path in chosen.items()}


def study_variable(name: str) -> str:
    """Environment variable that names the study file of a deployment, such as FEDMENTOR_STUDY_NIGHTLY."""
    return f"FEDMENTOR_STUDY_{name.upper().replace('-', '_')}"
