"""A reference run's metrics outlive the MLflow that they were read from."""

from pathlib import Path

import pytest

from fedmentor_core.errors import ConfigError
from fedmentor_core.study_ref import StudyRef
from tasks.mlflow_connection import sqlite_path
from tasks.reference import fix_the_reference


def test_a_resume_needs_no_mlflow_and_another_reference_is_read_anew(tracker, study, tmp_path):
    run_id = tracker.start_study_run(study.config, "run-1")
    tracker.log_final(study.summary())
    tracking = study.config.tracking.model_copy(update={"reference_run_id": run_id})
    config = study.config.model_copy(update={"tracking": tracking})
    ref = StudyRef(config=config, run_id="run-2", out_dir=str(tmp_path / "out"))
    first = fix_the_reference(ref, tracker.tracking_uri)
    assert first == study.round(1).metrics

    Path(sqlite_path(tracker.tracking_uri)).unlink()
    assert fix_the_reference(ref, tracker.tracking_uri) == first

    other = config.model_copy(update={"tracking": tracking.model_copy(update={"reference_run_id": "another"})})
    with pytest.raises(ConfigError, match="no MLflow database"):
        fix_the_reference(ref.model_copy(update={"config": other}), tracker.tracking_uri)
    none = config.model_copy(update={"tracking": tracking.model_copy(update={"reference_run_id": None})})
    assert fix_the_reference(ref.model_copy(update={"config": none}), tracker.tracking_uri) is None
