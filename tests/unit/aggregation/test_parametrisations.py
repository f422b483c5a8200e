"""Small real studies, one for each way to train and join: every round is what the method promises, to the last file."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from aggregation_states import added, same_logits

from fedmentor_core.adapters.lora import factor_of, load_adapter_folder, save_adapter_folder
from fedmentor_core.aggregation.server import server_step
from fedmentor_core.aggregation.weights import raw_weights
from fedmentor_core.lineage import lineage_of
from fedmentor_core.rounds import find_manifest
from fedmentor_core.study import run_study
from fedmentor_core.workspace import Workspace, client_key, find_update

CASES: dict[str, dict[str, Any]] = {
    "ffa": {},
    "rolora": {"adapter": {"train": "alternate"}, "rounds": 3},
    "fed-sb": {"adapter": {"train": "core"}},
    "fed-sb along the weights": {"adapter": {"train": "core", "core_init": "weights"}},
    "fedit": {"adapter": {"train": "both"}},
    "fedex": {"adapter": {"train": "both", "rank": 2, "alpha": 4.0}, "aggregation": {"rule": "fedex"}, "rounds": 3},
    "svd": {"adapter": {"train": "both"}, "aggregation": {"rule": "svd"}},
    "noise-aware prox": {"aggregation": {"weights": "noise-aware", "prox_mu": 0.1}},
}
EXACT = ("ffa", "rolora", "fed-sb", "fed-sb along the weights", "fedex")


_finished: dict[str, Workspace] = {}


def finished(opened: Any, case: str) -> Workspace:
    """A finished study of that case: run once for all tests of this file, none of which may change it."""
    if case not in _finished:
        workspace: Workspace = opened(**CASES[case])
        summary = run_study(workspace.ref)
        assert all(client.status == "trained" for one in summary.rounds for client in one.clients)
        _finished[case] = workspace
    return _finished[case]


def adapters_of(workspace: Workspace) -> list[Any]:
    """The global adapter before the first round, and after each."""
    manifests = [find_manifest(workspace, index) for index in range(workspace.config.rounds)]
    return [workspace.initial_adapter.trained, *(one.adapter for one in manifests)]


@pytest.mark.parametrize("case", EXACT)
def test_each_round_is_the_mean_of_the_clients_models(opened: Any, case: str) -> None:
    workspace = finished(opened, case)
    adapters, scale = adapters_of(workspace), workspace.config.adapter.scale
    for index, (before, after) in enumerate(pairwise(adapters)):
        start = workspace.full_adapter_state(before)
        models = [
            added({**start, **workspace.get_update(find_update(workspace, index, name).update)}, scale)
            for name in ("one", "two")
        ]
        found = added(workspace.full_adapter_state(after), scale)
        for module, total in found.items():
            mean = sum(model[module] for model in models) / 2
            assert float((total - mean).norm()) <= 2e-6 * (1 + float(mean.norm())), (index, module)
        assert any(bool(total.any()) for total in found.values())


def test_a_round_weighs_by_the_public_noise_of_its_clients(opened: Any) -> None:
    """Domain 'two' has the smaller budget, so more noise: it counts for less than its units would."""
    workspace = finished(opened, "noise-aware prox")
    updates = [find_update(workspace, 0, name) for name in ("one", "two")]
    raw = raw_weights(workspace.config.aggregation, "unit", updates)
    assert raw["two"] / raw["one"] < 0.9 * updates[1].n_units / updates[0].n_units
    share = raw["one"] / sum(raw.values())
    one, two = (workspace.get_update(update.update) for update in updates)
    for name, tensor in workspace.get_adapter(adapters_of(workspace)[1]).items():
        assert torch.allclose(tensor, share * one[name] + (1 - share) * two[name], atol=1e-6)


@pytest.mark.parametrize("case", ["fedit", "svd"])
def test_a_round_that_is_not_exact_is_told_apart(opened: Any, case: str) -> None:
    """The same comparison finds a difference where the method has one, so it can fail."""
    workspace = finished(opened, case)
    before, after = adapters_of(workspace)[-2:]
    start, scale = workspace.full_adapter_state(before), workspace.config.adapter.scale
    refs = [find_update(workspace, 1, name).update for name in ("one", "two")]
    models = [added({**start, **workspace.get_update(ref)}, scale) for ref in refs]
    found = added(workspace.full_adapter_state(after), scale)
    missed = max(
        float((total - (models[0][m] + models[1][m]) / 2).norm() / models[0][m].norm()) for m, total in found.items()
    )
    assert missed > 1e-3
    if case == "svd":  # and nothing of its rank is closer
        for module, total in found.items():
            mean = (models[0][module] + models[1][module]) / 2
            tail = torch.linalg.svdvals(mean)[workspace.config.adapter.rank :].norm()
            assert float((total - mean).norm()) == pytest.approx(float(tail), rel=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_a_registered_adapter_computes_what_the_study_evaluated(opened: Any, case: str, tmp_path: Path) -> None:
    """As MLflow's loader and as plain peft load it: on the untouched backbone, with nothing of ours beside it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    workspace = finished(opened, case)
    final = adapters_of(workspace)[-1]
    folder, config = tmp_path / "adapter", workspace.config
    save_adapter_folder(folder, workspace.full_adapter_state(final), config.adapter, workspace.initial_adapter.targets)
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    with workspace.evaluation_lock:
        evaluated = workspace.evaluation_model_with(final)
        same_logits(load_adapter_folder(workspace.backbone, folder), evaluated)
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.backbone.name), folder)
        same_logits(theirs.eval(), evaluated)
        with pytest.raises(AssertionError):  # the comparison sees an adapter
            same_logits(workspace.backbone.model, evaluated)


