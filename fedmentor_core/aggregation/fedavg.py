"""The rule 'fedavg': weighted mean of the trained adapter tensors (McMahan et al. 2017, arXiv 1602.05629), streamed.

Exactness: where a round trains one factor and the others are common, the mean of that factor IS the mean of the
updates, because the product is linear in it. So it is exact for FFA-LoRA (``adapter.train`` 'b', the default; Sun et
al. 2024, arXiv 2403.12313), for RoLoRA ('alternate'; Chen et al. 2024, arXiv 2409.02346) and for Fed-SB ('core';
Singhal et al. 2025, arXiv 2502.15436). With both factors trained (FedIT) it is not:

    sum_i w_i B_i A_i - Bbar Abar = sum_i w_i (B_i - Bbar)(A_i - Abar).

Cost for an m x n matrix and rank r, in numbers each way: r m for 'b', r m or r n for 'alternate', r^2 for 'core',
r (m + n) for 'both'. Memory: sums in fp64, which are two adapters in fp32, and a few pieces of the update that is being
read, whatever the number of clients (``arriving.py``).

Under privacy: the noise of the mean is the mean of the noises. With 'both' the product of two noised factors also
holds the product of their noises, which no clip bounds.
"""

from collections.abc import Iterable
from typing import Any

from fedmentor_core.aggregation.base import ArrivingUpdate, State, Updates, WeightedUpdate
from fedmentor_core.aggregation.blocks import add
from fedmentor_core.config import AggregationConfig


class WeightedMean:
    """A weighted mean that grows by one tensor at a time: fp64 sums, whatever the number of clients.

    Each number is added as weight times number in fp64, client after client, so the result does not depend on how the
    updates are read.
    """

    def __init__(self, global_state: State) -> None:
        """Nothing is added yet; ``global_state`` gives names, shapes and dtypes."""
        self._like = global_state
        self._sums: dict[str, Any] = {}
        self._total = 0.0

    def add(self, weight: float, tensors: Iterable[tuple[str, Any]]) -> None:
        """Add one client's update. Where ``tensors`` raises, the mean is spoilt and must not be used."""
        import torch

        self._total += weight
        for name, tensor in tensors:
            if name in self._sums:
                add(self._sums[name], tensor, weight)
            else:  # the first update makes the sums: writing zeros first would be one more pass over all of them
                self._sums[name] = tensor.to(torch.float64, copy=True).mul_(weight)
            del tensor  # it keeps a piece of its update in memory while the next one is waited for

    def result(self) -> dict[str, Any]:
        """The mean, in the global state's dtypes.

        Raises:
            ValueError: the weights do not sum to one.
        """
        if abs(self._total - 1.0) > 1e-9:
            raise ValueError(f"Expected weights to sum to 1, got {self._total}.")
        return {name: self._sums.pop(name).to(like.dtype) for name, like in self._like.items()}


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
    mean = WeightedMean(global_state)
    for update in updates:
        mean.add(update.weight, update.state.items())
        del update  # not two in memory while the next is read
    return mean.result()


class FedAvg:
    """See the module."""

    name = "fedavg"
    trains = frozenset({"b", "both", "alternate", "core"})
    weighs = True
    joins_products = False
    corrects_base = False
    fits_ranks = False

    def least_clients(self, settings: AggregationConfig) -> int:
        """One update is its own mean."""
        return 1

    def join(self, settings: AggregationConfig, scale: float, before: State, updates: Updates) -> dict[str, Any]:
        """The mean of each tensor."""
        return fedavg(before, updates.stream())

    def join_arriving(self, before: State, updates: Iterable[ArrivingUpdate]) -> dict[str, Any]:
        """The mean of each tensor, of updates that are still being read."""
        mean = WeightedMean(before)
        for update in updates:
            mean.add(update.weight, update.tensors)
        return mean.result()


RULE = FedAvg()
