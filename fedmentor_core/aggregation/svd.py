"""The rule 'svd': the best low-rank factors of the mean product (FlexLoRA, Bai et al. 2024, arXiv 2402.11505).

For each adapted matrix the server takes the mean of the clients' products and factorises it anew:

    sum_i w_i B_i A_i  =  U S V^T,        B = U_r sqrt(S_r),   A = sqrt(S_r) V_r^T.

Exactness: exact up to the truncation, and no factors of rank r come closer in the Frobenius or the spectral norm
(Eckart and Young 1936); what is lost is the tail of the singular values. Clients may have ranks of their own
(``domains.N.rank``): the directions are in order of importance, so a client of rank r_i trains the first r_i of them,
which are the best approximation of its rank.

Cost for an m x n matrix, in numbers: r_i (m + n) up, r (m + n) down (a client of lower rank drops what it does not
train). Memory: one matrix's factors of every client at a time, read from files on disk; the m x n mean itself is formed
only where the clients' ranks add up to min(m, n).

Under privacy: post-processing. The noise of both factors is part of the products, and truncation removes what of it
lies outside the first r directions; but the largest directions of noise are kept like signal.
"""

from typing import Any

from fedmentor_core.adapters.lora import factor_name, modules_of
from fedmentor_core.adapters.low_rank import best_factors, stacked
from fedmentor_core.aggregation.base import State, Updates
from fedmentor_core.config import AggregationConfig


class SvdRefactorisation:
    """See the module."""

    name = "svd"
    trains = frozenset({"both"})
    weighs = True
    joins_products = True
    corrects_base = False
    fits_ranks = True

    def least_clients(self, settings: AggregationConfig) -> int:
        """One product is its own mean."""
        return 1

    def join(self, settings: AggregationConfig, scale: float, before: State, updates: Updates) -> dict[str, Any]:
        """The best factors of each matrix's mean product; a direction that has died out gets its old row of A back."""
        joined: dict[str, Any] = {}
        for module in modules_of(before):
            a_name, b_name = factor_name(module, "A"), factor_name(module, "B")
            parts = [(one.weight, one.state[b_name], one.state[a_name]) for one in updates.only([a_name, b_name])]
            old_a, old_b = before[a_name], before[b_name]
            b, a = best_factors(*stacked(parts), rank=len(old_a))
            # With B and A both zero neither would ever get a gradient; with B zero the product is the same.
            dead = a.square().sum(dim=1) <= 1e-24 * a.square().sum(dim=1).max()
            a[dead], b[:, dead] = old_a.double()[dead], 0.0
            joined |= {a_name: a.to(old_a.dtype), b_name: b.to(old_b.dtype)}
        return joined


RULE = SvdRefactorisation()
