"""Cholesky factors of damped Grams."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from globalopt.errors import NumericalError

FIRST_RUNG = 1e-6  # of the ladder when no damping was asked for
LAST_RUNG = 1.0  # beyond it the damping outweighs the data


class Damped(NamedTuple):
    """A damped Gram `matrix` (d, d), its lower Cholesky `factor`, and the `damping` it took."""

    matrix: Tensor
    factor: Tensor
    damping: float


def damped_cholesky(G: Tensor, damping: float, diagonal_damping: float = 0.0) -> Damped:
    """Factorise `G + damping mean(diag G) I + diagonal_damping diag(G) = C Cᵀ`.

    Where that is not positive definite, `damping` climbs by factors of ten up to `LAST_RUNG`; the rung that held is
    returned, so that the caller can report it.

    Args:
        G: (d, d) symmetric, not modified.
        damping: fraction of the mean of the diagonal, >= 0.
        diagonal_damping: fraction of each diagonal entry, >= 0.
    Raises:
        NumericalError: no rung held; a zero or an indefinite Gram.
    """
    mean = float(G.diagonal().double().mean())
    resolution = torch.finfo(G.dtype).eps
    rung = damping
    while True:
        matrix = G.clone()
        matrix.diagonal().add_(G.diagonal(), alpha=diagonal_damping).add_(rung * mean)
        factor, info = torch.linalg.cholesky_ex(matrix)
        # A pivot lost in the rounding of its own diagonal entry is noise, even where it came out positive.
        solid = factor.diagonal().square() > resolution * matrix.diagonal()
        if int(info) == 0 and bool(solid.all()):
            return Damped(matrix, factor, rung)
        following = max(10 * rung, FIRST_RUNG)
        if following > LAST_RUNG:
            raise NumericalError(
                f"The Gram is not positive definite at any damping from {damping:g} to {rung:g} of its mean diagonal "
                f"{mean:.3g}; calibrate with more tokens, and check that the activations are not all zero."
            )
        rung = following


def ridge_inverse(G: Tensor, ridge: float) -> Tensor:
    """`(G + ridge I)^-1` (d, d) of a positive definite `G` (d, d) and `ridge > 0`."""
    matrix = G.clone()
    matrix.diagonal().add_(ridge)
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(matrix, check_errors=True).L)


def obs_factor(C: Tensor) -> Tensor:
    """Upper triangular `R` with `Rᵀ R = G^-1`, from the lower factor of the reversed Gram, `C Cᵀ = G[::-1, ::-1]`.

    `R[j, j]²` is `[(G[j:, j:])^-1]_00`, and row `j` of `R` carries the error of column `j` to the later ones
    (SparseGPT, arXiv:2301.00774, section 3.3). Reversing needs one factorisation and one triangular inverse, where
    inverting first needs two factorisations and an inverse.
    """
    identity = torch.eye(len(C), dtype=C.dtype, device=C.device)
    return torch.linalg.solve_triangular(C, identity, upper=False).flip(0, 1)
