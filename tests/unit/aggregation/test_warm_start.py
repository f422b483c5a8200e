"""Starting from an adapter that exists: pinned, shared by all clients, and computing what it computed."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from aggregation_states import added, same_logits

from fedmentor_core.adapters.base_delta import delta_tensors
from fedmentor_core.adapters.lora import (
    adapter_state,
    attach,
    factor_of,
    load_adapter_folder,
    load_state,
    modules_of,
    read_adapter_folder,
    resolved_targets,
    save_adapter_folder,
)
from fedmentor_core.audit.mechanism import Mechanism
from fedmentor_core.config import AdapterConfig
from fedmentor_core.errors import ConfigError
from fedmentor_core.study import run_study
from fedmentor_core.workspace import Workspace


@pytest.fixture
def start(opened: Any, tmp_path: Path) -> Any:
    """Write an adapter of some rank with random factors; give its folder and digest as configuration."""

    def write(rank: int = 4, scale: float = 2.0, name: str = "start") -> dict[str, str]:
        config = AdapterConfig(rank=rank, alpha=scale * rank)
        model = attach(opened("other").backbone, config, seed=4)
        generator = torch.Generator().manual_seed(7)
        state = {
            key: torch.randn(tensor.shape, generator=generator) * 0.1
            for key, tensor in adapter_state(model, trainable_only=False).items()
        }
        save_adapter_folder(tmp_path / name, state, config, resolved_targets(model))
        weights = tmp_path / name / "adapter_model.safetensors"
        return {"start_from": str(tmp_path / name), "start_sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}

    return write


def begun(workspace: Workspace) -> dict[str, torch.Tensor]:
    return workspace.full_adapter_state(workspace.initial_adapter.trained)


@pytest.mark.parametrize(
    ("adapter", "aggregation", "rank"),
    [
        ({}, {}, 4),
        ({"train": "both"}, {}, 4),
        ({"train": "alternate"}, {}, 4),
        ({"train": "core"}, {}, 4),
        ({"train": "both", "rank": 2, "alpha": 4.0}, {"rule": "fedex"}, 6),  # a larger one, partly into the base
    ],
)
def test_every_way_to_train_starts_from_exactly_that_adapter(
    opened: Any, start: Any, adapter: dict, aggregation: dict, rank: int
) -> None:
    pinned = start(rank)
    workspace = opened(adapter={**adapter, **pinned}, aggregation=aggregation)
    _, state = read_adapter_folder(Path(pinned["start_from"]))
    wanted, found = added(state, 2.0), added(begun(workspace), workspace.config.adapter.scale)
    assert all(torch.allclose(found[module], wanted[module], atol=1e-5) for module in wanted)
    theirs = load_adapter_folder(workspace.backbone, Path(pinned["start_from"]))
    same_logits(workspace.model_with(workspace.initial_adapter.trained, 0, "one"), theirs)
    same_logits(workspace.model_with(workspace.initial_adapter.trained, 1, "two"), theirs)
    summary = run_study(workspace.ref)
    assert all(client.status == "trained" for one in summary.rounds for client in one.clients)
    untrained = workspace.get_adapter(workspace.untrained_adapter)
    assert not any(t.any() for name, t in untrained.items() if factor_of(name) in ("B", "R"))


def test_another_file_than_the_pinned_one_is_refused_before_anything_is_charged(opened: Any, start: Any) -> None:
    pinned = start()
    workspace = opened(adapter={**pinned, "start_sha256": "0" * 64})
    with pytest.raises(ConfigError, match="expected sha256 0000"):
        run_study(workspace.ref)
    assert workspace.ledger("one").entries() == []


def test_a_missing_folder_says_so(opened: Any, tmp_path: Path) -> None:
    workspace = opened(adapter={"start_from": str(tmp_path / "nowhere"), "start_sha256": "0" * 64})
    with pytest.raises(ConfigError, match=r"holds no adapter_model.safetensors"):
        run_study(workspace.ref)


@pytest.mark.parametrize(
    ("rank", "scale", "told"),
    [(2, 2.0, "its rank is 2"), (4, 1.0, "its scale alpha / rank is 1"), (6, 2.0, "rank is 6")],
)
def test_a_start_that_does_not_fit_is_refused(opened: Any, start: Any, rank: int, scale: float, told: str) -> None:
    workspace = opened(adapter=start(rank, scale))
    with pytest.raises(ConfigError, match=f"adapter.start_from.*does not fit.*{told}"):
        begun(workspace)


def test_a_smaller_start_is_no_start_for_fedex_either(opened: Any, start: Any) -> None:
    workspace = opened(adapter={"train": "both", **start(2)}, aggregation={"rule": "fedex"})
    with pytest.raises(ConfigError, match="its rank is 2"):
        begun(workspace)


def test_an_audit_notes_the_digest_of_a_start_and_not_its_place(opened: Any, start: Any) -> None:
    config = opened(adapter=start()).config
    parts = Mechanism.of(config, "0" * 64).parts
    assert parts["adapter.start_sha256"] == config.adapter.start_sha256
    assert "adapter.start_from" not in parts


# --- what is added to the base ----------------------------------------------------------------------------------------


def test_what_is_added_to_the_base_is_stored_in_the_smaller_form() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(20, 3, generator=generator), torch.randn(3, 30, generator=generator)
    thin = delta_tensors("x", torch.cat([b, b], dim=1), torch.cat([a, a]))  # rank 3, not 6
    assert {name: tuple(t.shape) for name, t in thin.items()} == {
        "x.base_delta_B.weight": (20, 3), "x.base_delta_A.weight": (3, 30),
    }  # fmt: skip
    wide = delta_tensors("x", torch.randn(20, 12, generator=generator), torch.randn(12, 30, generator=generator))
    assert {name: tuple(t.shape) for name, t in wide.items()} == {"x.base_delta.weight": (20, 30)}
    assert delta_tensors("x", b * 0, a) == {}
    assert delta_tensors("x", torch.zeros(20, 12), torch.zeros(12, 30)) == {}


@pytest.mark.parametrize("rank", [1, 30])
def test_a_model_computes_with_the_corrected_base_and_forgets_it_when_told(opened: Any, rank: int) -> None:
    """Against the merged weights, without touching the shared backbone; gradients pass through it."""
    import copy

    workspace = opened()
    config = AdapterConfig(rank=2, alpha=4.0, train="both")
    model = attach(workspace.backbone, config, seed=1)
    state = adapter_state(model, trainable_only=False)
    before = {name: p.detach().clone() for name, p in workspace.backbone.model.named_parameters()}
    merged = copy.deepcopy(workspace.backbone.model)
    generator = torch.Generator().manual_seed(2)
    deltas: dict[str, torch.Tensor] = {}
    for module in modules_of(state):
        weight = merged.get_submodule(module).weight
        b = torch.randn(weight.shape[0], rank, generator=generator) * 0.1
        a = torch.randn(rank, weight.shape[1], generator=generator) * 0.1
        deltas |= delta_tensors(module, b, a)
        weight.data += b @ a
    load_state(model, {**state, **deltas})
    same_logits(model, merged)
    ids = torch.arange(5, 25)[None]
    model(input_ids=ids).logits.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters() if "lora_B" in n)
    load_state(model, state)
    same_logits(model, workspace.backbone.model)
    assert all(torch.equal(p, before[name]) for name, p in workspace.backbone.model.named_parameters())
