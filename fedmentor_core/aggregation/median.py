"""The rule 'median': each coordinate's median over the clients (Yin et al. 2018, arXiv 1803.01498).

The trimmed mean that cuts all but the middle: with fewer than half of the clients poisoned, each coordinate of the
result lies between the least and the greatest honest value. It bears the most poison and wastes the most: under equal
Gaussian noise its variance tends to pi / 2 times the mean's. With an even number it is the mean of the middle two.

Exactness, bytes, memory and what it means under privacy: as 'trimmed-mean'.
"""

from typing import Any

from fedmentor_core.aggregation.base import State, Updates
from fedmentor_core.aggregation.trimmed_mean import join_by_tensor
from fedmentor_core.config import AggregationConfig


class Median:
    """See the module."""

    name = "median"
    trains = frozenset({"b", "both", "alternate", "core"})
    weighs = False
    joins_products = False
    corrects_base = False
    fits_ranks = False

    def least_clients(self, settings: AggregationConfig) -> int:
        """With two the median is their mean, and bears nobody."""
        return 3

    def join(self, settings: AggregationConfig, scale: float, before: State, updates: Updates) -> dict[str, Any]:
        """The median of each coordinate."""
        return join_by_tensor(before, updates, (len(updates.weights) - 1) // 2)


RULE = Median()
