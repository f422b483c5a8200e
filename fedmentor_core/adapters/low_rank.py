"""Singular values of a product of thin factors, without forming the product where the factors are thin.

B (m x k) and A (k x n): with QR of both, B A = Q_B (R_B R_A^T) Q_A^T, and the singular value decomposition of the small
k x k matrix gives that of the product. Time O(k^2 (m + n) + k^3) instead of O(m n min(m, n)). All in fp64.
"""

from collections.abc import Sequence
from typing import Any


def svd_of_product(b: Any, a: Any) -> tuple[Any, Any, Any]:
    """Thin singular value decomposition of ``b @ a``, with signs fixed so that equal inputs give equal factors.

    Args:
        b: (m, k).
        a: (k, n).

    Returns:
        (m, p), (p,) descending, (p, n) with p = min(m, k, n), all fp64. In each left vector the entry of largest
        magnitude is positive.
    """
    import torch

    b, a = b.double(), a.double()
    if b.shape[1] >= min(b.shape[0], a.shape[1]):
        u, s, vt = torch.linalg.svd(b @ a, full_matrices=False)
    else:
        left, inner_left = torch.linalg.qr(b)
        right, inner_right = torch.linalg.qr(a.T)
        u, s, vt = torch.linalg.svd(inner_left @ inner_right.T, full_matrices=False)
        u, vt = left @ u, vt @ right.T
    largest = u.abs().argmax(dim=0)
    signs = torch.where(u[largest, torch.arange(len(s))] < 0, -1.0, 1.0).double()
    return u * signs, s, vt * signs[:, None]


def best_factors(b: Any, a: Any, rank: int) -> tuple[Any, Any]:
    """Factors of the best rank-``rank`` approximation of ``b @ a`` (Eckart and Young 1936), balanced.

    Each factor gets the square roots of the singular values, so the first r columns and rows are the best
    approximation of rank r, for every r up to ``rank``.

    Returns:
        (m, rank) and (rank, n), fp64; zero where the product has a lower rank.
    """
    import torch

    u, s, vt = svd_of_product(b, a)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    out_b = torch.zeros((len(u), rank), dtype=torch.float64)
    out_a = torch.zeros((rank, vt.shape[1]), dtype=torch.float64)
    out_b[:, :kept] = u[:, :kept] * root
    out_a[:kept] = vt[:kept] * root[:, None]
    return out_b, out_a


def stacked(parts: Sequence[tuple[float, Any, Any]]) -> tuple[Any, Any]:
    """Factors of ``sum w B A``: the B side by side and weighted, the A one above the other.

    Args:
        parts: (w, (m, k_i), (k_i, n)) each.

    Returns:
        (m, sum k_i) and (sum k_i, n), fp64.
    """
    import torch

    return torch.cat([w * b.double() for w, b, _ in parts], dim=1), torch.cat([a.double() for _, _, a in parts], dim=0)
