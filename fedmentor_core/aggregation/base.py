"""What must hold before an update counts, and how updates are weighed."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedmentor_core.errors import UpdateRejectedError

State = Mapping[str, Any]


@dataclass(frozen=True)
class WeightedUpdate:
    """One client's checked update and its public weight."""

    domain: str
    weight: float
    state: State


def check_update(domain: str, state: State, global_state: State, max_update_norm: float) -> None:
    """Refuse what must never enter an average.

    Args:
        domain: whose update it is (for the message).
        state: the client's trained tensors.
        global_state: the round's trained tensors, which fix names, shapes and dtypes.
        max_update_norm: largest L2 distance from the global adapter, over all tensors jointly.

    Raises:
        UpdateRejectedError: missing or unknown tensors, another shape or dtype, NaN or infinity, oversized.
    """
    import torch

    if set(state) != set(global_state):
        missing, unknown = sorted(set(global_state) - set(state)), sorted(set(state) - set(global_state))
        raise UpdateRejectedError(
            f"update of {domain!r} rejected: {len(missing)} tensors missing {missing[:2]}, "
            f"{len(unknown)} unknown {unknown[:2]}."
        )
    total = 0.0
    for name, tensor in state.items():
        expected = global_state[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise UpdateRejectedError(
                f"update of {domain!r} rejected: {name} is {tuple(tensor.shape)} {tensor.dtype}, expected "
                f"{tuple(expected.shape)} {expected.dtype}."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise UpdateRejectedError(f"update of {domain!r} rejected: {name} holds NaN or infinity.")
        total += float((tensor.double() - expected.double()).square().sum())
    if math.sqrt(total) > max_update_norm:
        raise UpdateRejectedError(
            f"update of {domain!r} rejected: L2 norm {math.sqrt(total):.4g} exceeds "
            f"aggregation.max_update_norm {max_update_norm:g}."
        )


def normalised(weights: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Weights that sum to one.

    Raises:
        ValueError: nothing to weigh, or a weight that is not positive and finite.
    """
    total = math.fsum(weights.values())
    for domain, weight in weights.items():
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"Expected weight of {domain}={weight} > 0 and finite.")
        yield domain, weight / total
