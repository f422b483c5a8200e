r"""The server's step: take the joined adapter as it is, or move along the change with momentum or Adam.

With theta the round's global adapter and Delta = joined - theta the mean change, minus a pseudo-gradient (momentum as
FedAvgM, Hsu et al. 2019, arXiv 1909.06335; Adam as FedAdam, Reddi et al. 2021, arXiv 2003.00295, no bias correction):

    momentum:  m <- beta1 m + Delta                    theta <- theta + eta m
    adam:      m <- beta1 m + (1 - beta1) Delta
               v <- beta2 v + (1 - beta2) Delta^2      theta <- theta + eta m / (sqrt(v) + tau)

The memory (m, v) is per trained tensor, in fp64, starts at zero (v at tau^2, as in the paper) and is stored with the
round's adapter as an object that the adapter object names by its sha256. So a resumed run steps as one that was never
interrupted, and what is not committed leaves no trace. Where rounds alternate between factors, each factor's memory
moves in the rounds that train it.

Exactness: the step is no mean any more, by intention. Cost: nothing is sent to clients; the server keeps one
('momentum') or two ('adam') adapters in fp64. Under privacy: post-processing, like all that the server does; note that
Adam scales every coordinate to about eta, so that one with nothing but noise moves as far as one with signal.
"""

from collections.abc import Mapping
from typing import Any

from fedmentor_core.aggregation.base import State
from fedmentor_core.config import AggregationConfig
from fedmentor_core.wire.codecs import Layout, Shape

_DEFAULT_RATE = {"momentum": 1.0, "adam": 0.01}


def server_step(
    settings: AggregationConfig, before: State, joined: State, memory: State
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One step of the configured server optimiser.

    Args:
        settings: the aggregation section; ``server`` is 'momentum' or 'adam'.
        before: the round's trained tensors.
        joined: what the rule made of the updates.
        memory: what the last step left; empty before the first.

    Returns:
        The next trained tensors, in their dtypes, and the memory, fp64; that of tensors not in ``before`` is kept.
    """
    import torch

    rate = settings.server_learning_rate or _DEFAULT_RATE[settings.server]
    after: dict[str, Any] = {}
    kept = dict(memory)
    for name, old in before.items():
        change = joined[name].double() - old.double()
        first, second = f"momentum.{name}", f"second.{name}"
        mean = memory.get(first, torch.zeros_like(change))
        if settings.server == "momentum":
            kept[first] = settings.server_momentum * mean + change
            step = kept[first]
        else:
            tau = settings.server_adaptivity
            square = memory.get(second, torch.full_like(change, tau**2))
            kept[first] = settings.server_momentum * mean + (1 - settings.server_momentum) * change
            kept[second] = settings.server_beta2 * square + (1 - settings.server_beta2) * change.square()
            step = kept[first] / (kept[second].sqrt() + tau)
        after[name] = (old.double() + rate * step).to(old.dtype)
    return after, kept


def memory_layout(settings: AggregationConfig, shapes: Mapping[str, Shape]) -> Layout:
    """How the memory is stored after steps on tensors with these shapes; empty without a server optimiser."""
    kinds = {"none": (), "momentum": ("momentum",), "adam": ("momentum", "second")}[settings.server]
    return {f"{kind}.{name}": ("F64", shape) for kind in kinds for name, shape in shapes.items()}
