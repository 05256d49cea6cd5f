"""Norms, and what they mean written out: dense Kronecker matrices and symmetric roots, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from globalopt.kernels.norm import Norm, Side
from tests.synthetic import layer


def side(matrix: Tensor) -> Side:
    return Side(matrix, torch.linalg.cholesky(matrix))


def unit(matrix: Tensor) -> Tensor:
    """`matrix` (d, d) scaled to a diagonal of ones."""
    scale = matrix.diagonal().sqrt()
    return matrix / scale / scale[:, None]


def correlated(d: int, seed: int = 0) -> Tensor:
    """A positive definite (d, d) of very different diagonal entries, float64."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(4 * d, d, generator=generator).double() @ torch.randn(d, d, generator=generator).double()
    X *= torch.logspace(-1, 0, d).double()
    return X.mT @ X / len(X)


def problem(shape: tuple[int, int], outputs: bool, seed: int = 0) -> tuple[Tensor, Norm]:
    """A weight of `shape` (d_out, d_in) with the Gram at unit diagonal, and an `A` likewise if asked; float64."""
    W, gram = layer(*shape, 300, seed)
    G = gram.damped(0.01).matrix.double()
    A = unit(correlated(shape[0], seed)) if outputs else None
    return W.double() * G.diagonal().sqrt(), Norm(side(unit(G)), None if A is None else side(A))


def matrices(norm: Norm, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """`A` (d_out, d_out) and `G` (d_in, d_in), identities where the norm has none."""
    sides = (norm.outputs, norm.inputs)
    A, G = (torch.eye(d).double() if s is None else s.matrix.double() for s, d in zip(sides, shape, strict=True))
    return A, G


def squared(norm: Norm, E: Tensor) -> float:
    """`tr(A E G Eᵀ)`."""
    A, G = matrices(norm, E.shape)
    return float(torch.trace(A @ E.double() @ G @ E.double().mT))


def root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive definite (d, d)."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.sqrt() @ vectors.mT


def best_low_rank(M: Tensor, norm: Norm, rank: int) -> Tensor:
    """`argmin tr(A (M - L) G (M - L)ᵀ)` over `L` of `rank`, by a full SVD of `A^1/2 M G^1/2`."""
    A, G = matrices(norm, M.shape)
    U, s, Vh = torch.linalg.svd(root(A) @ M @ root(G), full_matrices=False)
    return torch.linalg.solve(root(A), (U[:, :rank] * s[:rank]) @ Vh[:rank]) @ torch.linalg.inv(root(G))
