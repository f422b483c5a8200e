"""Small studies whose scores are not what is tested."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmentor_core.config_io import validate_config
from fedmentor_core.evaluation.scores import RowScores
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import Workspace, workspace_of


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """No PRV diagnostic, and scores without models: for studies whose scores are not what is tested."""

    def fake_rows(model, tokenizer, data, *_, on_batch=None, **__) -> list[RowScores]:
        return [
            RowScores(
                output="Yes.", reference=str(row["response"]), label="yes", answer="yes", bertscore_f1=0.8, rouge_l=0.5,
                toxicity=0.1, safe=True,
            )
            for row in data.rows
        ]  # fmt: skip

    monkeypatch.setattr("fedmentor_core.privacy.plan.epsilon_prv", lambda *_: 0.0)
    monkeypatch.setattr("fedmentor_core.evaluation.evaluate.score_rows", fake_rows)
    monkeypatch.setattr("fedmentor_core.private_gate.score_rows", fake_rows)


@pytest.fixture
def opened(tiny_study: dict, tmp_path: Path) -> Callable[..., Workspace]:
    """A workspace of the tiny study with sections changed: ``opened(wire={...}, rounds=3)``."""

    def open_(out: str = "out", **changes: Any) -> Workspace:
        raw = dict(tiny_study)
        for key, value in changes.items():
            raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
        return workspace_of(open_study(validate_config(raw), tmp_path / out))

    return open_
