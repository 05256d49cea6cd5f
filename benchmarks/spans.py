"""Which spans and predictions lead to the best budget and model? Every scaling, with and without anchor solutions.

    python benchmarks/spans.py --out OUT [--budgets 0.5 0.3 0.2] [--seeds 0 1 2]
        [--span-scaling ...] [--predict-from ...]
    python benchmarks/spans.py --out OUT --model FOLDER --calibration TEXT

One allocator and one solver for all. The solver does not read the spans: they decide the predicted losses, and so the
budget.
Ratios are of KL to the first scaling and basis of predictions that is given, seed by seed. Nothing is chosen on test.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import cells
from allocator_contenders import Contender
from rich.console import Group as Stack
from rich.text import Text

from globalopt.analysis.spans import SCALINGS
from globalopt.pipeline.options import PREDICT_FROM, SearchOptions
from globalopt.pipeline.plan import SearchPlan
from globalopt.runs.files import write_json
from globalopt.runs.folder import Run
from globalopt.values.results import Summary
from reports import formats
from reports.table_style import add_numbers, footed, report_table


@dataclass(frozen=True)
class Cell:
    """One compression; `selection` is its loss on its own candidates, `fitted` on those all cells of a seed share."""

    budget: float
    seed: int
    scaling: str
    predict_from: str
    summary: Summary
    ratios: Mapping[str, float | None]
    selection: float
    fitted: float | None

    def kl(self, split: str) -> float:
        return cells.figures(self.summary)[split].kl

    def record(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            "seed": self.seed,
            "scaling": self.scaling,
            "predict_from": self.predict_from,
            "predicted": self.summary.predicted,
            "selection_loss": self.selection,
            "fitted_loss": self.fitted,
            "used": self.summary.used,
            "total": self.summary.total,
            **cells.split_records(self.summary, self.ratios),
        }


def asked(options: argparse.Namespace, budget: float, seed: int, scaling: str, predict_from: str) -> SearchPlan:
    """The search of one cell."""
    search = SearchOptions(
        budget=budget,
        solver=options.solver,
        solver_options=dict(options.set),
        scaling=scaling,
        predict_from=predict_from,
        seed=seed,
    )
    return options.allocator.plan(search)


def measure(options: argparse.Namespace, command: str) -> list[Cell]:
    """All cells, in the order of seeds, budgets, scalings, pricings."""
    kinds = list(itertools.product(options.span_scaling, options.predict_from))
    for budget in options.budgets:
        asked(options, budget, 0, *kinds[0])
    total = len(options.seeds) * len(options.budgets) * len(kinds)
    done = 0
    cache = cells.cache_of(options)
    made: list[Cell] = []
    for seed in options.seeds:
        folder: Path = options.out / f"seed{seed}"
        session = cells.set_up(options, seed)
        analyses = {
            kind: cells.analysed(
                session, asked(options, options.budgets[0], seed, *kind), folder / f"analysis-{'-'.join(kind)}", cache
            )
            for kind in kinds
        }
        # Predictions of a solver that moves no weight are the spans' own.
        judge = next((kind for kind in kinds if asked(options, 1.0, seed, *kind).analysis.anchors), None)
        for budget in options.budgets:
            measured: dict[tuple[str, str], Summary] = {}
            losses: dict[tuple[str, str], tuple[float, float | None]] = {}
            for kind in kinds:
                where = folder / f"{budget:g}" / "-".join(kind)
                plan = asked(options, budget, seed, *kind)
                measured[kind] = cells.search(session, plan, where, command, cache)
                fitted = None
                if judge is not None:
                    targets = cells.targets_of(session, Run.open(where))
                    fitted = analyses[judge].loss(asked(options, budget, seed, *judge), targets)
                losses[kind] = cells.selection_loss(analyses[kind], plan, where), fitted
                done += 1
                cells.say(done, total, f"seed {seed}  budget {budget:g}  {' '.join(kind)}", measured[kind])
            baseline = cells.figures(measured[kinds[0]])
            made += [
                Cell(budget, seed, *kind, summary, cells.ratios(summary, baseline), *losses[kind])
                for kind, summary in measured.items()
            ]
    return made


def table(made: Sequence[Cell], split: str) -> Stack:
    """Means over the seeds on one split."""
    rows = report_table(f"Spans, on {split}")
    add_numbers(rows, ("budget",))
    rows.add_column("scaling")
    rows.add_column("predicted from")
    add_numbers(rows, ("KL to dense", "ratio", "perplexity", "predicted", "selection", "on fits"))
    groups: dict[tuple[float, str, str], list[Cell]] = {}
    for cell in made:
        groups.setdefault((cell.budget, cell.scaling, cell.predict_from), []).append(cell)
    for (budget, scaling, predict_from), group in groups.items():
        kl = [cell.kl(split) for cell in group]
        fitted = cells.mean([cell.fitted for cell in group])
        rows.add_row(
            f"{budget:g}",
            Text(scaling),
            Text(predict_from),
            formats.measured(fmean(kl), stdev(kl) if len(kl) > 1 else None),
            cells.shown(cells.mean([cell.ratios[split] for cell in group])),
            formats.significant(fmean(cells.figures(cell.summary)[split].compressed.perplexity for cell in group)),
            formats.significant(fmean(p for cell in group if (p := cell.summary.predicted) is not None)),
            formats.significant(fmean(cell.selection for cell in group)),
            "-" if fitted is None else formats.significant(fitted),
        )
    dense = fmean(cells.figures(cell.summary)[split].dense.perplexity for cell in made)
    return footed(
        rows,
        f"means over {len({cell.seed for cell in made})} seeds, ±: standard deviation between them; "
        f"dense perplexity {formats.significant(dense)}; KL: nats per token",
        f"ratio: of KL to {made[0].scaling} spans, predicted from {made[0].predict_from}, seed by seed",
        "selection: KL on the selection text of candidates made as the row's own search would",
        "on fits: the same of candidates made from the first anchor solutions, alike for all rows",
    )


def work(options: argparse.Namespace, command: str) -> None:
    made = measure(options, command)
    write_json(
        options.out / "spans.json",
        {
            "command": command,
            "allocator": options.allocator.label,
            "solver": options.solver,
            "solver_options": dict(options.set),
            "cells": [cell.record() for cell in made],
        },
    )
    out = cells.console()
    for split in cells.figures(made[0].summary):
        out.print(table(made, split), "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cells.option_parser(__doc__)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.3, 0.2], help="fractions kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--span-scaling", nargs="+", default=list(SCALINGS), choices=SCALINGS)
    parser.add_argument("--predict-from", nargs="+", default=["anchors", "span"], choices=PREDICT_FROM)
    parser.add_argument("--allocator", type=Contender.parse, default=Contender("knapsack"))
    cells.add_solver(parser)
    return cells.run_script(work, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
