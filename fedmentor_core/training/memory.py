"""How much memory a client's step needs, found by taking that step on tensors that have shapes and no contents.

Under torch's ``FakeTensorMode`` every operation runs and none computes, so a 1.7B model takes seconds and no memory.
Each storage that an operation makes is counted until it is dropped; the most at once is the peak. What torch takes
beside tensors (a GPU's context, the allocator's gaps, the workspace of matrix libraries) is not in it.
"""

import weakref
from dataclasses import dataclass
from typing import Any, Self

from fedmentor_core.adapters.fused import fused
from fedmentor_core.privacy.row_gradients import RowGradients
from fedmentor_core.training.checkpointing import checkpointing
from fedmentor_core.training.target_loss import target_losses


@dataclass(frozen=True)
class StepShape:
    """What a step's memory depends on, beside the model.

    Attributes:
        rows: of a microbatch; how many microbatches a logical batch has changes nothing.
        tokens: of a row.
        target_tokens: of a row, at its end; logits are computed for these alone.
        private: whether gradients are kept per row.
        bfloat16: whether products run under autocast.
        checkpointed: ``training.activation_checkpointing``.
    """

    rows: int
    tokens: int
    target_tokens: int
    private: bool = True
    bfloat16: bool = True
    checkpointed: bool = False


def predicted_peak_bytes(model: Any, shape: StepShape) -> tuple[int, int]:
    """Bytes held by weights, and most bytes at once while a step is taken (the weights included).

    It is the step of ``training/client.py`` with what depends on contents taken out: which tokens are targets, and
    which units' gradients are finite.

    Args:
        model: a peft model on the device 'meta'; it is spoilt.
        shape: of the step.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        _without_contents(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        wrapped = RowGradients(model) if shape.private else model
        wrapped.train()
        followed = PeakBytes(*model.parameters(), *model.buffers())
        held = followed.now
        with followed, checkpointing(model, enabled=shape.checkpointed), fused(model, enabled=not shape.private):
            _loss(model, shape).backward()
            if shape.private:
                _clip(trained, shape.rows)
            optimizer.step()
    return held, followed.peak


def _loss(model: Any, shape: StepShape) -> Any:
    import torch

    ids = torch.zeros((shape.rows, shape.tokens), dtype=torch.long)
    base = model.get_base_model()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=shape.bfloat16):
        hidden = base.base_model(input_ids=ids, use_cache=False)[0]
    wanted = hidden[:, -shape.target_tokens - 1 : -1].reshape(-1, hidden.shape[-1])
    head = base.get_output_embeddings()
    logits = head(wanted.to(head.weight.dtype)).float()
    return target_losses(logits, ids[:, -shape.target_tokens :].reshape(-1)).sum()


def _clip(trained: list[Any], rows: int) -> None:
    """Gather the gradients per row, as ``privacy/engine.py`` does, and leave their sum."""
    import torch

    sizes = [parameter.numel() for parameter in trained]
    units: Any = torch.empty((rows, sum(sizes)))
    for parameter, columns in zip(trained, units.split(sizes, dim=1), strict=True):
        columns.copy_(parameter.grad_sample.flatten(1))
        parameter.grad_sample = None
    summed: Any = torch.ones(rows) @ units
    for parameter, part in zip(trained, summed.split(sizes), strict=True):
        parameter.grad = part.view_as(parameter)


class PeakBytes:
    """While entered, follows the bytes of all tensors that are made, beside those that were counted before."""

    def __init__(self, *held: Any) -> None:
        """Count ``held`` as there already: tensors, such as a model's parameters."""
        self.now = 0
        self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()
        self._mode: Any = None
        self._count(held)

    def __enter__(self) -> Self:
        from torch.utils._python_dispatch import TorchDispatchMode

        count = self._count

        class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                made = func(*args, **(kwargs or {}))
                count(made)
                return made

        make: Any = Mode
        self._mode = make()
        self._mode.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._mode.__exit__(*raised)

    def _count(self, tensors: Any) -> None:
        import torch
        from torch.utils._pytree import tree_leaves

        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage in self._seen:
                continue
            self._seen.add(storage)
            n_bytes = storage.nbytes()
            self.now += n_bytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, n_bytes)

    def _drop(self, n_bytes: int) -> None:
        self.now -= n_bytes


def _without_contents(model: Any) -> None:
    """Replace parameters and buffers by fake ones of the same shapes."""
    import torch

    def replace(module: Any) -> None:
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                held[name] = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty

    model.apply(replace)
    model.get_base_model().tie_weights()
