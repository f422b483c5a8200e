"""One gradient per row of the batch, for the linear layers of an adapter, in the one backward pass that training makes.

A linear layer's gradient for row n is ``G_n^T X_n`` (Goodfellow 2015, arXiv 1510.01799), with X_n (T, d_in) what went
in and G_n (T, d_out) the gradient of what came out. Autograd holds both at the moment it would sum them over rows. For
a factor of rank r the result has r d_in or r d_out numbers, at 512 tokens and rank 16 some 30 times fewer than X_n and
G_n, so it is formed there and then and kept until the unit's norm over all tensors is known. Nothing else is stored: no
second copy of activations, as hooks keep; and there is no second pass, as ghost clipping makes.

It is an autograd function and not a hook: under activation checkpointing a layer runs forward twice and backward once,
and only the backward counts here.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

from fedmentor_core.adapters.fused import by_row, fuse, keep_rows, unfuse
from fedmentor_core.errors import FedMentorError


class RowGradients:
    """A model whose backward pass leaves ``grad_sample`` on its trained parameters: (rows, *shape), fp32; no ``grad``.

    Call it in place of the model; ``to_standard_module`` gives the model back as it was. Every trained layer must see
    the batch's rows along its input's first dimension.

    Raises:
        FedMentorError: a trained parameter is not the weight of exactly one linear layer without bias.
    """

    def __init__(self, model: Any) -> None:
        """Take over the trained layers' forward pass."""
        self._module = model
        self._layers: list[Any] = list(_trained_layers(model))
        for layer in self._layers:
            layer.weight.grad_sample = None
            layer.forward = _RowLinear(layer.weight)
        self._fused = fuse(model, per_row=True)  # where it fits, one function does the whole LoRA layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own answer."""
        return self._module(*args, **kwargs)

    def train(self) -> "RowGradients":
        """Put the model in training mode."""
        self._module.train()
        return self

    def to_standard_module(self) -> Any:
        """Take everything back that this object put into the model."""
        for layer in self._layers:
            del layer.forward
            del layer.weight.grad_sample
        unfuse(self._fused)
        self._layers, self._fused = [], []
        return self._module


def _trained_layers(model: Any) -> Iterator[Any]:
    import torch

    left = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found: list[Any] = []
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.bias is None and left.pop(id(module.weight), None) is not None:
            found.append(module)
    if left:
        raise FedMentorError(
            f"{sorted(left.values())[:3]} would be trained under privacy, but gradients per row are formed only for "
            "weights of linear layers without bias. Correct adapter.target_modules."
        )
    yield from found


class _RowLinear:
    """Stands in for ``torch.nn.Linear.forward``."""

    def __init__(self, weight: Any) -> None:
        self._weight = weight

    def __call__(self, rows: Any) -> Any:
        return _row_linear().apply(rows, self._weight)


@cache
def _row_linear() -> Any:
    """The autograd function; made at the first use, because torch takes seconds to import."""
    import torch

    class RowLinear(torch.autograd.Function):
        """``rows @ weight.T``; in backward the weight gets one gradient per row instead of their sum."""

        @staticmethod
        def forward(ctx: Any, rows: Any, weight: Any) -> Any:
            """Rows (B, ..., d_in), weight (d_out, d_in) -> (B, ..., d_out)."""
            ctx.save_for_backward(rows)
            ctx.weight = weight
            return torch.nn.functional.linear(rows, weight)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> tuple[Any, None]:
            """Gradient (B, ..., d_out) -> that of rows; ``weight.grad_sample`` grows by (B, d_out, d_in)."""
            (rows,), weight, gradient = ctx.saved_tensors, ctx.weight, gradients[0]
            kind = gradient.dtype  # under autocast the products run in its precision, as the layer's own would
            keep_rows(weight, torch.bmm(by_row(gradient).transpose(1, 2), by_row(rows).to(kind)))
            back = (gradient @ weight.to(kind)).to(rows.dtype) if ctx.needs_input_grad[0] else None
            return back, None

    return RowLinear
