"""Factorise damped Grams by Cholesky, and compute the factors of their inverses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from globalopt.errors import NumericalError

LEAST_DAMPING = 1e-6  # the first damping above zero that is tried
MOST_DAMPING = 1.0  # the largest damping: a larger one would outweigh the data


class Damped(NamedTuple):
    """Hold a damped Gram, its Cholesky factor, and the damping that made it positive definite.

    Args:
        matrix: (d, d) the Gram with damping added to its diagonal.
        factor: (d, d) lower triangular `C` with `C Cᵀ = matrix`.
        damping: fraction of the mean of the diagonal that was added.

    >>> damped = damped_cholesky(torch.diag(torch.tensor([2.0, 6.0])), damping=0.5)
    >>> damped.matrix.diagonal().tolist()  # the mean of the diagonal is 4, half of which was added
    [4.0, 8.0]
    """

    matrix: Tensor
    factor: Tensor
    damping: float


def damped_cholesky(G: Tensor, damping: float, diagonal_damping: float = 0.0) -> Damped:
    """Factorise a damped Gram, `G + damping mean(diag G) I + diagonal_damping diag(G) = C Cᵀ`.

    If the matrix is not positive definite, `damping` is raised by factors of ten, up to `MOST_DAMPING`. The damping
    that sufficed is returned, so that the caller can report it. A zero Gram, of which no fraction is above zero, is
    replaced by the identity.

    Args:
        G: (d, d) symmetric, not modified.
        damping: fraction of the mean of the diagonal, >= 0.
        diagonal_damping: fraction of each diagonal entry, >= 0.
    Raises:
        NumericalError: no damping sufficed, as for an indefinite Gram.

    >>> singular = torch.ones(2, 2, dtype=torch.float64)
    >>> damped_cholesky(singular, damping=0.0).damping
    1e-06
    """
    mean = float(G.diagonal().double().mean())
    if mean == 0 and not bool(G.any()):
        # Nothing is known of the input, and every solution is exact: a neutral Gram lets a solver keep what is large.
        identity = torch.eye(len(G), dtype=G.dtype, device=G.device)
        return Damped(identity, identity.clone(), damping)
    resolution = torch.finfo(G.dtype).eps
    rung = damping
    while True:
        matrix = G.clone()
        matrix.diagonal().add_(G.diagonal(), alpha=diagonal_damping).add_(rung * mean)
        factor, info = torch.linalg.cholesky_ex(matrix)
        # A pivot below the rounding error of its diagonal entry is noise, even where it came out positive.
        solid = factor.diagonal().square() > resolution * matrix.diagonal()
        if int(info) == 0 and bool(solid.all()):
            return Damped(matrix, factor, rung)
        following = max(10 * rung, LEAST_DAMPING)
        if following > MOST_DAMPING:
            raise NumericalError(
                f"The Gram is not positive definite at any damping from {damping:g} to {rung:g} of its mean diagonal "
                f"{mean:.3g}; calibrate with more tokens, or use --dtype float32."
            )
        rung = following


def ridge_inverse(G: Tensor, ridge: float) -> Tensor:
    """Invert `G + ridge I` for a positive definite `G` (d, d) and `ridge > 0`.

    >>> ridge_inverse(torch.diag(torch.tensor([3.0, 15.0])), ridge=1.0).diagonal().tolist()
    [0.25, 0.0625]
    """
    matrix = G.clone()
    matrix.diagonal().add_(ridge)
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(matrix, check_errors=True).L)


def obs_factor(C: Tensor) -> Tensor:
    """Compute the upper triangular `R` with `Rᵀ R = G^-1` that optimal-brain-surgeon pruning uses.

    `R[j, j]²` is `[(G[j:, j:])^-1]_00`, and row `j` of `R` carries the error of column `j` to the later ones
    (SparseGPT, arXiv:2301.00774, section 3.3). Factorising the reversed Gram needs one factorisation and one triangular
    inverse, where inverting first needs two factorisations and an inverse.

    Args:
        C: (d, d) lower Cholesky factor of the reversed Gram, `C Cᵀ = G[::-1, ::-1]`.

    >>> G = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    >>> R = obs_factor(damped_cholesky(G.flip(0, 1), 0.0).factor)
    >>> torch.allclose(R.mT @ R @ G, torch.eye(2, dtype=torch.float64)), R[1, 0].item()
    (True, 0.0)
    """
    identity = torch.eye(len(C), dtype=C.dtype, device=C.device)
    return torch.linalg.solve_triangular(C, identity, upper=False).flip(0, 1)
