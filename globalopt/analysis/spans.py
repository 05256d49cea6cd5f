"""Compute the span of a layer, its ranked directions and entries, by robust PCA or by a whitened SVD."""

from __future__ import annotations

import torch
from torch import Tensor

from globalopt.errors import NumericalError, UnknownNameError, UsageError
from globalopt.kernels.rpca import robust_pca
from globalopt.values.metric import Gram
from globalopt.values.span import Span, SpanBasis

SCALINGS = ("activation", "none", "output", "direct")
"""Scalings of a weight before it is split; see `compute_span`."""

VERSION = 6
"""Raised whenever spans, or what is stored of them, change."""

LEAST_IMPORTANCE = 1e-4
"""Least output scale, squared, relative to the mean, so that a scaling of an output without gradient can be undone."""


def input_scale(gram: Gram | None, d_in: int, scaling: str = "activation") -> Tensor:
    """Compute the diagonal of `D_x` (d_in,): the root mean square of every input, or ones with scaling `none`.

    Inputs that are always zero get the smallest positive value, so that the scaling can be undone.

    Raises:
        UnknownNameError: the scaling is none of `SCALINGS`.
        UsageError: a scaling that needs the Gram, without one.

    >>> input_scale(Gram(torch.diag(torch.tensor([4.0, 1.0, 0.0])), 64), d_in=3)
    tensor([2., 1., 1.])
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
    tolerance: float = 5e-3,
    max_steps: int = 25,
) -> Span:
    """Split a scaled weight exactly into ranked directions and entries: `R W D = U diag(s) Vh + S`.

    By robust PCA the first term is the low-rank part with the singular values in order, and `S` is the exact
    remainder, so that all directions and all entries together give back `W`. The candidate space is CAP's
    (arXiv:2505.03801), which splits the plain `W`. Scalings:

    * `none`: `R = D = I`, as published.
    * `activation`: `D = D_x`, the root mean squares of the inputs. The l1 norm then weights an entry by its effect on
      the output, as in Wanda and OATS; whitening by the full Gram would mix entries and lose the separable l1 step.
    * `output`: also `R = diag(A)^1/2`, so that the weight is the effect on the loss.
    * `direct`: no robust PCA. With `D = D_x`, the directions are those of the whitened SVD: `U` the eigenvectors of
      `W G Wᵀ`, largest first, `diag(s) Vh = Uᵀ W D`; together they are all of `W D`, and `S = 0`. The entries of the
      residual of a rank are ranked by saliency `|r_ij| ||x_j||`.

    Args:
        weight: (d_out, d_in), any float dtype.
        gram: second moment of the inputs; required for every scaling but `none`.
        outputs: second moment of the output gradients `A`; required for `output`.
        tolerance, max_steps: of `robust_pca`. On layers of two models and made-up ones (`benchmarks/spans_time.py`), a
            tolerance of 5e-3 takes a fifth fewer steps than 1e-3 and gives the same span in practice: the leading tenth
            of the directions overlap by at least 0.999, the largest fifth of the entries by 0.98, and the errors of
            what is cut from the span are within 0.3 %. A tolerance of 2e-2 changes errors by up to 1.6 %.
    Raises:
        NumericalError: the weight is not finite.
        UsageError: a scaling without its Gram.

    >>> u, v = torch.arange(1.0, 5.0)[:, None], torch.tensor([[1.0, -1.0, 2.0, 1.0]])
    >>> W = u @ v + torch.diag(torch.tensor([0.0, 0.0, 20.0, 0.0]))  # rank 1 and one large entry
    >>> span = compute_span(W, Gram(torch.eye(4), 64))
    >>> bool(torch.allclose((span.U * span.s) @ span.Vh + span.S, W, atol=1e-4))  # exact, since D is the identity
    True
    >>> divmod(int(span.S.abs().argmax()), 4)
    (2, 2)
    """
    scale = input_scale(gram, weight.shape[1], scaling).to(weight.device)
    rows = _output_scale(outputs, weight) if scaling == "output" else weight.new_ones(len(weight), 1).float()
    scaled = rows * weight.float() * scale
    if scaling == "direct":
        assert gram is not None, "input_scale has refused a missing Gram"
        return _whitened(weight.float(), gram, scaled, scale, rows).span(weight)
    split = robust_pca(scaled, tolerance=tolerance, max_steps=max_steps)
    stats = {
        "steps": float(split.steps),
        "residual": split.residual,
        "rank": float(len(split.s)),
        "sparse_nnz": float(torch.count_nonzero(split.S)),
    }
    # The products of another memory layout may round otherwise than those of a basis that was stored.
    U, Vh = split.U.contiguous(), split.Vh.contiguous()
    return SpanBasis(U, split.s, Vh, scale, rows, stats).span(weight)


def _output_scale(outputs: Gram | None, weight: Tensor) -> Tensor:
    """Compute `diag(A)^1/2` (d_out, 1) up to a factor; ones if all gradients at the output are zero."""
    if outputs is None:
        raise UsageError("Scaling by the outputs needs their Gram A; give it, or use another scaling.")
    diagonal = outputs.diagonal.to(weight.device)
    mean = diagonal.mean()
    if not float(mean) > 0:
        return weight.new_ones(len(weight), 1).float()
    return (diagonal / mean + LEAST_IMPORTANCE).sqrt()[:, None]


def _whitened(weight: Tensor, gram: Gram, scaled: Tensor, scale: Tensor, rows: Tensor) -> SpanBasis:
    """Compute the basis of the whitened SVD, with as many directions as the smaller side of the weight."""
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError("The weight is not finite.")
    W = weight.double()
    # The eigenproblem has the smaller side: the range of W G Wᵀ lies in the columns of a tall W.
    basis = W if W.shape[0] > W.shape[1] else torch.eye(len(W), dtype=W.dtype, device=W.device)
    Q = torch.linalg.qr(basis).Q
    image = Q.mT @ W
    vectors = torch.linalg.eigh(image @ gram.matrix.double() @ image.mT).eigenvectors
    U = (Q @ vectors.flip(1)).to(weight.dtype)
    right = U.mT @ scaled
    s = torch.linalg.vector_norm(right, dim=1)
    Vh = right / s.clamp_min(torch.finfo(s.dtype).tiny)[:, None]
    return SpanBasis(U.contiguous(), s, Vh.contiguous(), scale, rows, {"rank": float(len(s))})
