"""Look at all entries of a tensor, in one pass over them."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(x: Tensor) -> bool:
    """Tell whether no entry is infinite or NaN.

    One sum over the entries tells it, as each of these would be in it, unless finite numbers have a sum that is not.

    >>> all_finite(torch.tensor([1.0, float("nan")])), all_finite(torch.full((2,), 3e38))
    (False, True)
    """
    total = x.sum(dtype=torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x.sum()
    return bool(torch.isfinite(total)) or bool(torch.isfinite(x).all())


def count_nonzeros(x: Tensor) -> int:
    """Count the entries that are not zero; of a comparison, which is several times faster than of the numbers.

    >>> count_nonzeros(torch.tensor([0.0, -0.0, 2.0, float("nan")]))
    2
    """
    return int((x != 0).count_nonzero())
