"""Run float32 products in lower precision on accelerators, where accuracy is not needed yet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def fast_products(tensor: Tensor) -> Iterator[Callable[[], None]]:
    """Run float32 products in TF32 on the accelerator of `tensor`, until the function that is yielded is called.

    On the CPU nothing changes. At the end, the caller's own setting is restored.

    >>> x = torch.eye(2)
    >>> with fast_products(x) as exact_from_here:
    ...     rough = x @ x
    ...     exact_from_here()
    ...     exact = x @ x
    >>> torch.equal(rough, exact)  # on a CPU
    True
    """
    if not tensor.is_cuda:
        yield lambda: None
        return
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision

    def exact() -> None:
        """Restore the precision that was set before."""
        backend.fp32_precision = before

    backend.fp32_precision = "tf32"
    try:
        yield exact
    finally:
        exact()
