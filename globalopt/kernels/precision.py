"""Run float32 products in lower precision where accuracy is not needed, and the hardware is faster at it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

ROUGH_FROM = 192 * 192  # entries of a matrix below which its conversion to bfloat16 takes longer than it saves


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


@cache
def cpu_has_bfloat16() -> bool:
    """Tell whether this processor has instructions for products in bfloat16: avx512_bf16 or amx_bf16.

    They are 2.2 to 2.7 times as fast as those in float32 on an AMD EPYC with avx512_bf16. Without them, such products
    are emulated, and slower than those in float32.

    >>> cpu_has_bfloat16() in (True, False)
    True
    """
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def rough_products(tensor: Tensor) -> bool:
    """Tell whether `rough_product` is faster than `@` for matrices like `tensor`: large float32 on a CPU with bfloat16.

    >>> large = torch.zeros(256, 256)
    >>> rough_products(large) == cpu_has_bfloat16(), rough_products(large[:9]), rough_products(large.double())
    (True, False, False)
    """
    large = tensor.numel() >= ROUGH_FROM and tensor.dtype == torch.float32
    return large and tensor.device.type == "cpu" and cpu_has_bfloat16()


def rough_product(X: Tensor, Y: Tensor) -> Tensor:
    """Multiply two float32 matrices in bfloat16, with sums in float32: entries are off by about 1 / 400.

    The product is rounded to bfloat16 as well, so that a Gram would not stay positive semidefinite.

    >>> rough_product(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0], [1 / 3]])).tolist()
    [[3.0]]
    """
    return (X.bfloat16() @ Y.bfloat16()).float()


def rough_forward(device: torch.device, wanted: bool = True) -> torch.autocast:
    """Return the context in which a model multiplies in bfloat16, if `wanted` and if a CPU `device` is faster at it.

    Parameters, and the sums that make the hidden states, stay in float32.

    >>> with rough_forward(torch.device("cpu")):
    ...     product = torch.ones(2, 2) @ torch.ones(2, 2)
    >>> (product.dtype == torch.bfloat16) == cpu_has_bfloat16()
    True
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and device.type == "cpu" and cpu_has_bfloat16())
