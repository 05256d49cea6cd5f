from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import pytest
import torch

from globalopt.kernels import precision as kernel
from globalopt.kernels.precision import cpu_has_bfloat16, fast_products, rough_product, rough_products


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
