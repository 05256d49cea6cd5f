"""Do predicted losses and candidates agree with the true loss of a layer? One layer at a time is replaced.

    python benchmarks/prices.py --out OUT [--blocks 3 6] [--kept 0.2 0.3 0.4] [--shares 0 0.05 0.1 0.15 0.2 0.25 0.3]
    python benchmarks/prices.py --out OUT --model FOLDER --calibration TEXT

Every layer of the blocks is solved by the solver at every kept fraction and rank share, in the metric that a search
chose for it. Beside the loss of the solution stands that of the candidate at the same target, which a search evaluates
in its place. Both are KL to the dense model on selection windows, over the predicted loss of the target.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import cells
from finished_cells import Cells
from rich.console import Group as Stack
from rich.text import Text

from globalopt.analysis.layer_analysis import read_gap
from globalopt.errors import UsageError
from globalopt.models.batch import Batch
from globalopt.models.block_runner import BlockRunner
from globalopt.objective.candidates import AnchoredLayer
from globalopt.objective.kl_to_dense import ModelObjective
from globalopt.pipeline.options import SearchOptions
from globalopt.pipeline.plan import resolve
from globalopt.protocols import Solver
from globalopt.runs.artefacts import PREDICTION
from globalopt.runs.files import write_json
from globalopt.values.layer import LayerSpec
from globalopt.values.problem import Problem
from reports.table_style import add_numbers, footed, report_table


@dataclass(frozen=True)
class Point:
    """A layer at one target: its predicted loss, and those of the model with the solution and with the candidate."""

    layer: str
    kind: str
    kept: float
    share: float
    price: float
    fit: float
    candidate: float


def points(
    analysed: cells.Analysed, problem: Problem, solver: Solver, spec: LayerSpec, options: argparse.Namespace
) -> list[Point]:
    """Those of one layer."""
    session, analysis = analysed.session, analysed.analysis
    surface = next(surface for surface in problem.surfaces if surface.spec == spec)
    weight, grid = session.layers.weight(spec.name), analysis.options(spec)
    residuals = analysis.residuals(spec, weight, read_gap(analysis))
    overlap = analysed.run.get(PREDICTION, spec).overlap
    assert overlap is not None, "anchor solutions were predicted too"
    layer = AnchoredLayer(surface, residuals.rows, residuals.tensor, overlap)
    state = solver.prepare(weight, analysis.metric(spec))
    windows = session.splits.selection.windows[: options.windows]
    objective = ModelObjective(BlockRunner(session.layers, [Batch(windows)]))
    found = []
    try:
        for kept in options.kept:
            for share in options.shares:
                target = grid.sharing(kept, share)
                made = solver.solve(state, target).value.dense(), layer.weight(weight, target)
                losses = objective.losses_of([{spec.name: each} for each in made], [0]).mean(1).tolist()
                found.append(Point(spec.name, spec.kind, kept, share, surface.predict(target), *losses))
    finally:
        objective.close()
    return found


def measure(options: argparse.Namespace) -> list[Point]:
    """All points, layer by layer; a layer that is finished is read back."""
    search = SearchOptions(budget=1.0, solver=options.solver, solver_options=dict(options.set), seed=options.seed)
    plan = resolve(search)
    if not plan.analysis.anchors:
        raise UsageError(f"Solver {options.solver} moves no weight it keeps, so there are no candidates; take another.")
    session = cells.set_up(options, options.seed)
    if unknown := sorted(set(options.blocks) - {spec.block for spec in session.layers.specs}):
        raise UsageError(f"The model has no block {', '.join(map(str, unknown))}.")
    analysed = cells.analysed(session, plan, options.out / "analysis", cells.cache_of(options))
    problem = analysed.problem(plan)
    common = {"analysis": analysed.run.manifest["fingerprint"], "windows": options.windows}
    store = Cells(options.out / "cells", {**common, "kept": options.kept, "shares": options.shares})
    made: list[Point] = []
    for spec in session.layers.specs:
        if spec.block in options.blocks:

            def compute(spec: LayerSpec = spec) -> list[Point]:
                return points(analysed, problem, plan.analysis.solver, spec, options)

            made += store.get(list[Point], spec.name, {}, compute)
            cells.err.print(spec.name, highlight=False)
    return made


def mean(made: Sequence[Point], of: str) -> str:
    """Geometric mean over the points of the true loss over the predicted one, and the root mean square of its log."""
    logs = [math.log(getattr(point, of) / point.price) for point in made if point.price > 0 and getattr(point, of) > 0]
    if not logs:
        return "-"
    return f"{math.exp(fmean(logs)):.2f} ±{math.sqrt(fmean(log * log for log in logs)):.2f}"


def table(made: Sequence[Point], options: argparse.Namespace) -> Stack:
    """By kind and by rank share."""
    rows = report_table("True loss of one layer over its predicted loss")
    rows.add_column("layers")
    add_numbers(rows, ("points", "fit", "candidate"))
    groups = [(kind, [p for p in made if p.kind == kind]) for kind in dict.fromkeys(p.kind for p in made)]
    groups += [(f"rank share {share:g}", [p for p in made if p.share == share]) for share in options.shares]
    for label, group in [*groups, ("all", list(made))]:
        rows.add_row(Text(label), str(len(group)), mean(group, "fit"), mean(group, "candidate"))
    return footed(
        rows,
        f"geometric means, ±: root mean square of the logarithm; KL on {options.windows} selection windows",
        f"fit: by {options.solver}; candidate: what a search evaluates in its place",
        f"kept {', '.join(f'{kept:g}' for kept in options.kept)}; blocks {', '.join(map(str, options.blocks))}",
    )


def work(options: argparse.Namespace, command: str) -> None:
    made = measure(options)
    write_json(options.out / "prices.json", {"command": command, "points": [asdict(point) for point in made]})
    cells.console().print(table(made, options))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cells.option_parser(__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 6])
    parser.add_argument("--kept", type=float, nargs="+", default=[0.2, 0.3, 0.4], help="fractions kept")
    parser.add_argument("--shares", type=float, nargs="+", default=[0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3])
    parser.add_argument("--windows", type=int, default=32, help="selection windows (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    cells.add_solver(parser)
    return cells.run_script(work, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
