"""The audit looks at what a round really trained, whichever factors that are and whatever was added to the base."""

from pathlib import Path
from typing import Any

import pytest

from fedmentor_core.audit import run
from fedmentor_core.config_io import validate_config


@pytest.mark.slow
@pytest.mark.parametrize(("train", "rule"), [("alternate", "fedavg"), ("core", "fedavg"), ("both", "fedex")])
def test_every_way_to_train_passes_its_audit(
    tiny_study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: str, rule: str
) -> None:
    monkeypatch.setattr("fedmentor_core.privacy.plan.epsilon_prv", lambda *_: 0.0)
    tiny_study["domains"] = tiny_study["domains"][:1]
    tiny_study["adapter"] = {**tiny_study["adapter"], "train": train}
    tiny_study["aggregation"] = {"rule": rule, "prox_mu": 0.1}
    report = run.run_audit(validate_config(tiny_study), tmp_path / "audit", n_canaries=20)
    failed = [check for one in report.domains for check in one.checks if not check.passed]
    assert failed == []
    assert report.passed
