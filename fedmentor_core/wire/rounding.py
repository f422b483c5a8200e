r"""Stochastic rounding: up or down by a coin, so that the mean of what is written is what was meant.

    Q(x) = floor(x) + [u < x - floor(x)],  u uniform in [0, 1)     E Q(x) = x,   |Q(x) - x| < 1,   Var Q(x) <= 1/4

(Connolly, Higham and Mary 2021, doi 10.1137/20M1334796; of quantised updates: QSGD, Alistarh et al. 2017, arXiv
1610.02132). Rounding to nearest would lose a change of less than half a step in every round anew; this one keeps it on
average, and the errors of several clients average out.

The coins are no secret and need none. What is rounded was noised and charged before, so whatever is done with it,
with coins that anybody may know but that do not depend on private data, is post-processing (Dwork and Roth 2014,
proposition 2.1): it costs no privacy. So the coins come from the study's seed, and a run can be repeated.
"""

from typing import Any


def coins(seed: int) -> Any:
    """A generator of coins, the same for the same seed; fit for rounding, never for noise."""
    import torch

    return torch.Generator().manual_seed(seed)


def round_by_coin(values: Any, generator: Any) -> Any:
    """Round each number of an fp32 tensor up or down, to a new tensor; whole numbers stay what they are.

    Args:
        values: fp32, of magnitudes below 2^23.
        generator: from ``coins``.
    """
    import torch

    below = values.floor()
    up = torch.rand(values.shape, generator=generator) < values - below
    return below.add_(up)


def to_bfloat16_by_coin(values: Any, generator: Any) -> Any:
    """Round fp32 to one of the two neighbouring bfloat16 numbers, each as likely as it is near; exact where it can be.

    bfloat16 is the upper half of fp32, so a uniform number is added to the lower half and that half dropped. NaN and
    infinity stay what they are.
    """
    import torch

    bits = values.float().contiguous().view(torch.int32)
    coin = torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32)
    rounded = ((bits + coin) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(torch.isfinite(values), rounded, values.bfloat16())
