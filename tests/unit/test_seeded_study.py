"""The core's whole study: reproducible bit by bit when its noise is seeded, and never otherwise."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedmentor_core.config_io import validate_config
from fedmentor_core.rounds import find_manifest
from fedmentor_core.study import run_study
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import workspace_of


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("fedmentor_core.privacy.plan.epsilon_prv", lambda *_: 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def digests(raw: dict, out: Path) -> list[str]:
    """Of the adapter after each round."""
    ref = open_study(validate_config(raw), out)
    summary = run_study(ref)
    assert summary.private == (raw["privacy"].get("noise_seed") is None)
    assert any("NOT PRIVATE" in warning for warning in summary.warnings) != summary.private
    for client in (client for round_ in summary.rounds for client in round_.clients):
        assert client.status == "trained"
        assert client.epsilon_spent <= client.epsilon_budget
    manifests = [find_manifest(workspace_of(ref), index) for index in range(2)]
    return [manifest.adapter.sha256 for manifest in manifests if manifest is not None]


@pytest.mark.slow
def test_study_is_reproducible_exactly_when_its_noise_is_seeded(tiny_study: dict, tmp_path: Path) -> None:
    tiny_study["privacy"] = {"noise_seed": 11}
    torch.manual_seed(1)
    first = digests(tiny_study, tmp_path / "a")
    torch.manual_seed(2)
    assert digests(tiny_study, tmp_path / "b") == first
    assert len(set(first)) == 2

    tiny_study["privacy"] = {}
    torch.manual_seed(1)
    free = digests(tiny_study, tmp_path / "c")
    torch.manual_seed(1)
    other = digests(tiny_study, tmp_path / "d")
    assert not set(free) & set(other)
    assert not set(free) & set(first)
