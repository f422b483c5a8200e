"""Averages of updates, and what must never enter one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmentor_core.adapters.lora import state_to_bytes
from fedmentor_core.aggregation.base import WeightedUpdate, check_update, normalised
from fedmentor_core.aggregation.fedavg import fedavg
from fedmentor_core.config_io import validate_config
from fedmentor_core.errors import FedMentorError, UpdateRejectedError
from fedmentor_core.records import ArtifactRef, ClientUpdate
from fedmentor_core.rounds import aggregate
from fedmentor_core.study_ref import open_study
from fedmentor_core.workspace import Workspace

WEIGHTS = (0.2, 0.3, 0.5)


def state(seed: int, rank: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer.lora_A.weight": torch.randn(rank, 5, generator=generator),
        "layer.lora_B.weight": torch.randn(7, rank, generator=generator),
    }


def weighted(states: list[dict]) -> list[WeightedUpdate]:
    return [WeightedUpdate(str(i), w, s) for i, (w, s) in enumerate(zip(WEIGHTS, states, strict=True))]


def test_fedavg_is_the_weighted_mean() -> None:
    states = [state(seed) for seed in range(3)]
    mean = fedavg(state(9), weighted(states))
    for name, tensor in mean.items():
        expected = np.average([s[name].double().numpy() for s in states], axis=0, weights=WEIGHTS)
        np.testing.assert_allclose(tensor.numpy(), expected.astype(np.float32), rtol=0, atol=0)
        assert tensor.dtype == torch.float32


def test_fedavg_does_not_depend_on_the_order() -> None:
    updates = weighted([state(seed) for seed in range(3)])
    one, other = fedavg(state(9), updates), fedavg(state(9), updates[::-1])
    assert all(torch.allclose(one[name], other[name], rtol=1e-7, atol=0) for name in one)


def test_fedavg_of_equal_updates_is_that_update() -> None:
    mean = fedavg(state(9), weighted([state(1)] * 3))
    assert all(torch.equal(mean[name], tensor) for name, tensor in state(1).items())


def test_fedavg_holds_one_update_at_a_time() -> None:
    alive = 0
    most = 0

    class Counted(dict):
        def __init__(self, content: dict) -> None:
            nonlocal alive, most
            super().__init__(content)
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def stream() -> Iterator[WeightedUpdate]:
        for i in range(20):
            yield WeightedUpdate(str(i), 1 / 20, Counted(state(i)))

    fedavg(state(9), stream())
    assert most <= 2


@pytest.mark.parametrize("weights", [(0.5, 0.4), (), (0.7, 0.7)])
def test_weights_that_do_not_sum_to_one_are_refused(weights: tuple) -> None:
    updates = [WeightedUpdate(str(i), w, state(i)) for i, w in enumerate(weights)]
    with pytest.raises(ValueError, match="sum to 1"):
        fedavg(state(9), updates)


def test_weights_are_normalised_and_must_be_positive() -> None:
    assert dict(normalised({"a": 1.0, "b": 3.0})) == {"a": 0.25, "b": 0.75}
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            dict(normalised({"a": wrong, "b": 1.0}))


def products(states: list[dict]) -> torch.Tensor:
    pairs = zip(WEIGHTS, states, strict=True)
    return sum(w * s["layer.lora_B.weight"].double() @ s["layer.lora_A.weight"].double() for w, s in pairs)


def test_average_of_b_is_exact_where_a_is_shared() -> None:
    shared = state(0)["layer.lora_A.weight"]
    states = [{**state(seed), "layer.lora_A.weight": shared} for seed in (1, 2, 3)]
    mean = fedavg(state(9), weighted(states))
    product = mean["layer.lora_B.weight"].double() @ shared.double()
    assert float((product - products(states)).norm()) < 1e-6 * float(product.norm())


def test_error_where_both_factors_are_trained_is_the_known_one() -> None:
    """sum_i w_i B_i A_i - Bbar Abar = sum_i w_i (B_i - Bbar)(A_i - Abar)."""
    states = [state(seed) for seed in (1, 2, 3)]
    mean = {name: tensor.double() for name, tensor in fedavg(state(9), weighted(states)).items()}
    a, b = mean["layer.lora_A.weight"], mean["layer.lora_B.weight"]
    spread = sum(
        w * (s["layer.lora_B.weight"].double() - b) @ (s["layer.lora_A.weight"].double() - a)
        for w, s in zip(WEIGHTS, states, strict=True)
    )
    error = products(states) - b @ a
    assert torch.allclose(error, spread, atol=1e-5)
    assert float(error.norm()) > 0.1


def changed(**tensors: Any) -> dict:
    return {**state(1), **{f"layer.lora_{name}.weight": tensor for name, tensor in tensors.items()}}


@pytest.mark.parametrize(
    ("update", "told"),
    [
        (changed(B=torch.full((7, 3), float("nan"))), "NaN or infinity"),
        (changed(B=torch.full((7, 3), -float("inf"))), "NaN or infinity"),
        (changed(B=torch.zeros(7, 4)), r"\(7, 4\)"),
        (changed(B=torch.zeros(7, 3, dtype=torch.float16)), "float16"),
        (changed(B=torch.full((7, 3), 100.0)), "max_update_norm 50"),
        (changed(B=torch.full((7, 3), 3e38)), "max_update_norm 50"),
        (changed(C=torch.zeros(1)), "1 unknown"),
        ({"layer.lora_B.weight": torch.zeros(7, 3)}, "1 tensors missing"),
        ({}, "2 tensors missing"),
    ],
)
def test_update_that_does_not_fit_is_rejected(update: dict, told: str) -> None:
    with pytest.raises(UpdateRejectedError, match=told):
        check_update("one", update, state(0), max_update_norm=50.0)


def test_norm_is_of_the_change_over_all_tensors_jointly() -> None:
    base = state(0)
    moved = {name: tensor + 1.0 for name, tensor in base.items()}  # 15 + 21 coordinates: norm 6
    check_update("one", moved, base, max_update_norm=6.001)
    with pytest.raises(UpdateRejectedError, match="L2 norm 6"):
        check_update("one", moved, base, max_update_norm=5.999)


# --- in a round -----------------------------------------------------------------------------------------------------


@pytest.fixture
def workspace(tiny_study: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setattr("fedmentor_core.privacy.plan.epsilon_prv", lambda *_: 0.0)
    tiny_study["aggregation"] = {"max_update_norm": 50.0, "weights": "units"}
    return Workspace(open_study(validate_config(tiny_study), tmp_path / "out"))


def update_of(
    workspace: Workspace,
    domain: str,
    value: float = 1.0,
    *,
    status: str = "trained",
    data: bytes | None = None,
    **other,
) -> ClientUpdate:
    base = workspace.initial_adapter.trained
    ref: ArtifactRef | None = None
    if status == "trained":
        tensors = {name: torch.full_like(t, value) for name, t in workspace.get_adapter(base).items()}
        ref = workspace.store.put(f"updates/{domain}", state_to_bytes(tensors) if data is None else data)
    plan = next(plan for plan in workspace.plan.domains if plan.domain == domain)
    fields = {
        "run_id": workspace.ref.run_id,
        "round_index": 0,
        "domain": domain,
        "status": status,
        "update": ref,
        "base_adapter_sha256": base.sha256,
        "n_units": plan.n_units,
        "sample_rate": 0.1,
        "steps": 2,
        "noise_multiplier": 1.0,
        "clip_norm": 1.0,
        "epsilon_spent": 1.0,
        "epsilon_budget": 8.0,
        "delta": 1e-5,
        "bytes_up": 0,
        "bytes_down": 0,
        "seconds": 0.0,
    }
    return ClientUpdate(**(fields | other))


def test_round_weighs_by_units(workspace: Workspace) -> None:
    base = workspace.initial_adapter.trained
    updates = [update_of(workspace, "one", 1.0), update_of(workspace, "two", -1.0)]
    adapter, judged = aggregate(workspace, base, updates)
    n_one, n_two = (update.n_units for update in updates)
    expected = (n_one - n_two) / (n_one + n_two)
    for tensor in workspace.get_adapter(adapter).values():
        assert torch.allclose(tensor, torch.full_like(tensor, expected), atol=1e-7)
    assert [update.status for update in judged] == ["trained", "trained"]


def test_a_round_whose_updates_all_pass_reads_each_of_them_once(workspace: Workspace, monkeypatch) -> None:
    base, read = workspace.initial_adapter.trained, []
    updates = [update_of(workspace, "one", 1.0), update_of(workspace, "two", -0.3)]
    stream = workspace.store.stream
    monkeypatch.setattr(workspace.store, "stream", lambda ref: read.append(ref.key) or stream(ref))
    quick, _ = aggregate(workspace, base, updates)
    assert read == ["updates/one", "updates/two"]

    monkeypatch.setattr("fedmentor_core.rounds.joining._join_in_one_reading", lambda *_: None)
    careful, _ = aggregate(workspace, base, updates)
    assert quick.sha256 == careful.sha256, "the same bytes as judging each and joining then"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"value": float("nan")}, "NaN"),
        ({"value": 1e6}, "max_update_norm"),
        ({"data": b"no tensors"}, "not valid safetensors"),
        ({"base_adapter_sha256": "0" * 64}, "another round"),
        ({"run_id": "another"}, "another study"),
        ({"update": None}, "another study"),
        ({"update": ArtifactRef(key="updates/nowhere", sha256="0" * 64, n_bytes=1)}, "no object"),
    ],
)
def test_round_goes_on_without_a_rejected_update_and_says_why(workspace: Workspace, wrong: dict, told: str) -> None:
    base = workspace.initial_adapter.trained
    adapter, judged = aggregate(workspace, base, [update_of(workspace, "one", **wrong), update_of(workspace, "two")])
    assert [update.status for update in judged] == ["rejected", "trained"]
    assert told in judged[0].reason
    for tensor in workspace.get_adapter(adapter).values():
        assert torch.equal(tensor, torch.ones_like(tensor))


def test_tampered_update_is_rejected(workspace: Workspace) -> None:
    updates = [update_of(workspace, "one"), update_of(workspace, "two")]
    path = Path(workspace.ref.out_dir) / "store" / "updates" / "one"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    _, judged = aggregate(workspace, workspace.initial_adapter.trained, updates)
    assert judged[0].status == "rejected"
    assert "sha256" in judged[0].reason


def test_too_few_usable_updates_stop_the_round(workspace: Workspace) -> None:
    base = workspace.initial_adapter.trained
    updates = [update_of(workspace, "one", float("nan")), update_of(workspace, "two", status="failed")]
    with pytest.raises(FedMentorError, match=r"0 usable updates, aggregation.min_clients is 1"):
        aggregate(workspace, base, updates)


def test_all_rested_keeps_the_adapter(workspace: Workspace) -> None:
    base = workspace.initial_adapter.trained
    updates = [update_of(workspace, name, status="rested") for name in ("one", "two")]
    assert aggregate(workspace, base, updates) == (base, updates)
