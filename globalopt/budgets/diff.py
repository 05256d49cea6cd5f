"""Compare two budgets of one model, layer by layer and pooled by kind and by depth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from globalopt.budgets.budget_file import BudgetFile
from globalopt.errors import ArtefactError
from globalopt.values.budget import Budget, Target
from globalopt.values.embeddings import Embedding
from globalopt.values.layer_results import LayerPlan

RANGES = 8  # at most so many ranges of blocks, into which the depth of a model is cut


@dataclass(frozen=True)
class Move:
    """Compare one layer, or several pooled, before and after; costs in the unit of `BudgetDiff.accounting`.

    Args:
        layers: how many there are; `changed` how many of them have another target.
        dense_cost: of the dense layers, the same before and after.
        cost, rank_params, nnz: before and after, summed over the layers.

    >>> move = Move(layers=1, changed=1, dense_cost=32, cost=(16, 24), rank_params=(12, 0), nnz=(4, 24))
    >>> move.change, move.kept, move.rank_share
    (8, (0.5, 0.75), (0.75, 0.0))
    """

    layers: int
    changed: int
    dense_cost: int
    cost: tuple[int, int]
    rank_params: tuple[int, int]
    nnz: tuple[int, int]

    @classmethod
    def of(cls, pairs: Iterable[tuple[LayerPlan, LayerPlan]]) -> Move:
        """Pool at least one layer."""
        pairs = tuple(pairs)

        def both(name: str) -> tuple[int, int]:
            before, after = (sum(getattr(pair[i], name) for pair in pairs) for i in (0, 1))
            return before, after

        return cls(
            layers=len(pairs),
            changed=sum(before.target != after.target for before, after in pairs),
            dense_cost=sum(before.dense_cost for before, _ in pairs),
            cost=both("cost"),
            rank_params=both("rank_params"),
            nnz=both("nnz"),
        )

    @property
    def change(self) -> int:
        """Change of the cost, after minus before."""
        return self.cost[1] - self.cost[0]

    @property
    def kept(self) -> tuple[float, float]:
        """Kept fractions of the dense cost, before and after."""
        return self.cost[0] / self.dense_cost, self.cost[1] / self.dense_cost

    @property
    def rank_share(self) -> tuple[float, float]:
        """Shares of the kept parameters that are in low-rank factors, before and after; 0 where nothing is kept."""
        before, after = (
            low / (low + nnz) if low + nnz else 0.0 for low, nnz in zip(self.rank_params, self.nnz, strict=True)
        )
        return before, after


@dataclass(frozen=True)
class BudgetDiff:
    """Compare two budgets of one model, layer by layer in model order.

    Args:
        accounting: the unit of costs: that of both budgets, or parameters where they differ.
        before, after: the layers. embeddings: that the budgets count, before and after.

    >>> from globalopt.budgets.budget_file import without_rank
    >>> from globalopt.budgets.example import example_budget
    >>> found = diff(example_budget(), without_rank(example_budget()), (Path("a.json"), Path("b.json")))
    >>> found.whole.changed, found.given, [after.nnz for before, after in found.largest(1)]
    (1, 0, [16])
    """

    accounting: str
    before: tuple[LayerPlan, ...]
    after: tuple[LayerPlan, ...]
    embeddings: tuple[tuple[Embedding, ...], tuple[Embedding, ...]] = ((), ())

    @property
    def pairs(self) -> tuple[tuple[LayerPlan, LayerPlan], ...]:
        """Every layer before and after."""
        return tuple(zip(self.before, self.after, strict=True))

    @property
    def whole(self) -> Move:
        """All layers pooled."""
        return Move.of(self.pairs)

    @property
    def restored(self) -> int:
        """Number of layers whose numbers are stored in other bits."""
        return sum(before.storage != after.storage for before, after in self.pairs)

    @property
    def given(self) -> int:
        """Sum of the cost that layers gain, over those that keep more."""
        return sum(max(0, after.cost - before.cost) for before, after in self.pairs)

    @property
    def taken(self) -> int:
        """Sum of the cost that layers lose, over those that keep less."""
        return sum(max(0, before.cost - after.cost) for before, after in self.pairs)

    def largest(self, most: int) -> list[tuple[LayerPlan, LayerPlan]]:
        """List the `most` layers with other targets whose cost changed most, largest first; ties in model order."""
        changed = [pair for pair in self.pairs if pair[0].target != pair[1].target]
        return sorted(changed, key=lambda pair: -abs(pair[1].cost - pair[0].cost))[:most]

    def by_kind(self) -> dict[str, Move]:
        """Pool the layers by kind, in the order in which the kinds first occur in the model."""
        kinds = dict.fromkeys(before.kind for before in self.before)
        return {kind: Move.of(pair for pair in self.pairs if pair[0].kind == kind) for kind in kinds}

    def by_depth(self) -> dict[str, Move]:
        """Pool the layers by ranges of blocks: at most `RANGES` of equal length, or nearly so."""
        blocks = sorted({before.block for before in self.before})
        ranges = min(RANGES, len(blocks))
        bounds = [len(blocks) * i // ranges for i in range(ranges + 1)]
        pooled = {}
        for first, end in pairwise(bounds):
            low, high = blocks[first], blocks[end - 1]
            name = str(low) if low == high else f"{low}-{high}"
            pooled[name] = Move.of(pair for pair in self.pairs if low <= pair[0].block <= high)
        return pooled


def record(found: BudgetDiff) -> dict[str, Any]:
    """Return a comparison as JSON values; every pair is `[before, after]`.

    >>> from globalopt.budgets.budget_file import without_rank
    >>> from globalopt.budgets.example import example_budget
    >>> found = diff(example_budget(), without_rank(example_budget()), (Path("a.json"), Path("b.json")))
    >>> record(found)["layers"][0]["rank"]
    [1, 0]
    """
    return {
        "accounting": found.accounting,
        "given": found.given,
        "taken": found.taken,
        "whole": _move_record(found.whole),
        "by_kind": {kind: _move_record(move) for kind, move in found.by_kind().items()},
        "by_depth": {blocks: _move_record(move) for blocks, move in found.by_depth().items()},
        "layers": [_layer_record(before, after) for before, after in found.pairs],
        **(
            {"embeddings": [[asdict(each) for each in some] for some in found.embeddings]}
            if any(found.embeddings)
            else {}
        ),
    }


def _move_record(move: Move) -> dict[str, Any]:
    """Convert a pooled comparison to JSON values."""
    return {**asdict(move), "change": move.change, "kept": move.kept, "rank_share": move.rank_share}


def _layer_record(before: LayerPlan, after: LayerPlan) -> dict[str, Any]:
    """Convert the comparison of a layer to JSON values."""
    names = ("rank", "nnz", "pattern", "storage", "cost", "kept", "density")
    pairs = {name: [getattr(before, name), getattr(after, name)] for name in names}
    return {"name": before.name, "block": before.block, "kind": before.kind, "dense_cost": before.dense_cost, **pairs}


def diff(before: BudgetFile, after: BudgetFile, sources: tuple[Path, Path]) -> BudgetDiff:
    """Compare two budgets of one model.

    Args:
        sources: the files that they were read from, for messages.
    Raises:
        ArtefactError: they are budgets of different models.

    >>> from globalopt.budgets.example import example_budget
    >>> diff(example_budget(), example_budget(), (Path("a.json"), Path("b.json"))).whole.changed
    0
    """
    shapes = [{entry.name: (entry.d_out, entry.d_in) for entry in file.layers} for file in (before, after)]
    if shapes[0] != shapes[1]:
        name = min(set(shapes[0].items()) ^ set(shapes[1].items()))[0]
        raise ArtefactError(
            f"{sources[0]} and {sources[1]} are budgets of different models: {len(shapes[0])} layers and "
            f"{len(shapes[1])}; they differ first at {name}. Compare budgets of one model."
        )
    if before.fingerprint != after.fingerprint:
        raise ArtefactError(
            f"{sources[0]} and {sources[1]} are budgets of different models: same layers, other type or vocabulary. "
            "Compare budgets of one model."
        )
    accounting = before.accounting if before.accounting == after.accounting else "params"
    plans = {plan.name: plan for plan in _counted(after, accounting)}
    first = _counted(before, accounting)
    matrices = before.matrices, after.matrices
    return BudgetDiff(accounting, first, tuple(plans[plan.name] for plan in first), matrices)


def _counted(file: BudgetFile, accounting: str) -> tuple[LayerPlan, ...]:
    """Return the layers of a file with their costs in another accounting."""
    if file.accounting == accounting:
        return file.plans
    budget = Budget.fraction(1.0, [entry.spec for entry in file.layers], accounting)
    return tuple(
        replace(
            plan,
            cost=budget.cost(entry.target, entry.spec),
            dense_cost=budget.cost(Target.dense(entry.spec), entry.spec),
        )
        for plan, entry in zip(file.plans, file.layers, strict=True)
    )
