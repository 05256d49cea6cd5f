"""Stage 1: robust PCA spans the low-rank and sparse subspaces a layer's compressed form is chosen from."""

from __future__ import annotations

import torch
from torch import Tensor

from globalopt.errors import UnknownNameError, UsageError
from globalopt.kernels.projection import keep_weights
from globalopt.kernels.rpca import robust_pca
from globalopt.types import Decomposition, Gram, Span, Target

SCALINGS = ("activation", "none")


def input_scale(gram: Gram | None, d_in: int, scaling: str = "activation") -> Tensor:
    """(d_in,) the diagonal of `D_x`: root mean square of every input, or ones.

    Dead inputs get the smallest live value, so that the scaling can be undone.
    """
    if scaling not in SCALINGS:
        raise UnknownNameError("span scaling", scaling, SCALINGS)
    if scaling == "none":
        return torch.ones(d_in)
    if gram is None:
        raise UsageError("Scaling by the activations needs the Gram of the inputs; give it, or use scaling 'none'.")
    norms = gram.norms
    live = norms[norms > 0]
    return norms.clamp_min(float(live.min())) if len(live) else torch.ones_like(norms)


def compute_span(
    weight: Tensor,
    gram: Gram | None = None,
    scaling: str = "activation",
    tolerance: float = 1e-3,
    max_steps: int = 25,
) -> Span:
    """Split `W D_x` by robust PCA and keep the split exact.

    `W D_x = U diag(s) Vh + S`: the first term is RPCA's low-rank part with its singular values in order, `S` is
    everything else, so that `take` at full rank and full count gives back `W`. Scaling by the activations makes the
    l1 price of an entry its effect on the output, as in Wanda and OATS; whitening by the full Gram would mix entries
    and lose the separable l1 step. The candidate space is CAP's (arXiv:2505.03801), which splits the plain `W`
    (`scaling="none"`).

    Args:
        weight: (d_out, d_in), any float dtype.
        gram: second moment of the inputs; required for `scaling="activation"`.
        tolerance, max_steps: of `robust_pca`.
    Raises:
        NumericalError: the weight is not finite.
        UsageError: scaling by the activations without a Gram.
    """
    scale = input_scale(gram, weight.shape[1], scaling).to(weight.device)
    scaled = weight.float() * scale
    split = robust_pca(scaled, tolerance=tolerance, max_steps=max_steps)
    sparse = scaled - (split.U * split.s) @ split.Vh
    stats = {
        "steps": float(split.steps),
        "residual": split.residual,
        "rank": float(len(split.s)),
        "sparse_nnz": float(torch.count_nonzero(split.S)),
    }
    return Span(split.U, split.s, split.Vh, sparse, scale, stats)


def take(span: Span, target: Target) -> Decomposition:
    """The span's candidate for `target`, without refinement.

    Keeps the first `target.rank` directions, and of what they leave the `target.nnz` largest entries in scaled
    coordinates (or the pattern's choice). Ranks above the span's are cut to it.
    """
    rank = min(target.rank, span.max_rank)
    U, V = span.low_rank(rank)
    residual = span.residual(rank)
    kept = keep_weights(residual.abs(), target.nnz, target.pattern)
    return Decomposition(torch.where(kept, residual, 0.0) / span.scale, U, V)
