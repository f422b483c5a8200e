"""The DP path against a slow reference that looks at one unit at a time, with plain autograd."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmentor_core.adapters.backbone import Backbone, load_backbone
from fedmentor_core.adapters.lora import attach, trainable_parameters
from fedmentor_core.config import AdapterConfig, BackboneConfig
from fedmentor_core.errors import BackboneError, FedMentorError
from fedmentor_core.privacy.engine import make_private_optimizer, private_model
from fedmentor_core.privacy.row_gradients import RowGradients
from fedmentor_core.training.checkpointing import checkpointing
from fedmentor_core.training.client import TrainingSet, _microbatches, _private_step, _stack, _weighted_losses
from fedmentor_core.training.forward import losses_of
from fedmentor_core.training.sampler import pick_rows

TOLERANCE = 1e-5  # relative L2 distance, fp32
EXPECTED_UNITS = 5.5
FIRST = 0.3  # the first target's extra weight


class Recorder(torch.optim.SGD):
    """Keeps the gradient that it would have stepped with."""

    def step(self, closure: Any = None) -> None:
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def backbone(tiny_backbone_folder: Path) -> Backbone:
    return load_backbone(BackboneConfig(name=str(tiny_backbone_folder), max_length=160, device="cpu"))


@pytest.fixture(scope="module")
def data() -> TrainingSet:
    """Nine units of one to three rows, every row of another length."""
    generator = torch.Generator().manual_seed(1)
    rows_of_unit, input_ids, labels = [], [], []
    for unit in range(9):
        rows = []
        for _ in range(1 + unit % 3):
            prompt, answer = (int(n) for n in torch.randint(2, 12, (2,), generator=generator))
            ids = torch.randint(2, 600, (prompt + answer,), generator=generator).tolist()
            rows.append(len(input_ids))
            input_ids.append(ids)
            labels.append([-100] * prompt + ids[prompt:])
        rows_of_unit.append(rows)
    return TrainingSet(input_ids=input_ids, labels=labels, rows_of_unit=rows_of_unit, pad_id=0)


def adapted(backbone: Backbone, train: str) -> Any:
    """A model whose B is not zero, so that every trained factor has a gradient."""
    model = attach(backbone, AdapterConfig(rank=4, alpha=8.0, train=train), seed=5)
    generator = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def plain_loss(model: Any, ids: list[int], labels: list[int], first: float = 0.0) -> torch.Tensor:
    """Cross-entropy of one row's targets, from full logits, without padding or neighbours."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
    places = [i for i, label in enumerate(labels[1:]) if label != -100]
    losses = torch.nn.functional.cross_entropy(logits[places], torch.tensor(labels[1:])[places], reduction="none")
    return (1 - first) * losses.mean() + first * losses[0]


def unit_gradients(model: Any, data: TrainingSet, picked: list[tuple[int, int]]) -> list[list[torch.Tensor]]:
    """One gradient per unit, over all trained tensors."""
    parameters = list(trainable_parameters(model).values())
    found = []
    for unit in sorted({unit for unit, _ in picked}):
        rows = [row for owner, row in picked if owner == unit]
        loss = sum(plain_loss(model, data.input_ids[row], data.labels[row], FIRST) for row in rows) / len(rows)
        found.append(list(torch.autograd.grad(loss, parameters)))
    return found


def joint_norm(gradient: list[torch.Tensor]) -> float:
    return float(torch.cat([g.flatten() for g in gradient]).norm())


@pytest.mark.parametrize("train", ["b", "both", "core"])
@pytest.mark.parametrize("how", ["one", "all"])
@pytest.mark.parametrize("microbatch", [1, 4, 64])
def test_step_equals_the_sum_of_clipped_unit_gradients(
    backbone: Backbone, data: TrainingSet, train: str, how: str, microbatch: int
) -> None:
    units = [0, 2, 3, 5, 7, 8]
    picked = pick_rows(units, data.rows_of_unit, how, torch.Generator().manual_seed(2))
    model = adapted(backbone, train)
    gradients = unit_gradients(model, data, picked)
    norms = [joint_norm(gradient) for gradient in gradients]
    clip = sorted(norms)[len(norms) // 2]  # some units are clipped, some are not
    expected = [
        sum(min(1.0, clip / norm) * g[i] for g, norm in zip(gradients, norms, strict=True)) / EXPECTED_UNITS
        for i in range(len(gradients[0]))
    ]

    wrapped = private_model(model)
    wrapped.train()
    recorder = Recorder(list(trainable_parameters(model).values()), lr=1.0)
    optimizer = make_private_optimizer(
        recorder, noise_multiplier=0.0, clip_norm=clip, expected_units=EXPECTED_UNITS, device="cpu"
    )
    _private_step(optimizer, _microbatches(picked, data, microbatch, "cpu"), partial(_weighted_losses, wrapped, FIRST))

    distance = joint_norm([a - b for a, b in zip(recorder.seen, expected, strict=True)])
    assert distance <= TOLERANCE * joint_norm(expected)
    assert joint_norm(expected) > 0


@pytest.mark.parametrize(("train", "fused"), [("b", True), ("both", True), ("core", False)])
def test_the_adapter_trains_in_fused_layers(backbone: Backbone, train: str, fused: bool) -> None:
    model = adapted(backbone, train)
    adapted_layers = [module for module in model.modules() if hasattr(module, "lora_B")]
    private_model(model)
    assert adapted_layers
    assert all(("forward" in vars(layer)) is fused for layer in adapted_layers)


def test_step_takes_no_gradient_over_from_the_one_before(backbone: Backbone, data: TrainingSet) -> None:
    model = adapted(backbone, "b")
    wrapped = private_model(model)
    wrapped.train()
    recorder = Recorder(list(trainable_parameters(model).values()), lr=1.0)
    optimizer = make_private_optimizer(recorder, noise_multiplier=0.0, clip_norm=1.0, expected_units=4, device="cpu")
    seen = []
    for units in ([0, 1, 2], [], [0, 1, 2]):
        picked = pick_rows(units, data.rows_of_unit, "all", None)
        _private_step(optimizer, _microbatches(picked, data, 2, "cpu"), partial(_weighted_losses, wrapped, 0.0))
        seen.append(recorder.seen)
    assert joint_norm(seen[1]) == 0
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[2], strict=True))


