"""A decomposition in the dtype it is saved in."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from globalopt.values.decomposition import Decomposition
from globalopt.values.metric import Metric


def rounded(value: Decomposition, weight: Tensor, metric: Metric, dtype: torch.dtype) -> Decomposition:
    """`value` in `dtype`, the rounding of `S` and `U` absorbed by `V` where that lowers the error.

    With `S` and `U` rounded first, the best `V` for the weight is `(Uᵀ A U)^-1 Uᵀ A (W - S)`, whatever the inputs. On
    four layer problems bfloat16 cost 0.1 to 6 % of the error, and this got up to 44 % of that back. A sign plane has no
    such closed form and is left as it is.

    Args:
        weight: (d_out, d_in). metric: the error is measured in.
    """
    plain = Decomposition(value.S.to(dtype), value.U.to(dtype), value.V.to(dtype), value.signs)
    if value.rank == 0 or value.signs is not None or torch.finfo(dtype).bits >= 32:
        return plain
    U = plain.U.double()
    AU = U if metric.outputs is None else metric.outputs.matrix.double() @ U
    # The metric may not feel a direction of U at all.
    V = torch.linalg.pinv(U.mT @ AU, hermitian=True) @ AU.mT @ (weight - plain.S.to(weight.dtype)).double()
    refitted = replace(plain, V=V.to(dtype))
    better = metric.error(weight - refitted.dense()) < metric.error(weight - plain.dense())
    return refitted if better else plain
