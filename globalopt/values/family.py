"""Collect the allocations of a family of budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from globalopt.values.error_unit import ErrorUnit
from globalopt.values.search_record import Outcome
from globalopt.values.stage_cost import StageCost


@dataclass(frozen=True)
class FamilyPoint(Outcome):
    """Record the allocation of one budget of a family.

    Args:
        asked: fraction to be kept. limit: the same in the budget's unit.
        file: path of the budget file, relative to the run folder.
        bound: a proved lower bound on the prediction of every allocation within this budget, nested or not.
        gap: `(predicted - bound) / predicted`.
        uniform: outcome of the uniform allocation of the same budget.

    >>> uniform = Outcome(2048, predicted=0.050, measured=None, stderr=None)
    >>> point = FamilyPoint(
    ...     2048, 0.040, None, None, asked=0.5, limit=2048, file="0.5.json", bound=0.039, gap=0.025, uniform=uniform
    ... )
    >>> f"{1 - point.predicted / point.uniform.predicted:.0%} below uniform"
    '20% below uniform'
    """

    asked: float
    limit: int
    file: str
    bound: float
    gap: float
    uniform: Outcome


@dataclass(frozen=True)
class Family:
    """Collect nested budgets of one analysis: no layer keeps more at a smaller budget than at a larger one.

    Args:
        command, model, seed, accounting, versions: as in `Summary`.
        solver, solver_options: the solver that the losses were predicted for.
        pattern: as text, "unstructured" or "2:4".
        total: cost of the dense layers, in the budget's unit.
        error_unit: unit of the predictions.
        candidates: how the layers of measured candidates were made, "anchors" or "span"; None where nothing was
            measured.
        windows, seqlen: of the selection text.
        left_out: fractions that were asked for but cannot be reached with the pattern.
        stages: cost of every stage.
        points: one per budget, ascending in the fraction kept.

    >>> uniform = Outcome(2048, predicted=0.050, measured=None, stderr=None)
    >>> point = FamilyPoint(2048, 0.04, None, None, 0.5, 2048, "0.5.json", 0.039, 0.025, uniform)
    >>> family = Family(
    ...     "globalopt family", "reference", "3basil", {}, seed=0, accounting="params", pattern="unstructured",
    ...     total=4096, error_unit=ErrorUnit.NATS, candidates=None, windows=64, seqlen=128, left_out=(), stages=(),
    ...     versions={},
    ...     points=(point,),
    ... )
    >>> [point.limit / family.total for point in family.points]
    [0.5]
    """

    command: str
    model: str
    solver: str
    solver_options: Mapping[str, str]
    seed: int
    accounting: str
    pattern: str
    total: int
    error_unit: ErrorUnit
    candidates: str | None
    windows: int
    seqlen: int
    left_out: tuple[float, ...]
    stages: tuple[StageCost, ...]
    versions: Mapping[str, str]
    points: tuple[FamilyPoint, ...]