def one_step(model: Any, data: TrainingSet, clip: float, **loss_options: Any) -> list[torch.Tensor]:
    """The noiseless step of units 0, 2, 3, 5 in microbatches of four rows."""
    picked = pick_rows([0, 2, 3, 5], data.rows_of_unit, "all", None)
    wrapped = private_model(model).train()
    recorder = Recorder(list(trainable_parameters(model).values()), lr=1.0)
    optimizer = make_private_optimizer(recorder, noise_multiplier=0.0, clip_norm=clip, expected_units=4, device="cpu")
    loss = partial(_weighted_losses, wrapped, FIRST, **loss_options)
    _private_step(optimizer, _microbatches(picked, data, 4, "cpu"), loss)
    wrapped.to_standard_module()
    return recorder.seen


@pytest.mark.parametrize("train", ["b", "both"])
def test_activation_checkpointing_changes_no_gradient(backbone: Backbone, data: TrainingSet, train: str) -> None:
    model = adapted(backbone, train)
    kept = one_step(model, data, clip=0.01)
    calls = []
    layer = model.get_base_model().model.layers[0].mlp
    handle = layer.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with checkpointing(model, enabled=True):
            recomputed = one_step(model, data, clip=0.01)
        twice = len(calls)
        one_step(model, data, clip=0.01)
    finally:
        handle.remove()
    assert twice == 2 * (len(calls) - twice), "each block ran twice while checkpointing, and once after it"
    assert joint_norm([a - b for a, b in zip(kept, recomputed, strict=True)]) <= 1e-6 * joint_norm(kept)


def test_bfloat16_products_leave_the_clip_in_fp32(backbone: Backbone, data: TrainingSet) -> None:
    model = adapted(backbone, "both")
    exact, rounded = one_step(model, data, clip=1e-3), one_step(model, data, clip=1e-3, autocast=True)
    assert all(gradient.dtype == torch.float32 for gradient in rounded)
    assert joint_norm([a - b for a, b in zip(exact, rounded, strict=True)]) <= 0.05 * joint_norm(exact)
    assert joint_norm(rounded) != joint_norm(exact)
    picked = pick_rows([5], data.rows_of_unit, "one", torch.Generator().manual_seed(1))
    wrapped = private_model(model).train()
    recorder = Recorder(list(trainable_parameters(model).values()), lr=1.0)
    optimizer = make_private_optimizer(recorder, noise_multiplier=0.0, clip_norm=1e-3, expected_units=1, device="cpu")
    loss = partial(_weighted_losses, wrapped, FIRST, autocast=True)
    _private_step(optimizer, _microbatches(picked, data, 4, "cpu"), loss)
    assert joint_norm(recorder.seen) == pytest.approx(1e-3, rel=2e-3)
    assert joint_norm(recorder.seen) <= 1e-3 * (1 + 1e-6)


