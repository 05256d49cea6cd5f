"""Does a searched budget beat the best uniform one? Held-out KL and perplexity, same solver, several budgets and seeds.

    python benchmarks/allocation.py --out OUT [--budgets 0.5 0.3 0.2] [--seeds 0 1 2] [--solver 3basil]
    python benchmarks/allocation.py --out OUT --model FOLDER --calibration TEXT

Uniform is measured sparse only and with a tenth of its parameters as rank. Ratios are to the better of the two by
validation KL; nothing is chosen on test. Every seed is analysed once, for all budgets and allocators.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import cells
from rich.console import Console
from rich.console import Group as Stack
from rich.text import Text

from allocators import ALLOCATORS
from globalopt.pipeline import SearchOptions, check_options
from globalopt.store import write_json
from globalopt.summary import Summary
from globalopt.types import ACCOUNTINGS
from reports import formats
from reports.tables import add_numbers, divergence, footed, report_table
from solvers import SOLVERS

UNIFORM = "uniform"
RANK_SHARES = ("0", "0.1")


@dataclass(frozen=True)
class Contender:
    """An allocator, and the rank share it is given where it takes one."""

    allocator: str
    rank_share: str | None = None

    @property
    def label(self) -> str:
        return self.allocator if self.rank_share is None else f"{self.allocator} {self.rank_share}"

    @property
    def options(self) -> dict[str, str]:
        return {} if self.rank_share is None else {"rank_share": self.rank_share}


@dataclass(frozen=True)
class Cell:
    """One measured contender, with its KL over that of the best uniform contender of its budget and seed."""

    budget: float
    seed: int
    contender: Contender
    summary: Summary
    ratios: Mapping[str, float | None]
    analysis_seconds: float

    def record(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            "seed": self.seed,
            "label": self.contender.label,
            **asdict(self.contender),
            "used": self.summary.used,
            "total": self.summary.total,
            "seconds": cells.seconds(self.summary),
            "analysis_seconds": self.analysis_seconds,
            **cells.split_records(self.summary, self.ratios),
        }


def contenders(allocators: Sequence[str], solver: str, pattern: str) -> list[Contender]:
    """Uniform at every rank share that makes a difference, then the others."""
    # A pattern leaves uniform no choice of rank, and neither does a solver without low rank.
    free = pattern == "unstructured" and SOLVERS[solver].low_rank
    uniform = [Contender(UNIFORM, share) for share in RANK_SHARES] if free else [Contender(UNIFORM)]
    return [*uniform, *(Contender(name) for name in allocators)]


def best_uniform(measured: Mapping[Contender, Summary]) -> dict[str, cells.Figures]:
    """Figures of the uniform contender with the lowest validation KL."""
    uniform = [cells.figures(summary) for contender, summary in measured.items() if contender.allocator == UNIFORM]
    return min(uniform, key=lambda found: found["validation"].kl)


def measure(options: argparse.Namespace, command: str) -> list[Cell]:
    """All cells, in the order of seeds, budgets, contenders."""
    solver_options = dict(options.set)
    field_of = contenders(options.allocators, options.solver, options.pattern)

    def asked(budget: float, seed: int, contender: Contender) -> SearchOptions:
        return SearchOptions(
            budget=budget,
            accounting=options.accounting,
            pattern=options.pattern,
            allocator=contender.allocator,
            allocator_options=contender.options,
            solver=options.solver,
            solver_options=solver_options,
            seed=seed,
        )

    for budget in options.budgets:
        for contender in field_of:
            check_options(asked(budget, 0, contender))
    total = len(options.seeds) * len(options.budgets) * len(field_of)
    done = 0
    made: list[Cell] = []
    for seed in options.seeds:
        folder: Path = options.out / f"seed{seed}"
        bench = cells.set_up(options, seed)
        analysis = cells.analysed(bench, options.pattern, seed, folder / "analysis", options.solver)
        for budget in options.budgets:
            measured = {}
            for contender in field_of:
                where = folder / f"{budget:g}" / contender.label.replace(" ", "-")
                summary = cells.search(bench, asked(budget, seed, contender), analysis, where, command)
                measured[contender] = summary
                done += 1
                cells.say(done, total, f"seed {seed}  budget {budget:g}  {contender.label}", summary)
            best = best_uniform(measured)
            made += [
                Cell(budget, seed, contender, summary, cells.ratios(summary, best), cells.analysis_seconds(analysis))
                for contender, summary in measured.items()
            ]
    return made


def mean_ratios(made: Sequence[Cell]) -> dict[tuple[float, str], dict[str, float | None]]:
    """Mean over seeds of the ratios, by budget and contender, then by split; uniform is left out."""
    groups: dict[tuple[float, str], list[Cell]] = {}
    for cell in made:
        if cell.contender.allocator != UNIFORM:
            groups.setdefault((cell.budget, cell.contender.label), []).append(cell)
    return {
        key: {split: _mean([cell.ratios[split] for cell in group]) for split in group[0].ratios}
        for key, group in groups.items()
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def table(made: Sequence[Cell], split: str) -> Stack:
    """All cells on one split."""
    rows = report_table(f"Allocation on {split}")
    add_numbers(rows, ("budget", "seed"))
    rows.add_column("allocator", no_wrap=True)
    add_numbers(rows, ("KL to dense", "perplexity", "ratio", "time"))
    for cell in made:
        found = cells.figures(cell.summary)[split]
        rows.add_row(
            f"{cell.budget:g}",
            str(cell.seed),
            Text(cell.contender.label),
            divergence(found.compressed),
            formats.significant(found.compressed.perplexity),
            cells.shown(cell.ratios[split]),
            formats.duration(cells.seconds(cell.summary)),
        )
    analysis = formats.duration(fmean(cell.analysis_seconds for cell in made))
    dense = cells.figures(made[0].summary)[split].dense
    return footed(
        rows,
        f"dense perplexity {formats.significant(dense.perplexity)}; KL: nats per token",
        f"every cell uses at least {min(cell.summary.used / cell.summary.limit for cell in made):.4%} of its budget",
        "ratio: of KL to the best uniform by validation KL",
        f"time: without the analysis that the cells of a seed share, {analysis}",
    )


def ratio_table(means: Mapping[tuple[float, str], Mapping[str, float | None]], seeds: Sequence[int]) -> Stack:
    """The mean ratio of every budget."""
    rows = report_table("Mean ratio of KL to the best uniform")
    add_numbers(rows, ("budget",))
    rows.add_column("allocator")
    splits = list(next(iter(means.values()), {}))
    add_numbers(rows, splits)
    for (budget, label), ratios in means.items():
        rows.add_row(f"{budget:g}", Text(label), *(cells.shown(ratios[split]) for split in splits))
    return footed(rows, f"seeds: {', '.join(map(str, seeds))}; below 1 the allocator is better")


def work(options: argparse.Namespace, command: str) -> None:
    made = measure(options, command)
    means = mean_ratios(made)
    write_json(
        options.out / "allocation.json",
        {
            "command": command,
            "solver": options.solver,
            "solver_options": dict(options.set),
            "pattern": options.pattern,
            "accounting": options.accounting,
            "cells": [cell.record() for cell in made],
            "mean_ratios": [
                {"budget": budget, "allocator": label, **ratios} for (budget, label), ratios in means.items()
            ],
        },
    )
    out = Console()
    for split in cells.figures(made[0].summary):
        out.print(table(made, split), "")
    out.print(ratio_table(means, options.seeds))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cells.option_parser(__doc__)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.3, 0.2], help="fractions kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--allocators",
        nargs="+",
        default=["knapsack"],
        choices=[name for name in ALLOCATORS if name != UNIFORM],
        help="against uniform",
    )
    parser.add_argument("--solver", default="3basil", choices=list(SOLVERS))
    parser.add_argument(
        "--set", type=cells.option_pair, nargs="+", default=[], metavar="NAME=VALUE", help="solver options"
    )
    parser.add_argument("--pattern", default="unstructured", help="unstructured, or KEEP:OF such as 2:4")
    parser.add_argument("--accounting", default="params", choices=ACCOUNTINGS)
    return cells.run_script(work, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
