"""The largest singular values of a matrix, and the directions of its input that belong to them.

Shapes: G (out, in); K singular values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rankwise.seeds import derive

LIMIT = 64
"""Singular values kept of a module: K = min(LIMIT, out, in)."""

OVERSAMPLING = 16
POWER_ITERATIONS = 2

EXACT_UP_TO = 96
"""Up to this smaller side a full SVD costs about as much as a randomised one."""

RANGE, CO_RANGE = 64, 129
"""Sizes k and l = 2k + 1 of a sketch (arXiv 1609.00048, Sec. 4)."""

SKETCHED = 48
"""Singular values kept of a sketch: from the 20th on they come out too small, the last ones as 0."""


class Spectrum(NamedTuple):
    """Singular values (K,), falling; right singular vectors (K, in), orthonormal rows; ||G||_F; fp32."""

    values: torch.Tensor
    right: torch.Tensor
    norm: torch.Tensor


def gaussian(rows: int, columns: int, seed: int, *purpose: str | int) -> torch.Tensor:
    """Return a standard Gaussian matrix (rows, columns), fp32, on the CPU: the same on every device."""
    draw = torch.Generator().manual_seed(derive(seed, *purpose))
    return torch.randn(rows, columns, generator=draw)


def spectrum(matrix: torch.Tensor, seed: int, limit: int = LIMIT) -> Spectrum:
    """Return the largest singular values of a fp32 matrix.

    Small ones are decomposed whole. Larger ones by the randomised range finder with power iterations,
    orthonormal after each product (Halko, Martinsson, Tropp 2011, arXiv 0909.4061, Alg. 4.4 and 5.1).

    Args:
        matrix: (out, in).
        seed: of the random start.
        limit: K at most.

    Cost: 6 products with (K + 16) columns; a full SVD where the smaller side is up to `EXACT_UP_TO`.
    """
    norm = torch.linalg.vector_norm(matrix)
    if min(matrix.shape) <= max(EXACT_UP_TO, limit + OVERSAMPLING):
        _, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return Spectrum(values[:limit], right[:limit], norm)
    start = gaussian(matrix.shape[1], limit + OVERSAMPLING, seed, "spectrum", matrix.shape[1])
    basis = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q
    return Spectrum(*_of_rows(basis.t() @ matrix, limit), norm)


def _of_rows(wide: torch.Tensor, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values and right vectors of a matrix of few rows, by the QR decomposition of its transpose."""
    q, r = torch.linalg.qr(wide.t())  # wide = r^T q^T
    left, values, _ = torch.linalg.svd(r)
    return values[:limit], (q @ left[:, :limit]).t().contiguous()


def sketched_spectrum(
    range_sketch: torch.Tensor, co_range_sketch: torch.Tensor, co_draw: torch.Tensor, limit: int = SKETCHED
) -> Spectrum:
    """Return the largest singular values of a matrix that was seen through two sketches alone.

    Tropp, Yurtsever, Udell, Cevher 2017 (arXiv 1609.00048), Alg. 4 and 7: Q = orth(Y), X = (Psi Q)^+ Z,
    G is near Q X, whose best rank-K approximation is taken. X is Q^T G plus noise from what lies outside Q:
    with t^2 = ||G - Q Q^T G||^2, X X^T is on average too large by t^2 / (l - k - 1) times the identity. The
    spectra of gradients fall slowly, so singular values would come out a tenth too large. t^2 is read off the
    residual of the least squares, (l - k) t^2 on average, and the excess is taken off (ours). ||G||_F^2 is
    ||Q^T G||^2 + t^2.

    Args:
        range_sketch: Y = G Omega, (out, k).
        co_range_sketch: Z = Psi G, (l, in).
        co_draw: Psi, (l, out).
        limit: K at most.
    """
    basis = torch.linalg.qr(range_sketch).Q
    q, r = torch.linalg.qr(co_draw @ basis)
    inside = q.t() @ co_range_sketch
    core = torch.linalg.solve_triangular(r, inside, upper=True)
    values, right = _of_rows(core, limit)
    (size, _), rank = co_draw.shape, basis.shape[1]
    tail = (co_range_sketch.square().sum() - inside.square().sum()).clamp(min=0) / (size - rank)
    excess = tail / (size - rank - 1)
    norm = (core.square().sum() - rank * excess + tail).clamp(min=0).sqrt()
    return Spectrum((values.square() - excess).clamp(min=0).sqrt(), right, norm)
