"""The rule 'trimmed-mean': each coordinate's mean without its extreme values (Yin et al. 2018, arXiv 1803.01498).

Of every coordinate the ``trim_clients`` largest and smallest values are left out. With at most so many poisoned
clients each coordinate of the result lies between the least and the greatest value of the honest clients, whatever the
poisoned ones send: their influence is bounded. The price is that honest extremes are left out too.

Exactness: none is claimed. It is a robust estimate of a mean, per coordinate of the trained factor; where one factor is
trained and shared the product is linear in it, so the bound carries over to the update. Clients count the same, because
a poisoned client would claim many units.

Cost: bytes as 'fedavg'. Memory: one tensor of every client at a time, read from files on disk, so it grows with the
number of clients but not with the adapter times the number of clients.

Under privacy: post-processing. Noise makes honest clients differ more, so a poisoned one hides more easily; the bound
holds all the same, around noisier values.
"""

from typing import Any

from fedmentor_core.aggregation.base import State, Updates
from fedmentor_core.config import AggregationConfig


def trimmed_mean(values: Any, trim: int) -> Any:
    """Mean over the clients without the ``trim`` least and greatest of each coordinate.

    Args:
        values: (clients, ...) with more than ``2 * trim`` clients.
        trim: how many to cut at each end.

    Raises:
        ValueError: nothing would be left.
    """
    if not 0 <= 2 * trim < len(values):
        raise ValueError(f"Expected more than {2 * trim} clients to trim {trim} at each end, got {len(values)}.")
    return values.sort(dim=0).values[trim : len(values) - trim].mean(dim=0)


def join_by_tensor(before: State, updates: Updates, trim: int) -> dict[str, Any]:
    """``trimmed_mean`` of one tensor after another, in fp64."""
    import torch

    joined = {}
    for name, tensor in before.items():
        values = torch.stack([one.state[name].double() for one in updates.only([name])])
        joined[name] = trimmed_mean(values, trim).to(tensor.dtype)
    return joined


class TrimmedMean:
    """See the module."""

    name = "trimmed-mean"
    trains = frozenset({"b", "both", "alternate", "core"})
    weighs = False
    joins_products = False
    corrects_base = False
    fits_ranks = False

    def least_clients(self, settings: AggregationConfig) -> int:
        """One value must be left after trimming."""
        return 2 * settings.trim_clients + 1

    def join(self, settings: AggregationConfig, scale: float, before: State, updates: Updates) -> dict[str, Any]:
        """The trimmed mean of each coordinate."""
        return join_by_tensor(before, updates, settings.trim_clients)


RULE = TrimmedMean()
