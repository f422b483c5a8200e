"""A grid on the tiny backbone, run once for all tests that look at it."""

from pathlib import Path
from typing import Any

import pytest

from fedmentor_core.compare.comparison import Comparison
from fedmentor_core.compare.settings import CompareSettings
from fedmentor_core.config import StudyConfig
from fedmentor_core.config_io import validate_config
from fedmentor_core.data import invented


@pytest.fixture(scope="session")
def small_raw(tiny_backbone_folder: Path) -> dict[str, Any]:
    """Two invented domains, one step a round, two evaluated rows a set."""
    corpora = list(invented.CORPORA)[:2]
    return {
        "name": "small",
        "seed": 3,
        "rounds": 2,
        "backbone": {"name": str(tiny_backbone_folder), "max_length": 160},
        "adapter": {"rank": 2, "alpha": 8.0},
        "domains": [
            {"name": "one", "source": {"kind": "invented", "corpus": corpora[0], "n_units": 40}, "epsilon": 8.0},
            {"name": "two", "source": {"kind": "invented", "corpus": corpora[1], "n_units": 40}, "epsilon": 4.0},
        ],
        "training": {"steps_per_round": 1, "batch_size": 4, "microbatch_size": 4, "max_target_tokens": 24},
        "evaluation": {
            "gate_data": "public",
            "max_gate_examples": 2,
            "max_test_examples": 2,
            "max_new_tokens": 4,
            "samples_in_report": 1,
            "thresholds": [{"metric": "toxicity_mean", "at_most": 1.0}],
        },
        "tracking": {"enabled": False},
    }


@pytest.fixture(scope="session")
def small(small_raw: dict[str, Any]) -> StudyConfig:
    return validate_config(small_raw)


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PRV figure of a plan takes a second for each domain and decides nothing."""
    monkeypatch.setattr("fedmentor_core.privacy.plan.epsilon_prv", lambda *_: 0.0)


@pytest.fixture(scope="session")
def settings() -> CompareSettings:
    return CompareSettings(seeds=2, budgets=(2.0,))


@pytest.fixture(scope="session")
def grid(small: StudyConfig, settings: CompareSettings, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A finished comparison of all arms."""
    from fedmentor_core.compare.run import run_comparison

    made = Comparison.open(small, settings, tmp_path_factory.mktemp("grid") / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedmentor_core.privacy.plan.epsilon_prv", lambda *_: 0.0)
        run_comparison(made, command="fedmentor compare")
    return made
