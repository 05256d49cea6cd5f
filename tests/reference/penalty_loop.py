"""What the published ALPS and 3BASiL loops share: a full sort, a float64 ridge inverse, the penalty schedule."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from globalopt.values.layer import NM


def project(Z: Tensor, nnz: int, pattern: NM | None) -> Tensor:
    """`Z` (d_out, d_in) with all but its `nnz` largest entries zero, or all but those `pattern` keeps."""
    kept = Z.clone()
    if pattern is None:
        kept.view(-1)[torch.topk(-(Z * Z).flatten(), Z.numel() - nnz).indices] = 0
    else:
        groups = kept.view(-1, pattern.of)
        groups.scatter_(1, groups.abs().topk(pattern.of - pattern.keep, largest=False).indices, 0)
    return kept


@dataclass(frozen=True)
class UnitDiagonal:
    """A damped Gram `H` (n, n) in coordinates where its diagonal is one, with its eigen-decomposition in float64.

    `D` (n,) is the root of the diagonal, `H` the Gram divided by it on both sides, `H = Q diag(values) Qᵀ`.
    """

    D: Tensor
    H: Tensor
    values: Tensor
    Q: Tensor

    @classmethod
    def of(cls, H: Tensor) -> UnitDiagonal:
        D = H.diagonal().sqrt()
        scaled = H / D / D[:, None]
        return cls(D, scaled, *torch.linalg.eigh(scaled.double()))

    def ridge_inverse(self, rho: float) -> Tensor:
        """`(H + rho I)^-1`, multiplied out in float64."""
        return ((self.Q / (self.values + rho)) @ self.Q.mT).to(self.H.dtype)


class Verdict(Enum):
    """What to do after a look at the support."""

    GO_ON = "go on"
    RESTART = "restart"
    STOP = "stop"


@dataclass
class Penalty:
    """The penalty of the augmented Lagrangian, and when the loop ends.

    `growth` are the factors where more than 10 %, more than 0.5 %, and any of the support moved since the last look;
    from step `earliest` on, a support that moved less than 3e-4 ends the loop.
    """

    growth: tuple[float, float, float]
    earliest: int
    rho: float = 0.1
    grown: bool = False

    def look(self, step: int, moved: int, nnz: int) -> Verdict:
        """Move the penalty after `moved` of `nnz` entries left or joined the support."""
        verdict = Verdict.GO_ON
        if moved / nnz > 0.1:
            self.rho, self.grown = self.rho * self.growth[0], True
        elif moved / nnz > 0.005:
            self.rho, self.grown = self.rho * self.growth[1], True
        elif moved and self.grown:
            self.rho *= self.growth[2]
        elif self.grown:
            return Verdict.STOP
        else:
            self.rho /= 5
            verdict = Verdict.RESTART
        self.rho = min(self.rho, 1e6)
        return Verdict.STOP if step >= self.earliest and moved / nnz < 3e-4 else verdict


def damped(G: Tensor, mean: float, each: float) -> Tensor:
    """`G` plus `mean` of the mean of its diagonal and `each` of every diagonal entry."""
    return G + torch.diag(mean * G.diagonal().mean() + each * G.diagonal())
