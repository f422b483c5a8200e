"""FedAvg over the trained adapter tensors (McMahan et al. 2017, arXiv 1602.05629), streamed.

Exactness: with one factor frozen and shared (FFA-LoRA, the default) the mean of the B factors IS the mean of the
updates B A. With both factors trained it is not: sum_i w_i B_i A_i - Bbar Abar = sum_i w_i (B_i - Bbar)(A_i - Abar).

Cost: two adapters in memory whatever the number of clients; sums in fp64.
"""

from collections.abc import Iterable
from typing import Any

from fedmentor_core.aggregation.base import State, WeightedUpdate


def fedavg(global_state: State, updates: Iterable[WeightedUpdate]) -> dict[str, Any]:
    """Weighted mean of the updates.

    Args:
        global_state: names, shapes and dtypes of the trained tensors.
        updates: checked updates whose weights sum to one; consumed one at a time.

    Returns:
        The mean, in the global state's dtypes.

    Raises:
        ValueError: the weights do not sum to one.
    """
    import torch

    sums = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in global_state.items()}
    total = 0.0
    for update in updates:
        total += update.weight
        for name, tensor in update.state.items():
            sums[name].add_(tensor.double(), alpha=update.weight)
    if abs(total - 1.0) > 1e-9:
        raise ValueError(f"Expected weights to sum to 1, got {total}.")
    return {name: value.to(global_state[name].dtype) for name, value in sums.items()}
