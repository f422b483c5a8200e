r"""RDP of one Poisson-sampled Gaussian step, by the series that Opacus computes and equal to it to the last bit.

Mironov et al. 2019 (arXiv 1908.10530), section 3.3.

With A(alpha) the alpha-th moment of the likelihood ratio of N(0, sigma^2) with and without sampling at rate q,

    RDP(alpha) = log A(alpha) / (alpha - 1)
    A(alpha)   = sum_k binom(alpha, k) (1 - q)^(alpha - k) q^k exp((k^2 - k) / (2 sigma^2))       for a whole alpha

and two such series with a normal tail in each term for any other. The operations and their order are those of
``opacus.accountants.analysis.rdp`` (Apache-2.0, after TensorFlow Privacy), so the numbers are the same to the last bit
and so is every charge in a ledger; ``tests/reference/test_sampled_gaussian.py`` holds it to that. It is written out
here because importing Opacus imports torch, which no plan needs, and because what does not depend on the noise
(binomials and powers of q) is looked up while a noise multiplier is searched.
"""

import math
from functools import lru_cache
from itertools import count

_LOG_2, _LOG_HALF, _SQRT_2 = math.log(2), math.log(0.5), 2**0.5
_SMALL = -30.0
"""Log of a term after which the series of a fractional order stops."""
_AT_ONCE = 16  # terms whose tails are computed in one call


def sampled_gaussian_rdp(noise_multiplier: float, sample_rate: float, order: float) -> float:
    """RDP of one step.

    Args:
        noise_multiplier: sigma, above 0.
        sample_rate: q, above 0; 1: every unit takes part.
        order: alpha, above 1.

    Raises:
        ArithmeticError: so little noise that its square, or a term, is beyond what a float holds.
    """
    if sample_rate == 1.0:
        return order / (2 * noise_multiplier**2)
    if order.is_integer():
        return _log_moment_at_whole(sample_rate, noise_multiplier, int(order)) / (order - 1)
    return _log_moment_between(sample_rate, noise_multiplier, order) / (order - 1)


def _log_moment_at_whole(q: float, sigma: float, order: int) -> float:
    total = -math.inf
    twice_variance = 2 * (sigma**2)
    for i, log_weight in enumerate(_whole_weights(q, order)):
        total = _log_add(total, log_weight + (i * i - i) / twice_variance)
    return total


@lru_cache(maxsize=4_096)
def _whole_weights(q: float, order: int) -> tuple[float, ...]:
    log_q, log_rest = math.log(q), math.log(1 - q)
    return tuple(_binomial(float(order), i)[0] + i * log_q + (order - i) * log_rest for i in range(order + 1))


def _log_moment_between(q: float, sigma: float, order: float) -> float:
    from scipy.special import log_ndtr

    low = high = -math.inf  # the parts of the integral below and above z
    z = sigma**2 * math.log(1 / q - 1) + 0.5
    twice_variance, width = 2 * (sigma**2), math.sqrt(2) * sigma
    for start in count(0, _AT_ONCE):
        terms = _weights_between(q, order, start)
        where = [-((i - z) / width) * _SQRT_2 for i, *_ in terms] + [-((z - j) / width) * _SQRT_2 for _, j, *_ in terms]
        tails = log_ndtr(where).tolist()
        for (i, j, below, above, positive), left, right in zip(terms, tails, tails[_AT_ONCE:], strict=False):
            below = below + (i * i - i) / twice_variance + (_LOG_HALF + (_LOG_2 + left))
            above = above + (j * j - j) / twice_variance + (_LOG_HALF + (_LOG_2 + right))
            join = _log_add if positive else _log_sub
            low, high = join(low, below), join(high, above)
            if max(below, above) < _SMALL:
                return _log_add(low, high)
    raise AssertionError("unreachable")


@lru_cache(maxsize=8_192)
def _weights_between(q: float, order: float, start: int) -> list[tuple[int, float, float, float, bool]]:
    """Of the terms from ``start`` on: i, alpha - i, the log weights below and above z, and the sign."""
    log_q, log_rest = math.log(q), math.log(1 - q)
    found = []
    for i in range(start, start + _AT_ONCE):
        (log_weight, positive), j = _binomial(order, i), order - i
        below, above = log_weight + i * log_q + j * log_rest, log_weight + j * log_q + i * log_rest
        found.append((i, j, below, above, positive))
    return found


@lru_cache(maxsize=65_536)
def _binomial(order: float, i: int) -> tuple[float, bool]:
    """Log of the magnitude of binom(order, i), and whether it is above zero."""
    from scipy.special import binom

    value = float(binom(order, i))
    return math.log(abs(value)), value > 0


def _log_add(log_x: float, log_y: float) -> float:
    small, large = min(log_x, log_y), max(log_x, log_y)
    if small == -math.inf:
        return large
    return math.log1p(math.exp(small - large)) + large


def _log_sub(log_x: float, log_y: float) -> float:
    if log_x < log_y:
        raise ValueError("Expected a difference that is not negative.")
    if log_y == -math.inf:
        return log_x
    if log_x == log_y:
        return -math.inf
    try:
        return math.log(math.expm1(log_x - log_y)) + log_y
    except OverflowError:
        return log_x
