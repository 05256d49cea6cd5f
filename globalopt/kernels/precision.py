"""Cheaper float32 products where accuracy is not needed yet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def fast_products(tensor: Tensor) -> Iterator[Callable[[], None]]:
    """Float32 products on the accelerator of `tensor` run in TF32 until the function this yields is called.

    On the CPU nothing changes. What the caller had set holds again afterwards.
    """
    if not tensor.is_cuda:
        yield lambda: None
        return
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision

    def exact() -> None:
        backend.fp32_precision = before

    backend.fp32_precision = "tf32"
    try:
        yield exact
    finally:
        exact()
