"""The rule 'fedex': average both factors, and put what that misses into the base (Singhal et al., arXiv 2410.09432).

With both factors trained the mean of the factors is not the mean of the products. FedEx-LoRA adds the difference to the
frozen weight matrix, with s = alpha / r:

    W  <-  W + s ( sum_i w_i B_i A_i - Bbar Abar )  =  W + s sum_i w_i (B_i - Bbar)(A_i - Abar).

The right side is what is computed: K clients give factors of rank at most K r, and small differences are not taken
between large numbers.

Exactness: W + s Bbar Abar is the mean of the clients' models, to fp32 rounding. The base itself changes, so it has
versions: what was added since the first round is one immutable object (``adapters/base_delta.py``) that the adapter
object names by its sha256. Clients, evaluation and the registered model all load it from there, and the lineage of a
registered model names it.

Cost for an m x n matrix, in numbers: r (m + n) up; r (m + n) plus what was added down, which grows by K r (m + n) a
round until m n, from where it is stored dense. Memory: one matrix's factors of every client at a time, read from files
on disk.

Under privacy: post-processing. It is exact for the noised products, so it also keeps the product of the noises of A and
B, which FFA-LoRA does not have.
"""

from typing import Any

from fedmentor_core.adapters.base_delta import delta_factors, delta_tensors
from fedmentor_core.adapters.lora import factor_name, modules_of
from fedmentor_core.adapters.low_rank import stacked
from fedmentor_core.aggregation.base import State, Updates
from fedmentor_core.config import AggregationConfig


class FedEx:
    """See the module."""

    name = "fedex"
    trains = frozenset({"both"})
    weighs = True
    joins_products = True
    corrects_base = True
    fits_ranks = False

    def least_clients(self, settings: AggregationConfig) -> int:
        """One client's product is the mean, and nothing is left for the base."""
        return 1

    def join(self, settings: AggregationConfig, scale: float, before: State, updates: Updates) -> dict[str, Any]:
        """The mean factors of each matrix, and what is added to its base since the first round."""
        joined: dict[str, Any] = {}
        for module in modules_of(before):
            a_name, b_name = factor_name(module, "A"), factor_name(module, "B")
            parts = updates.only([a_name, b_name])
            mean_a = sum(one.weight * one.state[a_name].double() for one in parts)
            mean_b = sum(one.weight * one.state[b_name].double() for one in parts)
            missed = [
                (scale * one.weight, one.state[b_name].double() - mean_b, one.state[a_name].double() - mean_a)
                for one in parts
            ]
            so_far = delta_factors(before, module)
            added = missed if so_far is None else [(1.0, *so_far), *missed]
            joined |= {a_name: mean_a.to(before[a_name].dtype), b_name: mean_b.to(before[b_name].dtype)}
            joined |= delta_tensors(module, *stacked(added))
        return joined


RULE = FedEx()
