"""A budget file of a made-up model, for examples."""

from __future__ import annotations

from globalopt.budgets.budget_file import BudgetFile, imported, whole
from globalopt.values.budget import Target
from globalopt.values.layer import LayerSpec


def example_budget() -> BudgetFile:
    """Make the budget file of one made-up block, whose two layers keep half of their 64 parameters.

    `up_proj` (8, 4) keeps rank 1 and 4 nonzeros, `down_proj` (4, 8) keeps 16 nonzeros and no rank.

    >>> file = example_budget()
    >>> file.used, file.total, [(entry.kind, entry.rank, entry.nnz) for entry in file.layers]
    (32, 64, [('up_proj', 1, 4), ('down_proj', 0, 16)])
    """
    up, down = (f"model.layers.0.mlp.{kind}_proj" for kind in ("up", "down"))
    specs = (LayerSpec(up, 0, up, "up_proj", 8, 4), LayerSpec(down, 0, down, "down_proj", 4, 8))
    dense = whole(specs, "0" * 64, covered=64, block_params=80, accounting="params")
    return imported({up: Target(1, 4), down: Target(0, 16)}, dense, by="example")
