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


@pytest.fixture(params=[False, True], ids=["was off", "was on"])
def set_before(request) -> Iterator[bool]:
    backend = torch.backends.cuda.matmul
    original = backend.allow_tf32
    backend.allow_tf32 = request.param
    yield request.param
    backend.allow_tf32 = original


def allowed() -> bool:
    return bool(torch.backends.cuda.matmul.allow_tf32)


def test_fast_until_told_otherwise(set_before):
    with fast_products(there(True)) as exact_from_here:
        assert allowed()
        exact_from_here()
        assert allowed() is set_before
        exact_from_here()
        assert allowed() is set_before
    assert allowed() is set_before


def test_what_was_set_holds_after_the_end_and_after_an_error(set_before):
    with fast_products(there(True)):
        assert allowed()
    assert allowed() is set_before
    with pytest.raises(ZeroDivisionError), fast_products(there(True)):
        raise ZeroDivisionError
    assert allowed() is set_before


def test_nothing_changes_on_the_cpu(set_before):
    with fast_products(there(False)) as exact_from_here:
        assert allowed() is set_before
        exact_from_here()
        assert allowed() is set_before
