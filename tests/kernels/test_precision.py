from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import pytest
import torch

from globalopt.kernels import precision as kernel
from globalopt.kernels.precision import RoughLinear, cpu_has_bfloat16, fast_products, rough_product, rough_products


@dataclass(frozen=True)
class Stub:
    """A tensor, as far as where it is goes."""

    is_cuda: bool


def there(is_cuda: bool) -> torch.Tensor:
    return cast(torch.Tensor, Stub(is_cuda))


@pytest.fixture(params=["ieee", "tf32"])
def set_before(request) -> Iterator[str]:
    backend = torch.backends.cuda.matmul
    original = backend.fp32_precision
    backend.fp32_precision = request.param
    yield request.param
    backend.fp32_precision = original


def now() -> str:
    return str(torch.backends.cuda.matmul.fp32_precision)


def test_fast_until_told_otherwise(set_before):
    with fast_products(there(True)) as exact_from_here:
        assert now() == "tf32"
        exact_from_here()
        assert now() == set_before
        exact_from_here()
        assert now() == set_before
    assert now() == set_before


def test_what_was_set_holds_after_the_end_and_after_an_error(set_before):
    with fast_products(there(True)):
        assert now() == "tf32"
    assert now() == set_before
    with pytest.raises(ZeroDivisionError), fast_products(there(True)):
        raise ZeroDivisionError
    assert now() == set_before


def test_nothing_changes_on_the_cpu(set_before):
    with fast_products(there(False)) as exact_from_here:
        assert now() == set_before
        exact_from_here()
        assert now() == set_before


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_f": True, "avx512_bf16": False}, False)],
)
def test_products_are_rough_where_the_processor_has_instructions_for_it(monkeypatch, capabilities, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(kernel, "cpu_has_bfloat16", cpu_has_bfloat16.__wrapped__)
    large = torch.zeros(256, 256)
    assert rough_products(large) == fast
    assert not rough_products(large[:8])
    assert not rough_products(large.double())
    assert not rough_products(large.to("meta"))


def test_a_rough_product_is_summed_in_float32():
    ones = torch.ones(1, 4000)
    # In bfloat16, sums of ones end at 256.
    assert rough_product(ones, ones.mT).item() == 4000


@pytest.mark.parametrize("bias", [True, False])
def test_large_linear_layers_are_rough_and_all_else_is_as_it_was(monkeypatch, bias):
    monkeypatch.setattr(kernel, "rough_products", lambda weight: len(weight) == 8)
    torch.manual_seed(0)
    large, small, x = torch.nn.Linear(4, 8, bias), torch.nn.Linear(8, 4), torch.randn(3, 4, requires_grad=True)
    with RoughLinear():
        y = large(x)
        z = small(y)
        product = x @ x.mT
    exact = x.bfloat16().float() @ large.weight.bfloat16().float().mT
    torch.testing.assert_close(y, exact + large.bias if bias else exact, rtol=0.01, atol=0.01)
    assert y.dtype == torch.float32
    assert not torch.equal(y, large(x))
    torch.testing.assert_close(z, small(y))
    assert torch.equal(product, x @ x.mT)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, large.weight.sum(0).expand(3, -1), rtol=0.01, atol=0.01)
    with RoughLinear(wanted=False):
        assert torch.equal(large(x), large(x))
        assert not torch.equal(large(x), y)
