"""Which metric should a solver minimise? Held-out KL and perplexity of one solver at uniform budgets, several seeds.

    python benchmarks/metric.py --out OUT [--budgets 0.5 0.3 0.2 2:4@0.56] [--seeds 0 1 2] [--solver 3basil]
    python benchmarks/metric.py --out OUT --model FOLDER --calibration TEXT

`none`: the inputs' Gram G alone; `rows`: rows weighted by diag(A); `full`: `tr(A E G Eᵀ)`. A budget `2:4@0.56` keeps
0.56 of the parameters, under pattern 2:4. Every other budget spends a tenth on rank. The layer error on the calibration
text and the KL on text that nothing was chosen on stand side by side, so that overfitting shows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import cells
from rich.console import Console
from rich.console import Group as Stack
from rich.text import Text

from globalopt.pipeline.options import SearchOptions
from globalopt.pipeline.plan import SearchPlan, resolve
from globalopt.protocols import Outputs
from globalopt.runs.files import write_json
from globalopt.values.results import Summary
from reports import formats
from reports.table_style import add_numbers, footed, report_table

RANK_SHARE = "0.1"
BASELINE = Outputs.NONE


@dataclass(frozen=True)
class Cell:
    """One compression, with its KL over that of the baseline metric at the same budget and seed."""

    budget: str
    seed: int
    outputs: Outputs
    summary: Summary
    ratios: dict[str, float | None]

    @property
    def refine_seconds(self) -> float:
        """Seconds the solver took, all layers together."""
        return sum(layer.seconds for layer in self.summary.layers)

    @property
    def predicted(self) -> float:
        """`sum of tr(A E G Eᵀ) / 2` over the layers, on the calibration text."""
        return sum(layer.actual for layer in self.summary.layers)

    def record(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            "seed": self.seed,
            "outputs": self.outputs,
            "used": self.summary.used,
            "total": self.summary.total,
            "refine_seconds": self.refine_seconds,
            "layer_error": self.predicted,
            **cells.split_records(self.summary, self.ratios),
        }


def asked(budget: str, outputs: Outputs, options: argparse.Namespace, seed: int) -> SearchPlan:
    """The uniform search of one cell; `budget` as typed."""
    pattern, at, kept = budget.rpartition("@")
    search = SearchOptions(
        budget=float(kept),
        pattern=pattern if at else "unstructured",
        allocator="uniform",
        allocator_options={} if at else {"rank_share": RANK_SHARE},
        solver=options.solver,
        solver_options={**dict(options.set), "outputs": str(outputs)},
        predict_from="span",
        seed=seed,
    )
    return resolve(search)


def measure(options: argparse.Namespace, command: str) -> list[Cell]:
    """All cells, in the order of seeds, budgets, metrics."""
    for budget in options.budgets:
        for outputs in options.metrics:
            asked(budget, outputs, options, 0)
    total = len(options.seeds) * len(options.budgets) * len(options.metrics)
    done = 0
    cache = cells.cache_of(options)
    made: list[Cell] = []
    for seed in options.seeds:
        folder: Path = options.out / f"seed{seed}"
        session = cells.set_up(options, seed)
        for budget in options.budgets:
            measured: dict[Outputs, Summary] = {}
            for outputs in options.metrics:
                where = folder / budget.replace(":", "of") / outputs
                measured[outputs] = cells.search(session, asked(budget, outputs, options, seed), where, command, cache)
                done += 1
                cells.say(done, total, f"seed {seed}  budget {budget}  {outputs}", measured[outputs])
            baseline = cells.figures(measured[options.metrics[0]])
            made += [
                Cell(budget, seed, outputs, summary, cells.ratios(summary, baseline))
                for outputs, summary in measured.items()
            ]
    return made


def table(made: Sequence[Cell], split: str) -> Stack:
    """Means over the seeds on one split."""
    rows = report_table(f"Metric, on {split}")
    rows.add_column("budget")
    rows.add_column("metric")
    add_numbers(rows, ("KL to dense", "ratio", "perplexity", "layer error", "solver time"))
    for budget in dict.fromkeys(cell.budget for cell in made):
        for outputs in dict.fromkeys(cell.outputs for cell in made):
            group = [cell for cell in made if (cell.budget, cell.outputs) == (budget, outputs)]
            found = [cells.figures(cell.summary)[split] for cell in group]
            ratios = [ratio for cell in group if (ratio := cell.ratios[split]) is not None]
            rows.add_row(
                Text(budget),
                Text(outputs),
                formats.significant(fmean(figures.kl for figures in found)),
                cells.shown(fmean(ratios) if len(ratios) == len(group) else None),
                formats.significant(fmean(figures.compressed.perplexity for figures in found)),
                formats.significant(fmean(cell.predicted for cell in group)),
                formats.duration(fmean(cell.refine_seconds for cell in group)),
            )
    dense = fmean(cells.figures(cell.summary)[split].dense.perplexity for cell in made)
    return footed(
        rows,
        f"means over {len({cell.seed for cell in made})} seeds; dense perplexity {formats.significant(dense)}",
        f"ratio: of KL to metric {made[0].outputs}, seed by seed",
        "layer error: sum of tr(A E G Eᵀ) / 2 on the calibration text, nats per token",
    )


def work(options: argparse.Namespace, command: str) -> None:
    made = measure(options, command)
    write_json(
        options.out / "metric.json",
        {
            "command": command,
            "solver": options.solver,
            "solver_options": dict(options.set),
            "cells": [cell.record() for cell in made],
        },
    )
    out = Console()
    for split in cells.figures(made[0].summary):
        out.print(table(made, split), "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cells.option_parser(__doc__)
    parser.add_argument("--budgets", nargs="+", default=["0.5", "0.3", "0.2", "2:4@0.56"], help="KEPT or PATTERN@KEPT")
    parser.add_argument("--metrics", type=Outputs, nargs="+", default=list(Outputs), choices=list(Outputs))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    cells.add_solver(parser)
    return cells.run_script(work, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
