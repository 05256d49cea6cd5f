"""Do prices and candidates tell what a layer loses? The model is asked, with one layer at a time replaced.

    python benchmarks/prices.py --out OUT [--blocks 3 6] [--kept 0.2 0.3 0.4] [--shares 0 0.05 0.1 0.15 0.2 0.25 0.3]
    python benchmarks/prices.py --out OUT --model FOLDER --calibration TEXT

Every layer of the blocks is fitted by the solver at every kept fraction and rank share, in the metric that a search
chose for it. Beside the loss of the fit stands that of the candidate at the same target: what a search asks about
without a fit. Both are KL to the dense model on selection windows, over the price of the target.
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

from globalopt.analysis.grid import Options
from globalopt.errors import UsageError
from globalopt.models.walk import Batch, BlockRunner
from globalopt.objective.candidates import FittedLayer
from globalopt.objective.kl_to_dense import ModelObjective
from globalopt.pipeline.options import SearchOptions
from globalopt.pipeline.search import pose
from globalopt.pipeline.session import Bench
from globalopt.protocols import Solver
from globalopt.runs.files import write_json
from globalopt.runs.folder import Run
from globalopt.values.layer import LayerSpec
from globalopt.values.metric import Metric
from globalopt.values.problem import Problem
from reports.tables import add_numbers, footed, report_table
from solvers import get_solver


@dataclass(frozen=True)
class Point:
    """A layer at one target: its price, and what the model loses by the fit and by the candidate, nats per token."""

    layer: str
    kind: str
    kept: float
    share: float
    price: float
    fit: float
    candidate: float


def points(
    bench: Bench, problem: Problem, analysis: Run, solver: Solver, spec: LayerSpec, options: argparse.Namespace
) -> list[Point]:
    """Those of one layer."""
    surface = next(surface for surface in problem.surfaces if surface.spec == spec)
    layer = FittedLayer(surface, *analysis.read_fits(spec), analysis.read_overlap(spec))
    grid = Options.of(spec, analysis.read_span(spec).max_rank)
    weight = bench.layers.weight(spec.name)
    state = solver.prepare(weight, Metric(analysis.read_gram(spec.site), analysis.chosen_outputs(spec)))
    windows = bench.splits.selection.windows[: options.windows]
    objective = ModelObjective(BlockRunner(bench.layers, [Batch(windows)]))
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
    solver = get_solver(options.solver, dict(options.set))
    bench = cells.set_up(options, options.seed)
    if unknown := sorted(set(options.blocks) - {spec.block for spec in bench.layers.specs}):
        raise UsageError(f"The model has no block {', '.join(map(str, unknown))}.")
    analysis = cells.analysed(
        bench, "unstructured", options.seed, options.out / "analysis", options.solver, solver_options=dict(options.set)
    )
    if not all(analysis.fits_path(spec).exists() for spec in bench.layers.specs):
        raise UsageError(f"Solver {solver.name} moves no weight it keeps, so nothing was fitted; take another.")
    problem = pose(bench, search, analysis)
    common = {"analysis": analysis.manifest["fingerprint"], "windows": options.windows}
    store = Cells(options.out / "cells", {**common, "kept": options.kept, "shares": options.shares})
    made: list[Point] = []
    for spec in bench.layers.specs:
        if spec.block in options.blocks:

            def compute(spec: LayerSpec = spec) -> list[Point]:
                return points(bench, problem, analysis, solver, spec, options)

            made += store.get(list[Point], spec.name, {}, compute)
            cells.err.print(spec.name, highlight=False)
    return made


def mean(made: Sequence[Point], of: str) -> str:
    """Geometric mean over the points of what is lost over the price, and the root mean square of its logarithm."""
    logs = [math.log(getattr(point, of) / point.price) for point in made if point.price > 0 and getattr(point, of) > 0]
    if not logs:
        return "-"
    return f"{math.exp(fmean(logs)):.2f} ±{math.sqrt(fmean(log * log for log in logs)):.2f}"


def table(made: Sequence[Point], options: argparse.Namespace) -> Stack:
    """By kind and by rank share."""
    rows = report_table("Measured loss of one layer over its price")
    rows.add_column("layers")
    add_numbers(rows, ("points", "fit", "candidate"))
    groups = [(kind, [p for p in made if p.kind == kind]) for kind in dict.fromkeys(p.kind for p in made)]
    groups += [(f"rank share {share:g}", [p for p in made if p.share == share]) for share in options.shares]
    for label, group in [*groups, ("all", list(made))]:
        rows.add_row(Text(label), str(len(group)), mean(group, "fit"), mean(group, "candidate"))
    return footed(
        rows,
        f"geometric means, ±: root mean square of the logarithm; KL on {options.windows} selection windows",
        f"fit: by {options.solver}; candidate: what a search asks about in its place",
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
