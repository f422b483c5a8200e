"""What a run has added to the frozen base: its names, its two stored forms, and how a model computes with it.

A rule such as 'fedex' corrects the frozen weight matrices. The backbone's own tensors are shared by all clients of a
process and never touched; the correction D (m x n, the scale already in it) is kept beside the adapter and added to the
output of the frozen layer, x -> W x + D x, which is W + D to rounding, also where W is bfloat16 and D is small.

Stored per adapted module, in fp32, in the smaller of two forms: thin factors ``...base_delta_B.weight`` (m, k) and
``...base_delta_A.weight`` (k, n), of no higher rank than D has; or ``...base_delta.weight`` (m, n).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal
from weakref import WeakKeyDictionary

_DELTA = re.compile(r"\.base_delta(_[AB])?\.weight$")
_SMALLEST = 1e-9  # singular values below this share of the largest are rounding of fp32 tensors
_hooks: "WeakKeyDictionary[Any, Any]" = WeakKeyDictionary()


def is_delta(name: str) -> bool:
    """Whether a tensor of this name belongs to what was added to the base."""
    return _DELTA.search(name) is not None


def delta_tensors(module: str, b: Any, a: Any) -> dict[str, Any]:
    """The stored form of D = ``b @ a`` for one module; empty where D is zero.

    Args:
        module: short name of the adapted module.
        b: (m, k).
        a: (k, n).
    """
    from fedmentor_core.adapters.low_rank import svd_of_product

    m, n = b.shape[0], a.shape[1]
    if b.shape[1] * (m + n) >= m * n:
        dense = b.double() @ a.double()
        return {f"{module}.base_delta.weight": dense.float()} if bool(dense.any()) else {}
    u, s, vt = svd_of_product(b, a)
    kept = int((s > _SMALLEST * s[0]).sum()) if len(s) else 0
    if kept == 0:
        return {}
    root = s[:kept].sqrt()
    return {
        f"{module}.base_delta_B.weight": (u[:, :kept] * root).float().contiguous(),
        f"{module}.base_delta_A.weight": (vt[:kept] * root[:, None]).float().contiguous(),
    }


def largest_delta(
    module: str, m: int, n: int, *, columns: int, kept: int
) -> dict[str, tuple[Literal["F32"], tuple[int, int]]]:
    """Type and shape, by name, of the most that ``delta_tensors`` stores for one module.

    Args:
        module: short name of the adapted module.
        m: rows of its weight matrix.
        n: columns of it.
        columns: k of the factors that it is given, at most.
        kept: rank of their product, at most.
    """
    if columns * (m + n) >= m * n:
        return {f"{module}.base_delta.weight": ("F32", (m, n))}
    k = min(kept, m, n)
    return {f"{module}.base_delta_B.weight": ("F32", (m, k)), f"{module}.base_delta_A.weight": ("F32", (k, n))}


def delta_factors(state: Mapping[str, Any], module: str) -> tuple[Any, Any] | None:
    """D of one module as (m, k) and (k, n) with ``b @ a`` = D; None where nothing was added."""
    import torch

    dense = state.get(f"{module}.base_delta.weight")
    if dense is not None:
        return dense, torch.eye(dense.shape[1], dtype=dense.dtype)
    b = state.get(f"{module}.base_delta_B.weight")
    return None if b is None else (b, state[f"{module}.base_delta_A.weight"])


def apply_deltas(layers: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Let each frozen layer compute with what ``state`` adds to it, and with nothing that was added before.

    Args:
        layers: the frozen linear layers of one model by short module name; they belong to this model alone.
        state: tensors of an adapter; all but those of ``is_delta`` are ignored.
    """
    for module, layer in layers.items():
        earlier = _hooks.pop(layer, None)
        if earlier is not None:
            earlier.remove()
        if any(f"{module}.base_delta{form}.weight" in state for form in ("", "_B")):
            _hooks[layer] = layer.register_forward_hook(_adding(state, module, layer.weight.device))


def _adding(state: Mapping[str, Any], module: str, device: Any) -> Callable[[Any, tuple[Any, ...], Any], Any]:
    from torch.nn.functional import linear

    names = ("base_delta",) if f"{module}.base_delta.weight" in state else ("base_delta_A", "base_delta_B")
    matrices = [state[f"{module}.{name}.weight"].detach().to(device) for name in names]

    def add(layer: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        added = inputs[0].to(matrices[0].dtype)
        for matrix in matrices:
            added = linear(added, matrix)
        return output + added.to(output.dtype)

    return add
