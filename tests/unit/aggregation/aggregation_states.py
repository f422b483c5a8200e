"""What an adapter computes, written down slowly: what the tests of joined adapters compare with."""

from typing import Any

import torch

from fedmentor_core.adapters.lora import factor_name, modules_of


def added(state: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight matrix, fp64, without any code of the package but tensor names."""
    found = {}
    for module in modules_of(state):
        b, a = state[factor_name(module, "B")].double(), state[factor_name(module, "A")].double()
        core = state.get(factor_name(module, "R"))
        total = scale * (b if core is None else b @ core.double()) @ a
        if f"{module}.base_delta.weight" in state:
            total = total + state[f"{module}.base_delta.weight"].double()
        if f"{module}.base_delta_B.weight" in state:
            left, right = (state[f"{module}.base_delta_{side}.weight"].double() for side in "BA")
            total = total + left @ right
        found[module] = total
    return found


def same_logits(one: Any, other: Any) -> None:
    """Both models give the same logits on some tokens."""
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        left, right = one(input_ids=ids).logits, other(input_ids=ids).logits
    assert torch.allclose(left, right, atol=2e-4), float((left - right).abs().max())
