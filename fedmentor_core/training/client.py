"""The local loop of one client in one round: DP-SGD (or, for baselines, plain SGD) on the adapter."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedmentor_core.adapters.fused import fused
from fedmentor_core.adapters.lora import State, adapter_state, trainable_parameters
from fedmentor_core.config import TrainingConfig
from fedmentor_core.errors import DeadlineError, FedMentorError
from fedmentor_core.privacy.entropy import secret_generator
from fedmentor_core.training.checkpointing import checkpointing
from fedmentor_core.training.forward import losses_of
from fedmentor_core.training.sampler import pick_rows, poisson_batches


@dataclass(frozen=True)
class TrainingSet:
    """Tokenised rows grouped by privacy unit.

    Attributes:
        input_ids: token ids per row (ragged).
        labels: targets per row, -100 on the prompt.
        rows_of_unit: row indices of each unit; every unit has at least one.
        pad_id: padding token.
    """

    input_ids: Sequence[Sequence[int]]
    labels: Sequence[Sequence[int]]
    rows_of_unit: Sequence[Sequence[int]]
    pad_id: int

    @property
    def n_units(self) -> int:
        """N: the population of the accounting."""
        return len(self.rows_of_unit)


@dataclass(frozen=True)
class LocalRound:
    """What one client does in one round (all public numbers)."""

    sample_rate: float
    steps: int
    noise_multiplier: float | None
    clip_norm: float
    order_seed: int
    noise_seed: int | None = None
    prox_mu: float = 0.0


def train_locally(
    model: Any,
    data: TrainingSet,
    config: TrainingConfig,
    plan: LocalRound,
    *,
    device: str,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> State:
    """Train the adapter in place and return its trained tensors (noised, safe to release once charged).

    Args:
        model: a peft model on ``device`` with the round's global adapter loaded.
        data: the client's training units.
        config: steps' shape and optimiser.
        plan: sampling, noise and clip of this round; ``noise_multiplier=None`` trains without privacy.
        device: 'cpu' or 'cuda'.
        on_step: progress, called with (done, total) after every step; gets no loss.

    Raises:
        DeadlineError: past ``config.deadline_seconds``; nothing is returned.
        FedMentorError: the weights did not move after the first step.

    Guarantees:
        With noise, the returned tensors are a function of ``plan.steps`` sampled Gaussian mechanisms of sensitivity
        ``clip_norm``, sampling each unit with ``plan.sample_rate`` (see ``privacy/engine.py``). FedProx's term
        (``plan.prox_mu``) is added to what each of these mechanisms released, so it changes nothing of that.
    """
    import torch
    from torch.optim import AdamW

    private = plan.noise_multiplier is not None
    before = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    optimizer: Any = AdamW(
        list(trainable_parameters(model).values()), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    if plan.prox_mu > 0:
        optimizer.register_step_pre_hook(partial(_pull_back, list(before.values()), plan.prox_mu))
    # Amplification by sampling needs a sample that nobody else knows, so a private run draws it from the system's
    # entropy too; only seeded (not private) and non-private runs are reproducible.
    order_seed = plan.order_seed if not private or plan.noise_seed is not None else None
    expected_units = plan.sample_rate * data.n_units
    wrapped = model
    if private:
        from fedmentor_core.privacy.engine import make_private_optimizer, private_model

        wrapped = private_model(model)
        optimizer = make_private_optimizer(
            optimizer,
            noise_multiplier=plan.noise_multiplier or 0.0,
            clip_norm=plan.clip_norm,
            expected_units=expected_units,
            device=device,
            noise_seed=plan.noise_seed,
        )
    autocast = uses_bfloat16(config.autocast, device)
    loss = partial(_weighted_losses, wrapped, config.first_token_weight, autocast=autocast)
    row_choice = secret_generator() if order_seed is None else torch.Generator().manual_seed(order_seed ^ 0x5EED)
    started = time.monotonic()
    # The backbone has no active dropout (peft's is 0), so train mode changes nothing but lets blocks be checkpointed.
    wrapped.train()
    batches = enumerate(poisson_batches(data.n_units, plan.sample_rate, plan.steps, order_seed), start=1)
    try:
        with checkpointing(model, enabled=config.activation_checkpointing), fused(model, enabled=not private):
            for done, units in batches:
                rows = pick_rows(units, data.rows_of_unit, config.rows_per_unit, row_choice)
                pieces = _microbatches(rows, data, config.microbatch_size, device)
                if private:
                    _private_step(optimizer, pieces, loss)
                else:
                    _plain_step(optimizer, pieces, loss, expected_units)
                if done == 1 and units:
                    _assert_moved(model, before)
                on_step(done, plan.steps)
                _check_deadline(config, started, done, plan.steps)
    finally:
        if private:
            wrapped.to_standard_module()
        model.eval()
    return adapter_state(model, trainable_only=True)


_WIDTH_STEP = 32  # tokens


@dataclass(frozen=True)
class _Microbatch:
    input_ids: Any  # (B, T)
    attention_mask: Any  # (B, T)
    labels: Any  # (B, T)
    row_weight: Any  # (B,) 1 / rows of the unit in this batch
    unit_of_row: Any  # (B,) n_units for a filler row
    n_units: int


def _microbatches(
    rows: Sequence[tuple[int, int]], data: TrainingSet, max_rows: int, device: str
) -> Iterator[_Microbatch]:
    """Split a logical batch: units whole, similar lengths together (padding is waste, not mechanism)."""
    by_unit: dict[int, list[int]] = {}
    for unit, row in rows:
        by_unit.setdefault(unit, []).append(row)
    groups = sorted(by_unit.values(), key=lambda group: max(len(data.input_ids[row]) for row in group))
    chunk: list[list[int]] = []
    for group in groups:
        if chunk and sum(map(len, chunk)) + len(group) > max_rows:
            yield _stack(chunk, data, device, n_rows=max_rows)
            chunk = []
        chunk.append(group)
    if chunk:
        yield _stack(chunk, data, device, n_rows=max_rows)


def _stack(groups: Sequence[Sequence[int]], data: TrainingSet, device: str, n_rows: int = 0) -> _Microbatch:
    """Pad rows to a few widths and up to ``n_rows`` with rows that have no target.

    The CPU's matrix library compiles and caches a kernel for every new shape; with a new shape per microbatch the
    quickstart grew to 3.9 GB, with these few to 1.9 GB. A filler row has no loss, so no gradient, and belongs to no
    unit.
    """
    import torch

    flat = [row for group in groups for row in group]
    n_rows = max(n_rows, len(flat))
    width = -(-max(len(data.input_ids[row]) for row in flat) // _WIDTH_STEP) * _WIDTH_STEP
    input_ids = torch.full((n_rows, width), data.pad_id, dtype=torch.long)
    labels = torch.full((n_rows, width), -100, dtype=torch.long)
    mask = torch.zeros((n_rows, width), dtype=torch.long)
    mask[len(flat) :, 0] = 1  # a row that may look at nothing would give NaN
    for position, row in enumerate(flat):
        length = len(data.input_ids[row])
        input_ids[position, :length] = torch.tensor(data.input_ids[row])
        labels[position, :length] = torch.tensor(data.labels[row])
        mask[position, :length] = 1
    return _Microbatch(
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device),
        labels=labels.to(device),
        row_weight=torch.tensor(
            [1.0 / len(group) for group in groups for _ in group] + [0.0] * (n_rows - len(flat)), device=device
        ),
        unit_of_row=torch.tensor(
            [i for i, group in enumerate(groups) for _ in group] + [len(groups)] * (n_rows - len(flat)), device=device
        ),
        n_units=len(groups),
    )


Loss = Callable[[_Microbatch], Any]


def _weighted_losses(model: Any, first_token_weight: float, batch: _Microbatch, *, autocast: bool = False) -> Any:
    import torch

    with torch.autocast(batch.input_ids.device.type, dtype=torch.bfloat16, enabled=autocast):
        losses = losses_of(
            model, batch.input_ids, batch.attention_mask, batch.labels, first_token_weight=first_token_weight
        )
    return losses * batch.row_weight


def uses_bfloat16(autocast: str, device: str) -> bool:
    """Whether matrix products run in bfloat16: 'auto' says yes where the processor has instructions for it.

    Losses, per-unit gradients, norms, clipping, noise and the adapter itself stay in fp32 (``privacy/engine.py`` folds
    and clips what the backward pass left, whatever its rounding), so the guarantee does not depend on this.
    """
    import torch

    if autocast != "auto":
        return autocast == "bfloat16"
    if device == "cpu":
        supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        return bool(supported())
    return bool(torch.cuda.is_bf16_supported())


def _private_step(optimizer: Any, batches: Iterator[_Microbatch], loss: Loss) -> None:
    from fedmentor_core.privacy.engine import private_step

    private_step(
        optimizer,
        ((batch, batch.unit_of_row, batch.n_units) for batch in batches),
        losses_of=loss,
    )


def _plain_step(optimizer: Any, batches: Iterator[_Microbatch], loss: Loss, expected_units: float) -> None:
    for batch in batches:
        (loss(batch).sum() / expected_units).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _pull_back(anchors: Sequence[Any], mu: float, optimizer: Any, *_: object) -> None:
    """Add the gradient of mu/2 ||theta - theta_global||^2 (FedProx, Li et al. 2020, arXiv 1812.06127).

    It runs as the optimizer steps: after clipping and noise, on the gradient that was released. The term is a function
    of the parameters alone, and those came from earlier releases, so the step is post-processing and the mechanism is
    the same as without it. Added before the clip it would be clipped with every unit's gradient, and bend it.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, anchor in zip(parameters, anchors, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - anchor, alpha=mu)


def _check_deadline(config: TrainingConfig, started: float, done: int, steps: int) -> None:
    if config.deadline_seconds is not None and time.monotonic() - started > config.deadline_seconds:
        raise DeadlineError(
            f"client passed its deadline of {config.deadline_seconds:g} s after {done} of {steps} steps; "
            "its update is dropped and its charge stands. Raise training.deadline_seconds or lower the steps."
        )


def _assert_moved(model: Any, before: dict[str, Any]) -> None:
    moved = max(float((p.detach() - before[name]).abs().max()) for name, p in trainable_parameters(model).items())
    if not moved > 0:
        raise FedMentorError(
            "the adapter's weights did not move after the first step: the optimizer holds stale parameters. "
            "Nothing was released."
        )
