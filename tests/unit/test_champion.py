"""Starting from the champion and comparing with it, in the core and without a registry."""

from pathlib import Path

import pytest

from fedmentor_core import study as story
from fedmentor_core.adapters.lora import adapter_state, attach, load_state, resolved_targets, save_adapter_folder
from fedmentor_core.champion import fix_champion, fix_no_champion, fixed_champion
from fedmentor_core.config import AdapterConfig
from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import ConfigError
from fedmentor_core.privacy.validation_plan import planned_releases
from fedmentor_core.study import run_study
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import Workspace, workspace_of


@pytest.fixture
def study(tiny_study) -> dict:
    """One domain and one round that compares with the champion; the tracking that it names is never used."""
    tiny_study["rounds"] = 1
    tiny_study["domains"] = tiny_study["domains"][:1]
    tiny_study["tracking"] = {"enabled": True}
    tiny_study["evaluation"]["thresholds"] = [{"metric": "safe_rate", "at_least": 0.1, "relative_to": "champion"}]
    return tiny_study


def opened(study: dict, out: Path) -> Workspace:
    return workspace_of(open_study(validate_config(study), out))


def crowned(workspace: Workspace, folder: Path, adapter: AdapterConfig, *, backbone: str | None = None):
    """Fix a champion of that shape with every tensor at one tenth."""
    model = attach(workspace.backbone, adapter, seed=9)
    load_state(model, {name: tensor * 0 + 0.1 for name, tensor in adapter_state(model, trainable_only=False).items()})
    save_adapter_folder(folder, adapter_state(model, trainable_only=False), adapter, resolved_targets(model))
    return fix_champion(
        workspace, folder, name="m", version="3", adapter_sha256="a" * 64,
        backbone_sha256=backbone or workspace.backbone.sha256,
    ).champion  # fmt: skip


def test_a_champion_of_another_rank_is_compared_with(study, tmp_path, monkeypatch):
    workspace = opened(study, tmp_path / "out")
    champion = crowned(workspace, tmp_path / "champion", AdapterConfig(rank=2, alpha=4.0))
    judged = []
    original = story.judge
    monkeypatch.setattr(story, "judge", lambda *given: judged.append(given[2]) or original(*given))
    summary = run_study(workspace.ref)
    line = summary.rounds[0].gate.results[0]
    assert (line.relative_to, line.note, line.passed) == ("champion", "", True)
    assert line.bound == pytest.approx(0.1 * judged[0]["champion"].safe_rate)
    with workspace.evaluation_lock:
        model = workspace.evaluation_model_with(champion.adapter)
        assert all((tensor == 0.1).all() for tensor in adapter_state(model, trainable_only=False).values())


def test_without_a_champion_the_line_passes_and_says_so(study, tmp_path):
    workspace = opened(study, tmp_path / "out")
    fix_no_champion(workspace)
    line = run_study(workspace.ref).rounds[0].gate.results[0]
    assert (line.passed, line.bound, line.note) == (True, None, "there is no champion yet")
    assert "there is no champion yet" in str(line)


def test_a_champion_on_another_backbone_cannot_be_compared_and_fails_the_line(study, tmp_path):
    workspace = opened(study, tmp_path / "out")
    crowned(workspace, tmp_path / "champion", AdapterConfig(rank=4, alpha=8.0), backbone="0" * 64)
    summary = run_study(workspace.ref)
    assert summary.status == "held"
    assert "not available (from the champion)" in summary.rounds[0].gate.reasons[0]


def test_who_was_champion_stays_fixed(study, tmp_path):
    workspace = opened(study, tmp_path / "out")
    fix_no_champion(workspace)
    assert crowned(workspace, tmp_path / "champion", AdapterConfig(rank=4, alpha=8.0)) is None
    assert fixed_champion(workspace).champion is None


def test_a_champion_without_a_registry_is_refused(study, tmp_path):
    workspace = opened(study, tmp_path / "out")
    with pytest.raises(ConfigError, match="run the study with 'fedmentor run'"):
        run_study(workspace.ref)


def test_starting_from_the_champion_takes_its_frozen_factors_too(study, tmp_path):
    study["start_from"] = "champion"
    workspace = opened(study, tmp_path / "out")
    crowned(workspace, tmp_path / "champion", AdapterConfig(rank=4, alpha=8.0))
    start = workspace.full_adapter_state(workspace.initial_adapter.trained)
    assert all((tensor == 0.1).all() for tensor in start.values())
    model = workspace.model_with(workspace.initial_adapter.trained)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_B" in n
    }
    assert all((tensor == 0).all() for tensor in workspace.get_adapter(workspace.untrained_adapter).values())


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (AdapterConfig(rank=2, alpha=4.0), "its rank is 2"),
        (AdapterConfig(rank=4, alpha=4.0), "its scale alpha / rank is 1"),
        (AdapterConfig(rank=4, alpha=8.0, target_modules=("q_proj",)), r"it adapts 4 tensors of \['q_proj'\]"),
        (AdapterConfig(rank=4, alpha=8.0, last_layers=1), "it adapts"),
    ],
)
def test_a_champion_that_does_not_fit_is_no_start(study, tmp_path, adapter, message):
    study["start_from"] = "champion"
    workspace = opened(study, tmp_path / "out")
    crowned(workspace, tmp_path / "champion", adapter)
    with pytest.raises(ConfigError, match=message):
        run_study(workspace.ref)
    assert workspace.ledger("one").entries() == [], "nothing was charged"


def test_a_champion_on_another_backbone_is_no_start(study, tmp_path):
    study["start_from"] = "champion"
    workspace = opened(study, tmp_path / "out")
    crowned(workspace, tmp_path / "champion", AdapterConfig(rank=4, alpha=8.0), backbone="0" * 64)
    with pytest.raises(ConfigError, match="belongs to another backbone"):
        run_study(workspace.ref)


def test_comparing_with_the_champion_is_one_more_release_of_a_private_gate_set():
    assert planned_releases("gate", 3, champion=True) == planned_releases("gate", 3) + 1
    assert planned_releases("test", 3, champion=True) == planned_releases("test", 3)