class Twice(torch.nn.Module):
    """One trained layer, used two times in a pass; its input has no gradient the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 3, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.tanh(self.layer(rows)))


def test_layer_used_twice_has_the_sum_of_both_gradients() -> None:
    torch.manual_seed(0)
    model, rows = Twice(), torch.randn(4, 5, 3)
    expected = []
    for row in rows:
        model.zero_grad()
        model(row[None]).square().sum().backward()
        expected.append(model.layer.weight.grad.clone())
    model.zero_grad(set_to_none=True)
    wrapped = RowGradients(model).train()
    wrapped(rows).square().sum().backward()
    assert torch.allclose(model.layer.weight.grad_sample, torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert model.layer.weight.grad is None


def test_model_is_given_back_as_it_was() -> None:
    model, rows = Twice(), torch.randn(2, 3)
    before = model(rows)
    wrapped = RowGradients(model)
    assert torch.equal(wrapped(rows), before)
    assert wrapped.to_standard_module() is model
    assert "forward" not in vars(model.layer)
    assert not hasattr(model.layer.weight, "grad_sample")
    model(rows).sum().backward()
    assert model.layer.weight.grad is not None


@pytest.mark.parametrize("layer", [torch.nn.Linear(2, 2), torch.nn.Embedding(4, 2), torch.nn.Conv1d(2, 2, 1)])
def test_layer_without_gradients_per_row_is_refused(layer: torch.nn.Module) -> None:
    with pytest.raises(FedMentorError, match=r"target_modules"):
        private_model(torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), layer))


def test_every_microbatch_holds_whole_units_once(data: TrainingSet) -> None:
    picked = pick_rows(range(data.n_units), data.rows_of_unit, "all", None)
    for limit in (1, 3, 100):
        batches = list(_microbatches(picked, data, limit, "cpu"))
        assert sum(batch.n_units for batch in batches) == data.n_units
        assert sum(int((batch.unit_of_row < batch.n_units).sum()) for batch in batches) == len(data.input_ids)
        for batch in batches:
            weight = torch.zeros(batch.n_units + 1).index_add(0, batch.unit_of_row, batch.row_weight)
            assert torch.allclose(weight[:-1], torch.ones(batch.n_units))
            assert weight[-1] == 0, "a filler row weighs nothing"
            assert (batch.labels[batch.unit_of_row == batch.n_units] == -100).all()
            assert len(batch.input_ids) <= limit or batch.n_units == 1


@pytest.mark.parametrize("first", [0.0, FIRST])
def test_loss_is_each_sequences_own_whatever_its_neighbours_and_padding(
    backbone: Backbone, data: TrainingSet, first: float
) -> None:
    model = adapted(backbone, "both")
    rows = range(len(data.input_ids))

    def check(found: torch.Tensor, expected: torch.Tensor) -> None:
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)

    with torch.no_grad():
        expected = torch.stack([plain_loss(model, data.input_ids[row], data.labels[row], first) for row in rows])
        loss = partial(losses_of, model, first_token_weight=first)
        for row in rows:
            alone = _stack([[row]], data, "cpu")
            check(loss(alone.input_ids, alone.attention_mask, alone.labels), expected[[row]])
        batch = _stack([[row] for row in rows], data, "cpu")
        check(loss(batch.input_ids, batch.attention_mask, batch.labels), expected)
        padded = ((batch.input_ids, 0), (batch.attention_mask, 0), (batch.labels, -100))
        check(loss(*(torch.nn.functional.pad(tensor, (0, 9), value=value) for tensor, value in padded)), expected)


def test_sequence_without_targets_has_no_loss(backbone: Backbone) -> None:
    ids = torch.randint(2, 600, (2, 6))
    labels = torch.full((2, 6), -100)
    labels[1, 3:] = ids[1, 3:]
    losses = losses_of(adapted(backbone, "b"), ids, torch.ones_like(ids), labels, first_token_weight=FIRST).detach()
    assert float(losses[0]) == 0
    assert float(losses[1]) > 0
    assert losses.dtype == torch.float32


def test_clients_on_one_backbone_do_not_meet(backbone: Backbone) -> None:
    """Two wrapped models share frozen weights; closing one leaves the other's per-sample gradients alone."""
    first, second = adapted(backbone, "b"), adapted(backbone, "b")
    frozen = {id(p) for p in first.parameters() if not p.requires_grad}
    assert frozen & {id(p) for p in second.parameters()}
    trained = list(trainable_parameters(second).values())
    assert not {id(p) for p in trained} & {id(p) for p in first.parameters()}

    wrapped_first, wrapped_second = private_model(first).train(), private_model(second).train()
    ids = torch.randint(2, 600, (3, 7))
    for wrapped in (wrapped_first, wrapped_second):
        losses_of(wrapped, ids, torch.ones_like(ids), ids).sum().backward()
    wrapped_first.to_standard_module()
    assert all(p.grad_sample.shape == (3, *p.shape) for p in trained)
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in backbone.model.parameters())


def test_model_that_mixes_samples_is_refused() -> None:
    with pytest.raises(FedMentorError, match="BatchNorm1d"):
        private_model(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)))


def test_output_head_is_no_target(backbone: Backbone) -> None:
    with pytest.raises(BackboneError, match="lm_head"):
        attach(backbone, AdapterConfig(target_modules=("q_proj", "lm_head")), seed=0)


def test_gradient_that_is_not_per_row_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = make_private_optimizer(
        torch.optim.SGD([parameter], lr=1.0), noise_multiplier=1.0, clip_norm=1.0, expected_units=1, device="cpu"
    )
    for wrong in (None, torch.ones(5, 2)):
        parameter.grad_sample = wrong
        with pytest.raises(FedMentorError, match="gradient per row"):
            optimizer.fold(torch.tensor([0, 1]), 2)