@pytest.mark.parametrize("case", CASES)
def test_what_travels_is_what_the_round_trains_and_the_plan_says_how_much(opened: Any, case: str) -> None:
    workspace = finished(opened, case)
    expected = {"ffa": "B", "noise-aware prox": "B", "fed-sb": "R", "fed-sb along the weights": "R", "rolora": "BA"}
    for index in range(workspace.config.rounds):
        for plan in workspace.plan.domains:
            update = find_update(workspace, index, plan.domain)
            state = workspace.get_update(update.update)
            factors = {factor_of(name) for name in state}
            sent = expected.get(case)
            assert factors == ({"A", "B"} if sent is None else {sent[index % len(sent)]})
            assert update.bytes_up == update.update.n_bytes <= plan.bytes_up_per_round
            assert sum(t.numel() for t in state.values()) <= workspace.initial_adapter.n_trainable
            if index > 0:  # names of parts in a header are a few hundred bytes
                assert update.bytes_down <= plan.bytes_down_per_round + 500


def test_a_core_is_far_smaller_than_a_factor(opened: Any) -> None:
    """Fed-SB's r^2 numbers a matrix, against r m."""
    core = opened("a", adapter={"train": "core"}).initial_adapter
    factor = opened("b", adapter={"train": "b"}).initial_adapter
    rank, n_modules = 4, 14
    assert core.n_trainable == n_modules * rank**2
    assert factor.n_trainable > 8 * core.n_trainable


def test_frozen_factors_around_a_core_are_orthonormal_and_along_the_weights_if_asked(opened: Any) -> None:
    for out, init in (("a", "random"), ("b", "weights")):
        workspace = opened(out, adapter={"train": "core", "core_init": init})
        frozen = workspace.get_adapter(workspace.frozen_adapter)
        for name, tensor in frozen.items():
            gram = tensor @ tensor.T if factor_of(name) == "A" else tensor.T @ tensor
            assert torch.allclose(gram, torch.eye(4), atol=1e-5), name
        assert not any(tensor.any() for tensor in workspace.get_adapter(workspace.untrained_adapter).values())
        if init == "weights":
            weight = dict(workspace.backbone.model.named_parameters())["model.layers.0.self_attn.q_proj.weight"]
            kept = torch.linalg.svdvals(weight.double())[:4]
            b, a = (frozen[f"model.layers.0.self_attn.q_proj.lora_{factor}.weight"].double() for factor in "BA")
            assert torch.allclose(torch.linalg.svdvals(b.T @ weight.double() @ a.T), kept, rtol=1e-3)


def test_fedex_versions_the_base_and_training_goes_on_from_it(opened: Any) -> None:
    workspace = finished(opened, "fedex")
    adapters = adapters_of(workspace)
    versions = [workspace.parts_of(adapter).base for adapter in adapters]
    assert versions[0] is None
    assert len({one.sha256 for one in versions[1:]}) == 3
    for index, adapter in enumerate(adapters[1:], start=1):  # what a client starts from is what was evaluated
        with workspace.evaluation_lock:
            evaluated = workspace.evaluation_model_with(adapter)
            same_logits(workspace.model_with(adapter, index, "one"), evaluated)
    with workspace.evaluation_lock:  # and an adapter without a version is on the backbone as it came
        same_logits(workspace.evaluation_model_with(workspace.untrained_adapter), workspace.backbone.model)
    base = workspace.store.get(versions[-1].beside(adapters[-1]))
    assert len(base) == versions[-1].n_bytes
    summary = run_study(workspace.ref)  # finished: nothing is trained again
    assert lineage_of(workspace, summary, adapters[2], "rev").base_delta == versions[2].beside(adapters[2])
    assert all(client.bytes_down > workspace.initial_adapter.n_bytes for client in summary.rounds[2].clients)


def test_a_tampered_base_is_no_base(opened: Any) -> None:
    from fedmentor_core.errors import IntegrityError

    workspace = finished(opened, "fedex")
    final = adapters_of(workspace)[-1]
    path = Path(workspace.ref.out_dir) / "store" / workspace.parts_of(final).base.beside(final).key
    whole = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(whole[:-4] + b"\0\0\1\0")
    with pytest.raises(IntegrityError):
        workspace.get_adapter(final)
    path.write_bytes(whole)


