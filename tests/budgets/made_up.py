"""Budget files of a made-up model, without a search."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from globalopt.budgets import budget_file
from globalopt.budgets.budget_file import BudgetFile, LayerEntry
from globalopt.values.budget import Budget, Target
from globalopt.values.error_unit import ErrorUnit
from globalopt.values.layer import LayerSpec

KINDS = {"self_attn.q_proj": (16, 16), "self_attn.v_proj": (8, 16), "mlp.down_proj": (16, 24)}


def specs(blocks: int = 3) -> tuple[LayerSpec, ...]:
    """Three layers per block."""
    return tuple(
        LayerSpec(f"model.layers.{block}.{kind}", block, kind, kind.rpartition(".")[2], *shape)
        for block in range(blocks)
        for kind, shape in KINDS.items()
    )


def half(spec: LayerSpec) -> Target:
    """Half of a layer: rank 2, the rest in nonzeros."""
    return Target(2, spec.numel // 2 - 2 * (spec.d_out + spec.d_in))


def sparse(spec: LayerSpec) -> Target:
    """A third of a layer, all of it in nonzeros."""
    return Target(0, spec.numel // 3)


def make(
    target: Callable[[LayerSpec], Target], blocks: int = 3, accounting: str = "params", fingerprint: str = "f" * 64
) -> BudgetFile:
    """The budget that gives every layer `target` and has nothing left."""
    layers = specs(blocks)
    total = Budget.fraction(1.0, layers, accounting).total
    budget = Budget(total, total, accounting)
    used = sum(budget.cost(target(spec), spec) for spec in layers)
    entries = tuple(
        LayerEntry(
            name=spec.name,
            block=spec.block,
            kind=spec.kind,
            d_out=spec.d_out,
            d_in=spec.d_in,
            rank=target(spec).rank,
            nnz=target(spec).nnz,
            pattern=str(target(spec).pattern) if target(spec).pattern else None,
            cost=budget.cost(target(spec), spec),
            predicted=0.25,
        )
        for spec in layers
    )
    covered = sum(spec.numel for spec in layers)
    return BudgetFile(
        schema_version=1,
        fingerprint=fingerprint,
        accounting="bytes" if accounting == "bytes" else "params",
        asked=used / total,
        limit=used,
        used=used,
        total=total,
        covered=covered,
        block_params=covered + 10,
        allocator="knapsack",
        seed=3,
        error_unit=ErrorUnit.NATS,
        predicted=0.25 * len(layers),
        bound=None,
        layers=entries,
    )


def write(path: Path, file: BudgetFile) -> Path:
    """Write `file` and check it by reading it again."""
    budget_file.write(path, file)
    assert budget_file.read(path) == file
    return path
