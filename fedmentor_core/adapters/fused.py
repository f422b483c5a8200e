"""A LoRA layer's forward and backward pass as one autograd function, for training.

    y = x W^T + bias + s (x A^T) B^T

peft makes the product with B, scales it and adds it: two more tensors of the layer's width forward, two backward, and
a third sum where the two ways back to x meet. Here the low-rank product is added inside the matrix product, both ways.
The numbers are the same to rounding (under bfloat16 rounded once instead of three times), and nothing but x A^T is kept
for a trained B. ``tests/reference`` holds both to each other. Layers of another kind (a quantised base, dropout, DoRA)
stay peft's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


def fuse(model: Any, *, per_row: bool) -> list[Any]:
    """Put the function into every layer that it fits; ``unfuse`` takes it out again.

    Args:
        model: a peft model; any other module has no such layer.
        per_row: leave one gradient per row on each trained factor, as ``privacy/row_gradients.py`` says, instead of
            their sum in ``grad``.

    Returns:
        The layers that were changed.
    """
    changed = []
    for layer in model.modules():
        if _fits(layer):
            layer.forward = _FusedForward(layer, per_row)
            changed.append(layer)
    return changed


def unfuse(layers: list[Any]) -> None:
    """Give layers that ``fuse`` changed their own forward pass back."""
    for layer in layers:
        del layer.forward


@contextmanager
def fused(model: Any, *, enabled: bool = True) -> Iterator[None]:
    """While entered, the model's layers are fused for training without privacy."""
    layers = fuse(model, per_row=False) if enabled else []
    try:
        yield
    finally:
        unfuse(layers)


def keep_rows(factor: Any, gradient: Any) -> None:
    """Add a gradient per row (B, *shape) to what the factor has."""
    gradient = gradient.float()
    factor.grad_sample = gradient if factor.grad_sample is None else factor.grad_sample + gradient


def by_row(tensor: Any) -> Any:
    """(B, ..., d) as (B, T, d)."""
    return tensor if tensor.dim() == 3 else tensor.reshape(len(tensor), -1, tensor.shape[-1])


def _fits(layer: Any) -> bool:
    import torch
    from peft.tuners.lora.layer import Linear

    plain = torch.nn.Linear
    if type(layer) is not Linear or type(layer.base_layer) is not plain or "forward" in vars(layer):
        return False
    names = layer.active_adapters
    if len(names) != 1 or names[0] not in layer.lora_A or layer.merged or layer.disable_adapters or layer.lora_variant:
        return False
    inner, outer = layer.lora_A[names[0]], layer.lora_B[names[0]]
    return (
        type(inner) is plain
        and type(outer) is plain
        and inner.bias is None
        and outer.bias is None
        and type(layer.lora_dropout[names[0]]) is torch.nn.Identity
        and not any(parameter.requires_grad for parameter in layer.base_layer.parameters())
    )


class _FusedForward:
    """Stands in for the forward pass of one of peft's layers."""

    def __init__(self, layer: Any, per_row: bool) -> None:
        self._layer, self._per_row, self._name = layer, per_row, layer.active_adapters[0]

    def __call__(self, rows: Any, *arguments: Any, **options: Any) -> Any:
        import torch

        layer, name = self._layer, self._name
        inner, outer = layer.lora_A[name].weight, layer.lora_B[name].weight
        alike = rows.dtype == inner.dtype == outer.dtype == layer.base_layer.weight.dtype
        if arguments or options or not (alike or torch.is_autocast_enabled(rows.device.type)):
            return type(layer).forward(layer, rows, *arguments, **options)
        base, scale = layer.base_layer, layer.scaling[name]
        return _fused_lora().apply(rows, base.weight, base.bias, inner, outer, scale, self._per_row)


@cache
def _fused_lora() -> Any:
    """The autograd function; made at the first use, because torch takes seconds to import."""
    import torch

    def flat(tensor: Any) -> Any:
        return tensor.reshape(-1, tensor.shape[-1])

    class FusedLora(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, rows: Any, weight: Any, bias: Any, inner: Any, outer: Any, scale: float, per_row: bool
        ) -> Any:
            """Rows (B, ..., d_in), weight (d_out, d_in), inner (r, d_in), outer (d_out, r) -> (B, ..., d_out)."""
            out = torch.nn.functional.linear(rows, weight, bias)
            kind = out.dtype  # under autocast that of the products
            low = torch.nn.functional.linear(rows.to(kind), inner.to(kind))
            out.view(-1, out.shape[-1]).addmm_(flat(low), outer.t().to(kind), alpha=scale)
            ctx.save_for_backward(low if outer.requires_grad else None, rows if inner.requires_grad else None)
            ctx.layer, ctx.rows_dtype = (weight, inner, outer, scale, per_row), rows.dtype
            return out

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            """Gradients of rows and of the trained factors; per row they are left on the factors."""
            (low, rows), gradient = ctx.saved_tensors, gradients[0]
            weight, inner, outer, scale, per_row = ctx.layer
            kind, wants_rows = gradient.dtype, ctx.needs_input_grad[0]
            back = of_inner = of_outer = None
            into_low = gradient @ outer.to(kind) if wants_rows or inner.requires_grad else None
            if outer.requires_grad:
                of_outer = _gradient(gradient, low, scale, outer, per_row)
            if inner.requires_grad:
                of_inner = _gradient(into_low, rows.to(kind), scale, inner, per_row)
            if wants_rows:
                back = gradient @ weight.to(kind)
                back.view(-1, back.shape[-1]).addmm_(flat(into_low), inner.to(kind), alpha=scale)
                back = back.to(ctx.rows_dtype)
            return back, None, None, of_inner, of_outer, None, None

    def _gradient(outputs: Any, inputs: Any, scale: float, factor: Any, per_row: bool) -> Any:
        """The sum over rows; or None, and one gradient per row on the factor."""
        if per_row:
            keep_rows(factor, torch.bmm(by_row(outputs).transpose(1, 2), by_row(inputs)).mul_(scale))
            return None
        return torch.mm(flat(outputs).t(), flat(inputs)).mul_(scale).to(factor.dtype)

    return FusedLora
