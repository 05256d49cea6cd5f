from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from globalopt.kernels import projection
from globalopt.kernels.projection import (
    SAMPLE_STRIDE,
    indicate_planes,
    indicate_roughly,
    indicate_top,
    keep_nm,
    keep_per_row,
    keep_top,
    keep_weights,
    plane_order,
)
from globalopt.values.layer import NM

GRID = torch.randint(0, 4, (7, 24), generator=torch.Generator().manual_seed(1)).float()  # mostly ties


@pytest.mark.parametrize("count", [0, 1, 50, 84, 167, 168])
def test_keep_top_counts_exactly_and_breaks_ties_by_index(count):
    mask = keep_top(GRID.flatten(), count)
    expected = torch.zeros(168, dtype=torch.bool)
    expected[GRID.flatten().argsort(descending=True, stable=True)[:count]] = True
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("count", [0, 1, 5, 23, 24])
def test_keep_top_works_along_the_last_dimension(count):
    expected = torch.stack([keep_top(row, count) for row in GRID])
    assert torch.equal(keep_top(GRID, count), expected)


def test_many_rows_are_selected_from_a_few_at_a_time(monkeypatch):
    expected = keep_top(GRID, 5)
    monkeypatch.setattr(projection, "SELECTED_AT_ONCE", 50)
    assert torch.equal(keep_top(GRID, 5), expected)
    assert torch.equal(keep_top(GRID.view(7, 3, 8), 2), torch.stack([keep_top(rows, 2) for rows in GRID.view(7, 3, 8)]))


@pytest.mark.parametrize("shape", ["smooth", "ties", "two values", "sorted", "period", "constant", "rare"])
@pytest.mark.parametrize("count", [1, 2, 60, 5000, 9999, 10_000, 19_000, 19_999])
def test_keep_top_of_many_scores_is_a_sort(shape, count):
    generator = torch.Generator().manual_seed(2)
    smooth = torch.randn(20_000, generator=generator)
    scores = {
        "smooth": smooth,
        "ties": (3 * smooth).round(),
        "two values": (smooth > 0).float(),
        "sorted": smooth.sort().values,
        "period": torch.arange(20_000.0) % SAMPLE_STRIDE,
        "constant": torch.zeros(20_000),
        "rare": torch.where(torch.arange(20_000) % SAMPLE_STRIDE == 0, 1e9, smooth),
    }[shape]
    expected = torch.zeros(20_000, dtype=torch.bool)
    expected[scores.argsort(descending=True, stable=True)[:count]] = True
    assert torch.equal(keep_top(scores, count), expected)


@pytest.mark.parametrize("count", [1, 100, 3000, 10_000, 19_990, 20_000])
def test_a_rough_count_is_off_by_the_noise_of_its_sample(count):
    scores = torch.randn(20_000, generator=torch.Generator().manual_seed(3))
    kept = indicate_roughly(scores, count)
    found = int(kept.sum())
    assert abs(found - count) <= 4 * SAMPLE_STRIDE + 4 * math.sqrt(SAMPLE_STRIDE * min(count, 20_000 - count))
    # Whatever their number, they are the largest.
    assert torch.equal(kept, indicate_top(scores, found))


def test_a_rough_count_of_few_scores_is_exact():
    scores = GRID.flatten()
    assert torch.equal(indicate_roughly(scores, 50), indicate_top(scores, 50))


def test_keep_top_of_infinite_and_equal_scores():
    assert keep_top(torch.tensor([1.0, torch.inf, torch.inf, 0.0]), 1).tolist() == [False, True, False, False]
    assert int(keep_top(torch.zeros(10), 3)[:3].sum()) == 3


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 100, 168])
def test_keep_per_row_shares_the_remainder(count):
    mask = keep_per_row(GRID, count)
    assert int(mask.sum()) == count
    rows = mask.sum(1)
    assert int(rows.max() - rows.min()) <= 1
    for row, kept in zip(GRID, mask, strict=True):
        assert torch.equal(kept, keep_top(row, int(kept.sum())))


def test_keep_per_row_gives_the_remainder_to_the_largest_next_score():
    scores = torch.tensor([[9.0, 1.0, 0.0], [8.0, 5.0, 0.0], [7.0, 2.0, 0.0]])
    assert keep_per_row(scores, 4).sum(1).tolist() == [1, 2, 1]


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 8), NM(1, 3)], ids=str)
def test_keep_nm_equals_a_sort_of_every_group(pattern):
    mask = keep_nm(GRID, pattern).reshape(-1, pattern.of)
    for group, kept in zip(GRID.reshape(-1, pattern.of), mask, strict=True):
        expected = torch.zeros(pattern.of, dtype=torch.bool)
        expected[group.argsort(descending=True, stable=True)[: pattern.keep]] = True
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 4), NM(1, 2), NM(2, 3)], ids=str)
def test_planes_are_kept_as_a_sort_keeps_them_whatever_is_equal(pattern):
    """Every order of up to three different scores."""
    planes = torch.tensor(list(product(range(3), repeat=pattern.of))).float().mT.contiguous()
    before = planes.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    assert torch.equal(indicate_planes(planes, pattern.keep), (before < pattern.keep).float())


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 8), NM(1, 3)], ids=str)
def test_in_plane_order_a_matrix_is_its_planes(pattern):
    order = plane_order(24, pattern, GRID.device)
    planes = GRID[:, order].view(len(GRID), pattern.of, -1)
    kept = indicate_planes(planes, pattern.keep).view_as(GRID)[:, order.argsort()]
    assert torch.equal(kept.bool(), keep_nm(GRID, pattern))


def test_keep_weights_chooses_the_rule():
    assert torch.equal(keep_weights(GRID, 84, NM(2, 4)), keep_nm(GRID, NM(2, 4)))
    assert torch.equal(keep_weights(GRID, 50, per_row=True), keep_per_row(GRID, 50))
    assert torch.equal(keep_weights(GRID, 50), keep_top(GRID.flatten(), 50).view_as(GRID))
