r"""Subtractive dither: a number that both sides know is added before rounding and taken off after reading.

    q = round(x + u),  y = q - u,  u uniform in (-1/2, 1/2)     E y = x,   |y - x| <= 1/2,   Var y = 1/12

The error is uniform and independent of x, whatever x is (Schuchman 1964; Gray and Stockham 1993, doi 10.1109/18.256489;
of federated updates: UVeQFed, Shlezinger et al. 2021, arXiv 2006.03262). A coin (``rounding.py``) has the same mean and
on average twice the variance: one bit less in every two numbers for the same error.

Reader and writer must draw the very same numbers on any machine and under any version. They come from NumPy's Philox,
whose integer stream is guaranteed for a seed, and are multiples of 2^-17: a code of up to seven bits less one of them
is exact in fp32, and its product with the scale is rounded once, as IEEE 754 says for all.

The dither is public and depends on nobody's data, so it is post-processing just as the coins are.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Draw = Callable[[int], Any]
"""Draws so many numbers of a dither."""


@dataclass(frozen=True)
class Dither:
    """The dither of one file.

    Attributes:
        seed: public; in the file's header.
    """

    seed: int

    def of(self, name: str, n: int) -> Any:
        """(n,) fp32 in (-1/2, 1/2): the dither of the tensor with this name, so that one can be read without others."""
        import numpy as np
        import torch

        key = int.from_bytes(hashlib.sha256(f"dither\x1f{self.seed}\x1f{name}".encode()).digest()[:16], "big")
        words = np.random.Philox(key=key).random_raw(-(-n // 4)).astype("<u8", copy=False)
        places = torch.from_numpy(words.view("<u2")[:n].astype(np.float32))
        return places.add_(0.5).mul_(2.0**-16).sub_(0.5)
