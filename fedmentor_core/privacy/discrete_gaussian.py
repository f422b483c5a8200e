r"""Exact samples of the discrete Gaussian: noise on integers, by integer arithmetic alone.

    P[X = x] = exp(-x^2 / (2 scale^2)) / sum_y exp(-y^2 / (2 scale^2))        x, y any integers

Canonne, Kamath and Steinke 2020 (arXiv 2004.00010): added to an integer vector whose neighbours are at most Delta
apart in L2, it costs the same RDP at every order as the continuous Gaussian, alpha * Delta^2 / (2 scale^2). No real
number is ever rounded, so nothing hides in the low bits of a floating-point sum, where a sampled normal variable
betrays what it was added to (Mironov 2012; Holohan and Braghin 2021).
"""

import random


def secret_dice() -> random.Random:
    """A source of numbers that nobody else can reproduce: the system's entropy, no state and no seed."""
    return random.SystemRandom()


def sample(scale: int, dice: random.Random) -> int:
    """One sample, exact (their algorithm 3: reject from a discrete Laplace of about the same width).

    Args:
        scale: the distribution's scale parameter; its standard deviation is that, to within 1e-8 from 2 up.
        dice: ``secret_dice()``, or a seeded generator in tests.

    Raises:
        ValueError: a scale below 1.
    """
    if scale < 1:
        raise ValueError(f"Expected scale={scale} >= 1.")
    width = scale + 1
    while True:
        candidate = _laplace(width, dice)
        excess = abs(candidate) * width - scale * scale
        if _happens(excess * excess, 2 * scale * scale * width * width, dice):
            return candidate


def _laplace(width: int, dice: random.Random) -> int:
    """Discrete Laplace: P[X = x] proportional to exp(-|x| / width)."""
    while True:
        remainder = dice.randrange(width)
        if not _happens(remainder, width, dice):
            continue
        whole = 0
        while _happens(1, 1, dice):
            whole += 1
        magnitude = whole * width + remainder
        negative = dice.randrange(2) == 1
        if not (negative and magnitude == 0):  # zero would be counted twice
            return -magnitude if negative else magnitude


def _happens(numerator: int, denominator: int, dice: random.Random) -> bool:
    """True with probability exp(-numerator / denominator), exactly (their algorithm 1)."""
    for _ in range(numerator // denominator):
        if not _happens_below_one(1, 1, dice):
            return False
    return _happens_below_one(numerator % denominator, denominator, dice)


def _happens_below_one(numerator: int, denominator: int, dice: random.Random) -> bool:
    """The same for an exponent of at most one: the alternating series of exp, one term a toss."""
    tosses = 1
    while dice.randrange(denominator * tosses) < numerator:
        tosses += 1
    return tosses % 2 == 1
