from __future__ import annotations

import pytest
import torch

from globalopt.kernels.second_moment import STRIP, add_second_moment, mirror


def inputs(tokens: int, d: int) -> torch.Tensor:
    return torch.randn(tokens, d, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.linspace(0.1, 2, d))


@pytest.mark.parametrize("d", [1, 40, STRIP, 2 * STRIP + 5, 3 * STRIP])
def test_half_of_the_products_give_the_whole_moment(d):
    x, total = inputs(60, d), torch.zeros(d, d)
    for rows in x.split(25):
        add_second_moment(total, rows)
    found = mirror(total)
    assert torch.equal(found, found.mT)
    torch.testing.assert_close(found, (x.double().mT @ x.double()).float(), rtol=1e-5, atol=1e-4)
    before = found.clone()
    assert torch.equal(mirror(found), before)


def test_a_rough_moment_is_off_by_the_rounding_of_its_entries():
    d = 2 * STRIP
    x, total = inputs(400, d), torch.zeros(d, d)
    add_second_moment(total, x, rough=True)
    exact = x.double().mT @ x.double()
    scale = torch.outer(exact.diagonal().sqrt(), exact.diagonal().sqrt())
    assert float(((mirror(total) - exact).abs() / scale).max()) < 2**-7
