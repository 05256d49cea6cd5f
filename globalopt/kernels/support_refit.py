"""Solve least squares on a fixed support by masked conjugate gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from globalopt.kernels.low_rank import Subspace, subspace_step
from globalopt.kernels.norm import Norm


def fit_support(target: Tensor, S: Tensor, norm: Norm, steps: int) -> Tensor:
    """Lower `||target - S||²` over the nonzeros of `S`, from their present values, by `steps` of conjugate gradients.

    The gradient is masked, not the unknown, so that the system is the Gram's principal submatrix. Without an output
    side every row is a system of its own, with its own step length. Unit diagonals make this its Jacobi-preconditioned
    form.

    Args:
        target, S: (d_out, d_in), not modified.
        norm: the damped norm.
        steps: of conjugate gradients, >= 0; as many as a row has nonzeros solve it exactly.

    >>> from globalopt.kernels.norm import Side
    >>> G = torch.tensor([[1.0, 0.9], [0.9, 1.0]])  # two correlated inputs
    >>> norm = Norm(Side(G, torch.linalg.cholesky(G)))
    >>> S = fit_support(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 1.0]]), norm, steps=2)
    >>> torch.allclose(S, torch.tensor([[0.0, 1.9]]))  # the weight that is kept makes up for the other
    True
    """
    support = (S != 0).to(S.dtype)
    rows = norm.outputs is None
    product = torch.empty_like(S)

    def dot(X: Tensor, Y: Tensor) -> Tensor:
        """Compute inner products by row, or of all entries if the rows are coupled."""
        torch.mul(X, Y, out=product)
        return product.sum(1, keepdim=True) if rows else product.sum()

    tiny = torch.finfo(S.dtype).tiny
    S = S.clone()
    R = norm.times(target - S).mul_(support)
    D = R.clone()
    squared = dot(R, R)
    for _ in range(steps):
        ND = norm.times(D).mul_(support)
        length = squared / dot(D, ND).clamp_min(tiny)
        S.addcmul_(D, length)
        R.addcmul_(ND, length, value=-1)
        before, squared = squared, dot(R, R)
        D.mul_(squared / before.clamp_min(tiny)).add_(R)
    return S


def refit(W: Tensor, S: Tensor, subspace: Subspace, norm: Norm, rounds: int, steps: int) -> tuple[Tensor, Subspace]:
    """Lower `||W - S - L||²` on the support of `S` by alternation.

    One round is `fit_support` of `W - L`, then a step of subspace iteration for `W - S`.

    Args:
        W, S: (d_out, d_in), not modified.
        subspace: of `L`.
        norm: the damped norm.
        rounds: >= 0.
        steps: of conjugate gradients in each round.

    >>> S = torch.diag(torch.tensor([5.0, 0.0, 0.0, 0.0]))
    >>> W = S + torch.ones(4, 4)
    >>> U = torch.tensor([[0.8], [0.4], [0.4], [0.2]])  # not the right subspace yet
    >>> found, subspace = refit(W, S, Subspace(U, U), Norm(None), rounds=20, steps=1)
    >>> torch.allclose(found + subspace.U @ subspace.factor(W - found), W, atol=1e-3)
    True
    """
    for _ in range(rounds):
        L = subspace.U @ subspace.factor(W - S)
        S = fit_support(W - L, S, norm, steps)
        if subspace.rank:
            M = W - S
            subspace = subspace_step(M, norm.times(M), norm, subspace)
    return S, subspace