def test_clients_of_different_ranks_train_the_best_of_their_rank(opened: Any, tiny_study: dict) -> None:
    tiny_study["domains"][0]["rank"] = 2
    workspace = opened(adapter={"train": "both"}, aggregation={"rule": "svd"})
    run_study(workspace.ref)
    after = adapters_of(workspace)[-1]
    low, high = (workspace.get_update(find_update(workspace, 1, name).update) for name in ("one", "two"))
    assert {t.shape[0] for name, t in low.items() if factor_of(name) == "A"} == {2}
    assert {t.shape[0] for name, t in high.items() if factor_of(name) == "A"} == {4}
    scale = workspace.config.adapter.scale
    assert workspace.config.adapter_of("one").scale == pytest.approx(scale)
    assert workspace.plan.domains[0].bytes_up_per_round < workspace.plan.domains[1].bytes_up_per_round
    one, two, joined = added(low, scale), added(high, scale), added(workspace.get_adapter(after), scale)
    for module, total in joined.items():
        mean = (one[module] + two[module]) / 2
        tail = torch.linalg.svdvals(mean)[4:].norm()
        assert float((total - mean).norm()) == pytest.approx(float(tail), rel=1e-3, abs=1e-6)


def test_a_poisoned_client_is_borne_by_the_median_in_a_real_round(opened: Any, tiny_study: dict) -> None:
    from fedmentor_core.adapters.lora import state_to_bytes
    from fedmentor_core.rounds import RoundState, aggregate, assignments_for
    from fedmentor_core.steps import train_with_retries

    tiny_study["domains"].append({**tiny_study["domains"][0], "name": "three"})
    found = {}
    for rule in ("median", "fedavg"):
        workspace = opened(rule, aggregation={"rule": rule})
        updates = [
            train_with_retries(workspace, one, lambda event: None)
            for one in assignments_for(workspace, RoundState.first(workspace))
        ]
        honest = [workspace.get_update(update.update) for update in updates]
        poison = {name: tensor + 100.0 for name, tensor in honest[0].items()}
        ref = workspace.store.put(client_key(workspace, 0, "one", "poison"), state_to_bytes(poison))
        updates[0] = updates[0].model_copy(update={"update": ref})
        adapter, judged = aggregate(workspace, workspace.initial_adapter.trained, updates)
        assert [one.status for one in judged] == ["trained"] * 3
        largest = max(float(tensor.abs().max()) for tensor in workspace.get_adapter(adapter).values())
        found[rule] = largest, max(float(t.abs().max()) for state in honest[1:] for t in state.values())
    assert found["median"][0] <= found["median"][1]
    assert found["fedavg"][0] > 30


def test_with_too_few_honest_updates_a_robust_rule_stops_the_round(opened: Any, tiny_study: dict) -> None:
    from fedmentor_core.client_round import run_client
    from fedmentor_core.errors import FedMentorError
    from fedmentor_core.rounds import RoundState, aggregate, assignments_for

    tiny_study["domains"].append({**tiny_study["domains"][0], "name": "three"})
    workspace = opened(aggregation={"rule": "trimmed-mean"})
    updates = [run_client(workspace, one) for one in assignments_for(workspace, RoundState.first(workspace))]
    updates[2] = updates[2].model_copy(update={"status": "failed", "update": None})
    with pytest.raises(FedMentorError, match=r"2 usable updates, aggregation\.rule 'trimmed-mean' needs 3"):
        aggregate(workspace, workspace.initial_adapter.trained, updates)


@pytest.mark.slow
@pytest.mark.parametrize("train", ["b", "alternate"])
def test_server_adam_takes_the_same_steps_across_a_resume(opened: Any, train: str) -> None:
    """A study that was stopped after its first round, in a new process, against one that was not."""
    from fedmentor_core import workspace as module

    changes = {
        "adapter": {"train": train},
        "aggregation": {"server": "adam", "server_learning_rate": 0.05},
        "privacy": {"noise_seed": 3},
        "rounds": 3,
    }
    straight = opened("a", **changes)
    run_study(straight.ref)
    again = opened("b", **changes)
    stopped = StopAfter(1)
    with pytest.raises(KeyboardInterrupt):
        run_study(again.ref, listen=stopped)
    module._workspaces.clear()
    resumed = opened("b", **changes)
    assert resumed is not again
    run_study(resumed.ref)
    left, right = adapters_of(straight), adapters_of(resumed)
    assert [one.sha256 for one in left] == [one.sha256 for one in right]
    before, after = (straight.get_adapter(one) for one in left[1:3])
    trained = {name for name in before if factor_of(name) == ("A" if train == "alternate" else "B")}
    updates = [straight.get_update(find_update(straight, 1, name).update) for name in ("one", "two")]
    joined = {name: (updates[0][name] + updates[1][name]) / 2 for name in trained}
    settings = straight.config.aggregation
    expected, _ = server_step(
        settings, {name: before[name] for name in trained}, joined, straight.server_memory(left[1])
    )
    assert all(torch.allclose(after[name], expected[name], atol=1e-6) for name in trained)


class StopAfter:
    """A listener that interrupts a study once so many rounds are committed."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def __call__(self, event: Any) -> None:
        if event.stage == "gate" and event.completed == self.rounds:
            raise KeyboardInterrupt
