"""Small real studies over every codec: what is planned is what travels, what is charged is what it always was."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedmentor_core import client_round
from fedmentor_core.adapters.lora import metadata_from_bytes, state_from_bytes, state_to_bytes
from fedmentor_core.client_round import run_client
from fedmentor_core.records import ClientUpdate, StudySummary
from fedmentor_core.rounds import RoundState, aggregate, assignments_for, find_manifest
from fedmentor_core.study import run_study
from fedmentor_core.wire.codecs import SCALES
from fedmentor_core.wire.envelope import KEY
from fedmentor_core.wire.update import Base
from fedmentor_core.workspace import Workspace, find_update

PAIRS = [("fp32", "fp32"), ("bf16", "bf16"), ("int8", "int8"), ("int6", "int7"), ("int4", "int8"), ("int4", "int4")]
BITS = {"fp32": 32, "bf16": 16, "int8": 8.25, "int7": 7.125, "int6": 6.25, "int4": 4.5}
STEPS = {"bf16": 128, "int8": 126, "int7": 124.9, "int6": 61.4, "int4": 6.9}
SHAPED: dict[str, dict[str, Any]] = {
    "ffa": {},
    "rolora and adam": {"adapter": {"train": "alternate"}, "aggregation": {"server": "adam"}, "rounds": 4},
    "ffa and momentum": {"aggregation": {"server": "momentum"}, "rounds": 3},
    "fed-sb": {"adapter": {"train": "core"}},
    "fedit": {"adapter": {"train": "both"}},
    "fedex": {"adapter": {"train": "both", "rank": 2}, "aggregation": {"rule": "fedex"}, "rounds": 3},
    "svd with ranks": {"adapter": {"train": "both"}, "aggregation": {"rule": "svd"}},
    "odd rank": {"adapter": {"rank": 3}},
}
_finished: dict[tuple[str, str], tuple[Workspace, StudySummary]] = {}


def finished(opened: Any, upload: str, download: str) -> tuple[Workspace, StudySummary]:
    """A finished study over these codecs, with seeded noise: run once for all tests of this file."""
    if (upload, download) not in _finished:
        wire = {"upload": upload, "download": download}
        workspace: Workspace = opened(f"{upload}-{download}", wire=wire, privacy={"noise_seed": 5})
        _finished[upload, download] = workspace, run_study(workspace.ref)
    return _finished[upload, download]


def stored(workspace: Workspace, key: str) -> int:
    """Bytes of an object as it lies on the disk."""
    return (Path(workspace.ref.out_dir) / "store" / key).stat().st_size


def adapter_before(workspace: Workspace, round_index: int) -> Any:
    if round_index == 0:
        return workspace.initial_adapter.trained
    manifest = find_manifest(workspace, round_index - 1)
    assert manifest is not None
    return manifest.adapter


def updates_of(workspace: Workspace, round_index: int) -> list[ClientUpdate]:
    found = [find_update(workspace, round_index, one.name) for one in workspace.config.domains]
    return [one for one in found if one is not None]


def base_of(workspace: Workspace, update: ClientUpdate) -> Base:
    adapter = adapter_before(workspace, update.round_index)
    return Base(adapter.sha256, workspace.trained_part(adapter, update.round_index, update.domain))


@pytest.mark.parametrize(("upload", "download"), PAIRS)
def test_the_plan_says_to_the_byte_what_travels(opened: Any, upload: str, download: str) -> None:
    workspace, summary = finished(opened, upload, download)
    plans = {plan.domain: plan for plan in workspace.plan.domains}
    for one in summary.rounds:
        down = stored(workspace, adapter_before(workspace, one.round_index).key)
        for client in one.clients:
            plan, update = plans[client.domain], find_update(workspace, one.round_index, client.domain)
            assert client.status == "trained"
            assert client.bytes_up == plan.bytes_up_per_round == stored(workspace, update.update.key)
            if one.round_index == 0:
                frozen = stored(workspace, workspace.frozen_adapter.key)
                assert client.bytes_down == plan.bytes_down_first_round == down + frozen
            else:
                assert client.bytes_down == plan.bytes_down_per_round == down
    assert summary.rounds[1].bytes_total == workspace.plan.bytes_per_round
    n, header = workspace.initial_adapter.n_trainable, 4_500  # a tiny adapter's header weighs as much as its numbers
    assert 0 < plans["one"].bytes_up_per_round - n * BITS[upload] / 8 < header
    assert 0 < plans["one"].bytes_down_per_round - n * BITS[download] / 8 < header


@pytest.mark.parametrize(
    ("case", "upload", "download"),
    [
        *((case, "int4", "int8") for case in SHAPED),
        *((case, "int6", "int7") for case in ("rolora and adam", "fedex", "odd rank")),
        *((case, "fp32", "fp32") for case in ("rolora and adam", "fedex")),
    ],
)
def test_every_way_to_train_and_join_is_planned_to_the_byte(
    opened: Any, tiny_study: dict, case: str, upload: str, download: str
) -> None:
    if case == "svd with ranks":
        tiny_study["domains"][0]["rank"] = 2
    workspace = opened(wire={"upload": upload, "download": download}, **SHAPED[case])
    summary = run_study(workspace.ref)
    for index, one in enumerate(summary.rounds):
        for client in one.clients:
            assert client.status == "trained"
            assert client.bytes_up == workspace.traffic.bytes_up(client.domain, index)
            assert client.bytes_down == workspace.traffic.bytes_down(index)
    later = [client for one in summary.rounds[1:] for client in one.clients]
    for plan in workspace.plan.domains:
        assert plan.bytes_up_per_round == max(client.bytes_up for client in later if client.domain == plan.domain)
        assert plan.bytes_down_per_round == max(client.bytes_down for client in later)


@pytest.mark.parametrize(("upload", "download"), PAIRS[1:])
def test_accounts_and_noise_are_those_of_full_precision(opened: Any, upload: str, download: str) -> None:
    """Post-processing: the ledger does not know of it."""
    exact, _ = finished(opened, "fp32", "fp32")
    rounded, _ = finished(opened, upload, download)
    for name in ("one", "two"):
        entries = []
        for workspace in (exact, rounded):
            kept = {"digest", "policy_sha256", "run_id", "created_at", "previous"}
            entries.append(
                [
                    {k: v for k, v in one.model_dump().items() if k not in kept}
                    for one in workspace.ledger(name).entries()
                ]
            )
        assert [one["kind"] for one in entries[0]] == ["plan", *["charge", "release"] * 2]
        assert entries[0] == entries[1]
        assert exact.ledger(name).view().epsilon_spent == rounded.ledger(name).view().epsilon_spent
    ours = {"domain", "noise_multiplier", "sample_rate", "steps", "epsilon_spent", "epsilon_budget", "delta", "status"}
    for index in range(2):
        told = [[c.model_dump(include=ours) for c in updates_of(workspace, index)] for workspace in (exact, rounded)]
        assert told[0] == told[1]


@pytest.mark.parametrize("upload", ["bf16", "int8", "int6", "int4"])
def test_an_update_is_the_noised_one_rounded(opened: Any, upload: str) -> None:
    """The same noise seed, so the same noised update before it is rounded."""
    exact = opened("exact", privacy={"noise_seed": 5})
    rounded = opened("rounded", privacy={"noise_seed": 5}, wire={"upload": upload})
    one, other = (run_client(w, assignments_for(w, RoundState.first(w))[0]) for w in (exact, rounded))
    meant, base = exact.get_update(one.update), base_of(rounded, other)
    found = rounded.get_update(other.update, base)
    assert other.bytes_up < one.bytes_up / 1.3
    step = 1 / STEPS[upload]
    moved = False
    for name, tensor in meant.items():
        change = tensor - base.state[name]
        error = (found[name] - tensor).abs()
        assert float(error.max()) <= step * float(change.abs().max()) + 1e-7
        moved |= bool(error.any())
    assert moved


@pytest.mark.parametrize(("upload", "download"), PAIRS[1:])
def test_server_and_clients_go_on_from_the_very_same_numbers(opened: Any, upload: str, download: str) -> None:
    workspace, _ = finished(opened, upload, download)
    for index in range(2):
        before, after = adapter_before(workspace, index), adapter_before(workspace, index + 1)
        start = workspace.get_adapter(before)
        trained = {n: p for n, p in _parameters(workspace.model_with(before, index, "one")).items() if n in start}
        assert all(torch.equal(trained[name], start[name]) for name in start)
        ends = [workspace.get_update(one.update, base_of(workspace, one)) for one in updates_of(workspace, index)]
        joined = {name: (ends[0][name].double() + ends[1][name].double()) / 2 for name in start}
        found = workspace.get_adapter(after)
        step = 1 / STEPS[download]
        for name, mean in joined.items():
            assert float((found[name] - mean).abs().max()) <= step * float(mean.abs().max()) + 1e-7


def _parameters(model: Any) -> dict[str, torch.Tensor]:
    from fedmentor_core.adapters.lora import trainable_parameters

    return {name: p.detach().cpu() for name, p in trainable_parameters(model).items()}


def test_joining_again_gives_the_same_object_and_each_round_has_its_own_coins(opened: Any) -> None:
    """A resumed round must not make another adapter: what was evaluated and charged for it would be lost."""
    workspace, _ = finished(opened, "int4", "int8")
    before = adapter_before(workspace, 1)
    again, _ = aggregate(workspace, before, updates_of(workspace, 1))
    assert again == adapter_before(workspace, 2)
    generator = torch.Generator().manual_seed(1)  # what was read is on the codec's grid, where no coin is thrown
    state = {k: torch.randn(v.shape, generator=generator) for k, v in workspace.get_adapter(before).items()}
    assert workspace.put_adapter(state, after="x") == workspace.put_adapter(state, after="x")
    assert workspace.put_adapter(state, after="x") != workspace.put_adapter(state, after="y")


def test_an_untrained_adapter_is_the_backbone_in_any_codec(opened: Any) -> None:
    workspace, _ = finished(opened, "int4", "int4")
    assert not any(tensor.any() for tensor in workspace.get_adapter(workspace.untrained_adapter).values())


def test_another_studys_adapter_is_kept_as_it_is(opened: Any) -> None:
    """Such as a champion, which must be judged as it is in production."""
    workspace, _ = finished(opened, "int4", "int4")
    state = {"a.weight": torch.randn(40, 4, generator=torch.Generator().manual_seed(1))}
    exact, rounded = workspace.put_adapter(state, exact=True), workspace.put_adapter(state)
    assert torch.equal(workspace.get_adapter(exact)["a.weight"], state["a.weight"])
    assert not torch.equal(workspace.get_adapter(rounded)["a.weight"], state["a.weight"])


class DeathError(BaseException):
    """The process is gone."""


def test_a_retry_sends_the_same_bytes(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = opened(wire={"upload": "int4", "download": "int8"})
    assignment = assignments_for(workspace, RoundState.first(workspace))[0]

    def die(*_: Any, **__: Any) -> None:
        raise DeathError

    with monkeypatch.context() as patch:
        patch.setattr(client_round, "_commit", die)
        with pytest.raises(DeathError):
            run_client(workspace, assignment)
    released = [entry.digest for entry in workspace.ledger("one").entries() if entry.kind == "release"]
    with monkeypatch.context() as patch:
        for name in ("train_locally", "encode_update"):  # nothing may be trained or rounded again
            patch.setattr(client_round, name, die)
        update = run_client(workspace, assignment)
    assert [update.update.sha256] == released
    assert (update.status, update.attempt) == ("trained", 0)


def _spoilt(data: bytes, how: str) -> bytes:
    metadata, state = metadata_from_bytes(data), state_from_bytes(data)
    scales = [name for name in state if name.endswith(SCALES)]
    if how in ("NaN", "negative", "infinite"):
        state[scales[0]][0] = {"NaN": float("nan"), "negative": -1.0, "infinite": float("inf")}[how]
    elif how == "huge":
        for name in scales:
            state[name].fill_(1e6)
    elif how == "another codec":
        metadata[KEY] = metadata[KEY].replace("int8", "int4")
    elif how == "another version":
        metadata[KEY] = metadata[KEY].replace('"version":1', '"version":9')
    elif how == "another base":
        metadata[KEY] = metadata[KEY].replace(metadata["base_sha256"], "0" * 64)
    elif how == "another shape":
        state = {name: tensor[:-1].contiguous() for name, tensor in state.items()}
    elif how == "plain":
        metadata.pop(KEY)
    return state_to_bytes(state, metadata)[: -5 if how == "cut" else None]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("NaN", "scale"), ("negative", "scale"), ("infinite", "scale"), ("huge", "max_update_norm"),
        ("another codec", "expected 'int8'"), ("another version", "version 9"), ("another base", "another global"),
        ("another shape", "expected"), ("plain", "'fp32', expected 'int8'"), ("cut", "not valid safetensors"),
    ],
)  # fmt: skip
def test_a_malformed_update_is_rejected_and_the_round_goes_on(opened: Any, how: str, told: str) -> None:
    workspace, _ = finished(opened, "int8", "int8")
    state, updates = RoundState.first(workspace), updates_of(workspace, 0)
    data = _spoilt(workspace.store.get(updates[0].update), how)
    updates[0] = updates[0].model_copy(update={"update": workspace.store.put(f"updates/{how}", data)})
    adapter, judged = aggregate(workspace, state.adapter, updates)
    assert [one.status for one in judged] == ["rejected", "trained"]
    assert told in judged[0].reason
    assert all(bool(torch.isfinite(tensor).all()) for tensor in workspace.get_adapter(adapter).values())


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_robust_rules_join_what_is_read(opened: Any, tiny_study: dict, rule: str) -> None:
    """They read single tensors from disk: of a rounded update those that it stands for."""
    tiny_study["domains"].append({**tiny_study["domains"][0], "name": "three"})
    workspace = opened(wire={"upload": "int4"}, aggregation={"rule": rule}, rounds=1)
    run_study(workspace.ref)
    ends = [workspace.get_update(one.update, base_of(workspace, one)) for one in updates_of(workspace, 0)]
    found = workspace.get_adapter(adapter_before(workspace, 1))
    for name, tensor in found.items():
        assert torch.allclose(tensor, torch.stack([end[name] for end in ends]).median(dim=0).values, atol=1e-7)
