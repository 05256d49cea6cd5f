"""Compute the profile of a layer for one-shot allocators: its share of outliers, and its spectrum's tail exponent."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from globalopt.errors import NumericalError, UsageError
from globalopt.values.metric import Gram
from globalopt.values.problem import OUTLIER_THRESHOLDS, Profile

NO_TAIL = 6.0
"""Exponent of a block without any tail: in the theory of alpha, weights above it have no learned correlations."""

BINS = 100
"""Bins of the histogram of log eigenvalues whose fullest one is the peak of their density."""

WINDOW = (0.95, 1.5)
"""Multiples of the peak between which the smallest eigenvalue of the tail is chosen."""

VERSION = 1
"""Raised whenever profiles change."""


def profile_block(weights: Mapping[str, Tensor], grams: Mapping[str, Gram]) -> dict[str, Profile]:
    """Compute the outlier shares and the tail exponent of every layer of one block.

    The outliers of a layer above M are its entries with `A_ij > M mean(A)`, where `A_ij = |w_ij| ||x_j||` and the mean
    is over all entries of all layers of the block (OWL, arXiv:2310.05175); OWL's score of the block is the mean of its
    layers' shares, weighted by their sizes. `alpha` is `tail_exponent`.

    A layer of zeros, or with dead inputs only, has no outliers. A layer without a tail (`tail_exponent` is None) takes
    the mean alpha of the block's other layers, so that it does not move the block's mean; in a block without any tail,
    all layers take `NO_TAIL`.

    Args:
        weights: (d_out, d_in) of all layers of the block, by layer name, any float dtype.
        grams: of each layer's inputs, by layer name; layers of one site may share theirs.
    Raises:
        UsageError: the two do not name the same layers.
        NumericalError: a weight is not finite.

    >>> W = torch.ones(10, 10)
    >>> W[0, 0] = 20.0
    >>> found = profile_block({"up": W}, {"up": Gram(torch.eye(10), 64)})
    >>> found["up"].outliers
    {3: 0.01, 5: 0.01, 7: 0.01, 10: 0.01}
    """
    if weights.keys() != grams.keys():
        odd = ", ".join(sorted(weights.keys() ^ grams.keys()))
        raise UsageError(
            f"A block's profile needs one weight and one Gram per layer; only one of them is there: {odd}."
        )
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise NumericalError(f"The weight of layer {name} is not finite; the checkpoint is broken.")
    effects = [float(_effect(weights[name], grams[name]).sum(dtype=torch.float64)) for name in weights]
    mean = math.fsum(effects) / sum(weight.numel() for weight in weights.values())
    fitted = {name: tail_exponent(weight) for name, weight in weights.items()}
    known = [alpha for alpha in fitted.values() if alpha is not None]
    otherwise = math.fsum(known) / len(known) if known else NO_TAIL
    return {
        name: Profile(_outliers(weight, grams[name], mean), otherwise if alpha is None else alpha)
        for (name, weight), alpha in zip(weights.items(), fitted.values(), strict=True)
    }


def _effect(weight: Tensor, gram: Gram) -> Tensor:
    """Compute `|w_ij| ||x_j||` (d_out, d_in), up to a factor that depends on the number of tokens alone."""
    return weight.float().abs() * gram.norms.to(weight.device)


def _outliers(weight: Tensor, gram: Gram, mean: float) -> dict[int, float]:
    """Compute the share of entries whose effect exceeds each multiple of the block's mean."""
    effect = _effect(weight, gram)
    return {M: int((effect > M * mean).count_nonzero()) / weight.numel() for M in OUTLIER_THRESHOLDS}


def tail_exponent(weight: Tensor) -> float | None:
    """Estimate the power-law exponent of the upper eigenvalues of `Wᵀ W` by Hill's estimator.

        alpha = 1 + k / sum_{i = n-k+1..n} log(lambda_i / lambda_min),   lambda_min = lambda_{n-k+1}

    with the n positive eigenvalues ascending. `lambda_min` lies at the peak of their density (the "fix-finger" choice
    of AlphaPruning, arXiv:2410.10912, and the default of its code): the peak is the left edge of the fullest of
    100 equal bins of `log lambda`; of the eigenvalues from 0.95 to 1.5 times the peak the one is taken whose tail is
    nearest to its power law, by the Kolmogorov-Smirnov distance.

    The public code compares the eigenvalues themselves with the logarithm of the window's lower end, so that it also
    tries tails that start far below the peak; here both ends hold. Eigenvalues within rounding of zero are dropped.

    Args:
        weight: (d_out, d_in), finite.
    Returns:
        alpha, or None where there is no tail: fewer than two positive eigenvalues, or all equal above the peak.

    >>> singular = torch.arange(1, 101).double() ** -0.5  # eigenvalues 1 / i: exponent 2
    >>> round(tail_exponent(torch.diag(singular)), 1)
    2.0
    """
    W = weight.double()
    W = W if W.shape[0] <= W.shape[1] else W.mT
    # In float64 the product resolves singular values to 1e-8 of the largest, beyond what 16 or 32 bits store of them.
    eigenvalues = torch.linalg.eigvalsh(W @ W.mT).cpu()
    rounding = max(weight.shape) * torch.finfo(torch.float64).eps * float(eigenvalues[-1])
    logs = eigenvalues[eigenvalues > max(rounding, 0.0)].log()
    if len(logs) < 2 or _flat(logs):
        return None
    counts = torch.histc(logs, BINS)
    peak = float(logs[0]) + int(counts.argmax()) * float(logs[-1] - logs[0]) / BINS
    low, high = (peak + math.log(factor) for factor in WINDOW)
    first = min(int(torch.searchsorted(logs, low)), len(logs) - 2)
    end = max(first + 1, min(int(torch.searchsorted(logs, high, right=True)), len(logs) - 1))
    fits = [_fit_tail(logs[start:]) for start in range(first, end) if not _flat(logs[start:])]
    return min(fits)[1] if fits else None


def _flat(logs: Tensor) -> bool:
    """Tell whether eigenvalues with these ascending logarithms are all equal, to one part in a million."""
    return float(logs[-1] - logs[0]) < 1e-6


def _fit_tail(logs: Tensor) -> tuple[float, float]:
    """Fit a power law to ascending log eigenvalues above the first: its Kolmogorov-Smirnov distance, and alpha."""
    above = logs - logs[0]
    slope = len(logs) / float(above.sum())
    below = torch.arange(len(logs), dtype=logs.dtype) / len(logs)
    distance = (1 - (-slope * above).exp() - below).abs().max()
    return float(distance), 1 + slope
