from __future__ import annotations

from dataclasses import replace

import pytest

from globalopt.analysis.grid import LARGEST_SHARE, LEAST_KEPT, NNZ_LEVELS, Options
from globalopt.values.budget import Target
from globalopt.values.layer import LayerSpec
from globalopt.values.layer_results import LayerResult
from reports import Menu
from reports.tables import budget_facts
from tests.reports.factory import make_summary

MENU = Menu(LEAST_KEPT, LARGEST_SHARE, NNZ_LEVELS)
SPEC = LayerSpec("up", 0, "in", "up", 128, 256)


def layer(rank: int, nnz: int, pattern: str | None = None) -> LayerResult:
    like = make_summary(1).layers[0]
    return replace(like, d_out=SPEC.d_out, d_in=SPEC.d_in, rank=rank, nnz=nnz, pattern=pattern)


def said(*layers: LayerResult) -> str:
    return "; ".join(text for _, text in MENU.facts(layers))


def test_a_layer_is_at_a_limit_where_the_menu_has_no_fewer_nonzeros_at_its_rank() -> None:
    for rank, counts in Options.of(SPEC, max_rank=60).rows:
        for nnz in (n for n in counts if 0 < n < SPEC.numel):
            fewest = nnz == min(n for n in counts if n)
            assert bool(said(layer(rank, nnz))) is fewest, Target(rank, nnz)


def test_the_limit_is_named_with_its_value_and_the_layers_are_counted() -> None:
    (rank, row), *_, (high, top) = Options.of(SPEC, max_rank=60).rows
    assert rank == 0
    fewest, most = min(n for n in row if n), min(top)
    found = said(layer(0, fewest), layer(high, most), layer(high, most), layer(0, SPEC.numel // 2))
    assert (
        found
        == "2 of 4 layers at the largest rank share on offer, 0.45; 1 of 4 layers at the least kept on offer, 0.05"
    )


@pytest.mark.parametrize(
    "free", [layer(0, 0), layer(0, SPEC.numel), layer(5, 0), layer(9, 1, "2:4"), layer(0, SPEC.numel // 2)]
)
def test_dense_and_dropped_layers_patterns_and_ranks_alone_are_at_no_limit(free: LayerResult) -> None:
    assert said(free) == ""


def test_a_budget_that_nothing_was_predicted_for_had_no_menu() -> None:
    summary = make_summary(predicted=0.01, layers=(layer(0, 1700),))
    assert "options" in dict(budget_facts(summary, MENU))
    assert "options" not in dict(budget_facts(summary))
    assert "options" not in dict(budget_facts(replace(summary, predicted=None, bound=None), MENU))
