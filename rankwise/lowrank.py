"""Products of two thin factors, B A: their singular values and their best approximations, never formed whole.

Shapes: a (r, in_features), b (out_features, r), as LoRA has them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class SVD(NamedTuple):
    """B A = u diag(s) v: u (out_features, k), s (k,) falling, v (k, in_features), in float64."""

    u: torch.Tensor
    s: torch.Tensor
    v: torch.Tensor


def svd(a: torch.Tensor, b: torch.Tensor) -> SVD:
    """Return the thin singular value decomposition of b @ a, on the CPU: a GPU takes longer for thin factors.

    Cost: two QR decompositions of the factors, O((in + out) r^2), and one SVD of (r, r).
    """
    q_b, r_b = torch.linalg.qr(b.cpu().double())
    q_a, r_a = torch.linalg.qr(a.cpu().double().t())
    u, s, v = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    return SVD(q_b @ u, s, v @ q_a.t())


def singular_values(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the singular values of b @ a, (min(r, in, out),) in float64, falling."""
    return svd(a, b).s


def truncate(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors (rank, in), (out, rank) of the best rank-`rank` approximation of b @ a (Eckart-Young).

    The singular values are shared evenly: sqrt(s) in each. The dtype is that of `a`.
    """
    u, s, v = svd(a, b)
    root = s[:rank].sqrt()
    return (root[:, None] * v[:rank]).to(a), (u[:, :rank] * root).to(b)
