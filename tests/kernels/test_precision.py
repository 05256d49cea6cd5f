from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import pytest
import torch

from globalopt.kernels.precision import fast_products


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


def precision() -> str:
    return str(torch.backends.cuda.matmul.fp32_precision)


def test_fast_until_told_otherwise(set_before):
    with fast_products(there(True)) as exact_from_here:
        assert precision() == "tf32"
        exact_from_here()
        assert precision() == set_before
        exact_from_here()
        assert precision() == set_before
    assert precision() == set_before


def test_what_was_set_holds_after_the_end_and_after_an_error(set_before):
    with fast_products(there(True)):
        assert precision() == "tf32"
    assert precision() == set_before
    with pytest.raises(ZeroDivisionError), fast_products(there(True)):
        raise ZeroDivisionError
    assert precision() == set_before


def test_nothing_changes_on_the_cpu(set_before):
    with fast_products(there(False)) as exact_from_here:
        assert precision() == set_before
        exact_from_here()
        assert precision() == set_before
