"""Run float32 products in lower precision where accuracy is not needed, and the hardware is faster at it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

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
    """Multiply two matrices (m, k) and (k, n), float32 or rounded already, in bfloat16, with sums in float32.

    Both and their product (m, n) are rounded to bfloat16, by at most 2^-9 of each entry; so a Gram would not stay
    positive semidefinite.

    >>> rough_product(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0], [1 / 3]])).tolist()
    [[3.0]]
    """
    return (X.bfloat16() @ Y.bfloat16()).float()


class RoughLinear(TorchFunctionMode):
    """Compute large linear layers of a model by products in bfloat16, where a CPU is faster at it.

        y = float32(bfloat16(x) bfloat16(W)ᵀ) + b

    with `x` (..., d_in), `W` (d_out, d_in) and `b` (d_out,) in float32. Everything else stays as it is, in float32:
    parameters, hidden states, norms, attention. (`torch.autocast` would leave tensors of two types in code that mixes
    them, such as that of some experts.)

    Args:
        wanted: whether anything changes.

    >>> x, W = torch.ones(1, 256), torch.full((256, 256), 1.001)  # 1 in bfloat16
    >>> with RoughLinear():
    ...     y = F.linear(x, W)
    >>> y[0, 0].item() == (256 if cpu_has_bfloat16() else F.linear(x, W)[0, 0].item()), y.dtype
    (True, torch.float32)
    """

    def __init__(self, wanted: bool = True) -> None:
        super().__init__()
        self.wanted = wanted

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute a linear layer, or call what else it is."""
        if self.wanted and func is F.linear:
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.dtype != torch.float32 or not rough_products(weight):
            return F.linear(x, weight, bias)
        y = F.linear(x.bfloat16(), weight.bfloat16()).float()
        return y if bias is None else y + bias
