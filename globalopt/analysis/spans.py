"""Stage 1: the low-rank and sparse subspaces a layer's compressed form is chosen from, by robust PCA or directly."""

from __future__ import annotations

import torch
from torch import Tensor

from globalopt.errors import NumericalError, UnknownNameError, UsageError
from globalopt.kernels.rpca import robust_pca
from globalopt.values.metric import Gram
from globalopt.values.span import Span

SCALINGS = ("activation", "none", "output", "direct")

VERSION = 1
"""Raised whenever spans change."""


LEAST_IMPORTANCE = 1e-4
"""Of the mean: an output that the loss does not feel still has a scale that can be undone."""


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
    outputs: Gram | None = None,
    tolerance: float = 1e-3,
    max_steps: int = 25,
) -> Span:
    """Split `R W D` into directions and entries, and keep the split exact.

    `R W D = U diag(s) Vh + S`. By robust PCA the first term is its low-rank part with the singular values in order, and
    `S` everything else, so that `take` at full rank and full count gives back `W`. The candidate space is CAP's
    (arXiv:2505.03801), which splits the plain `W`. Scalings:

    * `none`: `R = D = I`, as published.
    * `activation`: `D = D_x`, the root mean squares of the inputs. The l1 price of an entry is then its effect on the
      output, as in Wanda and OATS; whitening by the full Gram would mix entries and lose the separable l1 step.
    * `output`: also `R = diag(A)^1/2`: the effect on the loss.
    * `direct`: no robust PCA. With `D = D_x`, the directions are those of the whitened SVD: `U` the eigenvectors of
      `W G Wᵀ`, largest first, `diag(s) Vh = Uᵀ W D`; together they are all of `W D`, and `S = 0`. What a rank leaves is
      cut by its saliency `|r_ij| ||x_j||`.

    Args:
        weight: (d_out, d_in), any float dtype.
        gram: second moment of the inputs; required for every scaling but `none`.
        outputs: second moment of the output gradients `A`; required for `output`.
        tolerance, max_steps: of `robust_pca`.
    Raises:
        NumericalError: the weight is not finite.
        UsageError: a scaling without its Gram.
    """
    scale = input_scale(gram, weight.shape[1], scaling).to(weight.device)
    rows = _output_scale(outputs, weight) if scaling == "output" else weight.new_ones(len(weight), 1).float()
    scaled = rows * weight.float() * scale
    if scaling == "direct":
        assert gram is not None, "input_scale has refused a missing Gram"
        return _whitened(weight.float(), gram, scaled, scale, rows)
    split = robust_pca(scaled, tolerance=tolerance, max_steps=max_steps)
    sparse = scaled - (split.U * split.s) @ split.Vh
    stats = {
        "steps": float(split.steps),
        "residual": split.residual,
        "rank": float(len(split.s)),
        "sparse_nnz": float(torch.count_nonzero(split.S)),
    }
    return Span(split.U, split.s, split.Vh, sparse, scale, rows, stats)


def _output_scale(outputs: Gram | None, weight: Tensor) -> Tensor:
    """(d_out, 1) `diag(A)^1/2` up to a factor; ones where the loss feels no output."""
    if outputs is None:
        raise UsageError("Scaling by the outputs needs their Gram A; give it, or use another scaling.")
    diagonal = outputs.diagonal.to(weight.device)
    mean = diagonal.mean()
    if not float(mean) > 0:
        return weight.new_ones(len(weight), 1).float()
    return (diagonal / mean + LEAST_IMPORTANCE).sqrt()[:, None]


def _whitened(weight: Tensor, gram: Gram, scaled: Tensor, scale: Tensor, rows: Tensor) -> Span:
    """The directions of the whitened SVD, as many as the smaller side of the weight has."""
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError("The weight is not finite.")
    W = weight.double()
    # On the smaller side: where W is tall, its columns span all that W G Wᵀ can reach.
    basis = W if W.shape[0] > W.shape[1] else torch.eye(len(W), dtype=W.dtype, device=W.device)
    Q = torch.linalg.qr(basis).Q
    image = Q.mT @ W
    vectors = torch.linalg.eigh(image @ gram.matrix.double() @ image.mT).eigenvectors
    U = (Q @ vectors.flip(1)).to(weight.dtype)
    right = U.mT @ scaled
    s = torch.linalg.vector_norm(right, dim=1)
    Vh = right / s.clamp_min(torch.finfo(s.dtype).tiny)[:, None]
    return Span(U, s, Vh, scaled - (U * s) @ Vh, scale, rows, {"rank": float(len(s))})
