"""Which allocator finds the best budget, and for how many tokens? Held-out KL and perplexity, same solver, all seeds.

    python benchmarks/allocation.py --out OUT [--budgets 0.5 0.3 0.2] [--seeds 0 1 2] [--solver 3basil]
    python benchmarks/allocation.py --out OUT --allocators knapsack bernoulli:samples=4 evolution@6500000
    python benchmarks/allocation.py --out OUT --model FOLDER --calibration TEXT

An allocator that uses the objective is run at every limit of `--tokens`, or at its own limit after `@`. Beside those of
the package there is `knapsack@share:rank_share=X`, the knapsack with one rank share for all layers. Uniform is always
measured; ratios are to the best uniform contender by validation KL. Nothing is chosen on test. Every seed is analysed
once, for all budgets and allocators.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import cells
from allocator_contenders import TABLE, UNIFORM, Contender, told_apart
from allocators_figure import Point, allocators_figure
from rich.console import Group as Stack
from rich.text import Text

from globalopt.objective.of_run import CANDIDATES
from globalopt.pipeline.options import MATCHES, RefineOptions, SearchOptions
from globalopt.pipeline.plan import SearchPlan
from globalopt.runs.files import write_json
from globalopt.values.budget import ACCOUNTINGS
from globalopt.values.results import Summary
from reports import formats
from reports.figures import save
from reports.table_style import add_numbers, footed, report_table

UNIFORMS = ("uniform:rank_share=0", "uniform:rank_share=0.1")
FIELD = (
    *UNIFORMS,
    "owl",
    "alpha",
    "depth-ramp",
    "knapsack@share:rank_share=0",
    "knapsack@share:rank_share=0.1",
    "knapsack@share:rank_share=0.2",
    "knapsack@share:rank_share=0.3",
    "knapsack",
    "bernoulli:preset=cap",
    "bernoulli",
    "optuna",
    "evolution:preset=evopress",
    "evolution:preset=guided",
    "auto",
)


@dataclass(frozen=True)
class Cell:
    """One measured contender, with its KL over that of the best uniform contender of its budget and seed."""

    budget: float
    seed: int
    contender: Contender
    summary: Summary
    ratios: Mapping[str, float | None]
    selection: float
    analysis_tokens: int
    analysis_seconds: float

    @property
    def tokens(self) -> int:
        """Forward tokens of the analysis it needs and of its search."""
        return self.analysis_tokens + (self.summary.search.tokens if self.summary.search else 0)

    @property
    def gap(self) -> float | None:
        """`(predicted - bound) / predicted`, where there is a certificate."""
        predicted, bound = self.summary.predicted, self.summary.bound
        if bound is None or predicted is None:
            return None
        return max(0.0, predicted - bound) / predicted if predicted > 0 else 0.0

    @property
    def search_seconds(self) -> float:
        return cells.seconds(self.summary, cells.SEARCHES)

    @property
    def seconds(self) -> float:
        """All stages and the analysis."""
        return self.analysis_seconds + cells.seconds(self.summary)

    def kl(self, split: str) -> float:
        return cells.figures(self.summary)[split].kl

    def record(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            "seed": self.seed,
            "label": self.contender.label,
            "method": self.contender.method,
            "allocator": self.contender.allocator,
            "options": dict(self.contender.options),
            "limit": self.contender.limit,
            "tokens": self.tokens,
            "analysis_tokens": self.analysis_tokens,
            "selection_loss": self.selection,
            "predicted": self.summary.predicted,
            "bound": self.summary.bound,
            "gap": self.gap,
            "used": self.summary.used,
            "total": self.summary.total,
            "search_seconds": self.search_seconds,
            "analysis_seconds": self.analysis_seconds,
            "seconds": self.seconds,
            **cells.split_records(self.summary, self.ratios),
        }


@dataclass(frozen=True)
class Row:
    """A contender at a budget: means over seeds."""

    budget: float
    label: str
    cells: Sequence[Cell]

    def ratio(self, split: str) -> float | None:
        return cells.mean([cell.ratios[split] for cell in self.cells])

    def kl(self, split: str) -> float:
        return fmean(cell.kl(split) for cell in self.cells)

    def spread(self, split: str) -> float | None:
        """Standard deviation of KL between seeds; None for one."""
        return stdev(cell.kl(split) for cell in self.cells) if len(self.cells) > 1 else None

    def perplexity(self, split: str) -> float:
        return fmean(cells.figures(cell.summary)[split].compressed.perplexity for cell in self.cells)

    @property
    def tokens(self) -> float:
        return fmean(cell.tokens for cell in self.cells)

    def record(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            "allocator": self.label,
            "tokens": self.tokens,
            "selection_loss": fmean(cell.selection for cell in self.cells),
            "gap": cells.mean([cell.gap for cell in self.cells]),
            "search_seconds": fmean(cell.search_seconds for cell in self.cells),
            "seconds": fmean(cell.seconds for cell in self.cells),
            **{
                split: {
                    "kl": self.kl(split),
                    "kl_spread": self.spread(split),
                    "perplexity": self.perplexity(split),
                    "ratio": self.ratio(split),
                }
                for split in self.cells[0].ratios
            },
        }


def field(options: argparse.Namespace) -> list[Contender]:
    """The contenders that differ, each at its limits, uniform among them."""
    given: list[Contender] = options.allocators
    if not any(contender.allocator == UNIFORM for contender in given):
        given = [*map(Contender.parse, UNIFORMS), *given]
    return [
        found
        for contender in told_apart(given, options.solver, options.pattern)
        for found in contender.at(options.tokens)
    ]


def asked(options: argparse.Namespace, budget: float, seed: int, contender: Contender) -> SearchPlan:
    """The search of one cell."""
    search = SearchOptions(
        budget=budget,
        accounting=options.accounting,
        pattern=options.pattern,
        solver=options.solver,
        solver_options=dict(options.set),
        candidates=options.candidates,
        seed=seed,
    )
    return contender.plan(search, RefineOptions(match=options.match))


def best_uniform(measured: Mapping[Contender, Summary]) -> dict[str, cells.Figures]:
    """Figures of the uniform contender with the lowest validation KL."""
    uniform = [cells.figures(summary) for contender, summary in measured.items() if contender.allocator == UNIFORM]
    return min(uniform, key=lambda found: found["validation"].kl)


def measure(options: argparse.Namespace, command: str) -> list[Cell]:
    """All cells, in the order of seeds, budgets, contenders."""
    contenders = field(options)
    for budget in options.budgets:
        for contender in contenders:
            asked(options, budget, 0, contender)
    total = len(options.seeds) * len(options.budgets) * len(contenders)
    done = 0
    cache = cells.cache_of(options)
    made: list[Cell] = []
    for seed in options.seeds:
        folder: Path = options.out / f"seed{seed}"
        session = cells.set_up(options, seed)
        shared = asked(options, options.budgets[0], seed, contenders[0])
        analysed = cells.analysed(session, shared, folder / "analysis", cache)
        for budget in options.budgets:
            measured: dict[Contender, Summary] = {}
            losses: dict[Contender, float] = {}
            for contender in contenders:
                where = folder / f"{budget:g}" / cells.folder_name(contender.label)
                plan = asked(options, budget, seed, contender)
                measured[contender] = cells.search(session, plan, where, command, cache)
                losses[contender] = cells.selection_loss(analysed, plan, where)
                done += 1
                cells.say(done, total, f"seed {seed}  budget {budget:g}  {contender.label}", measured[contender])
            best = best_uniform(measured)
            made += [
                Cell(
                    budget,
                    seed,
                    contender,
                    summary,
                    cells.ratios(summary, best),
                    losses[contender],
                    cells.analysis_tokens(session, contender.predicted),
                    analysed.seconds,
                )
                for contender, summary in measured.items()
            ]
    return made


def rows_of(made: Sequence[Cell]) -> list[Row]:
    """By budget and contender, in the order of the cells."""
    groups: dict[tuple[float, str], list[Cell]] = {}
    for cell in made:
        groups.setdefault((cell.budget, cell.contender.label), []).append(cell)
    return [Row(*key, group) for key, group in groups.items()]


def table(rows: Sequence[Row], split: str) -> Stack:
    """The rows of one budget on one split."""
    shown = report_table(f"Allocation on {split}, kept {rows[0].budget:g}")
    shown.add_column("allocator", overflow="fold")
    add_numbers(shown, ("tokens", "selection", "KL to dense", "perplexity", "ratio", "gap", "search", "in all"))
    for row in rows:
        gap = cells.mean([cell.gap for cell in row.cells])
        shown.add_row(
            Text(row.label),
            formats.compact(round(row.tokens)),
            formats.significant(fmean(cell.selection for cell in row.cells)),
            formats.measured(row.kl(split), row.spread(split)),
            formats.significant(row.perplexity(split)),
            cells.shown(row.ratio(split)),
            "-" if gap is None else formats.share(gap),
            formats.duration(fmean(cell.search_seconds for cell in row.cells)),
            formats.duration(fmean(cell.seconds for cell in row.cells)),
        )
    made = [cell for row in rows for cell in row.cells]
    seeds = list(dict.fromkeys(cell.seed for cell in made))
    dense = fmean(cells.figures(cell.summary)[split].dense.perplexity for cell in made)
    return footed(
        shown,
        f"means over {len(seeds)} seeds, ±: standard deviation between them; "
        f"dense perplexity {formats.significant(dense)}; KL: nats per token",
        f"every cell uses at least {min(cell.summary.used / cell.summary.limit for cell in made):.4%} of its budget",
        "tokens: forward tokens of the analysis an allocator needs and of its search; a backward token counts two",
        "selection: KL on the selection text of the candidates that searches evaluate",
        "ratio: of KL to the best uniform by validation KL, seed by seed; below 1 the allocator is better",
        "in all: with the analysis that the cells of a seed share, refinement and evaluation",
    )


def point(row: Row, split: str) -> Point:
    """The row in the picture."""
    return Point(
        row.budget,
        row.cells[0].contender.method,
        row.tokens,
        tuple(cell.kl(split) for cell in row.cells),
        tuple(cells.figures(cell.summary)[split].compressed.perplexity for cell in row.cells),
        row.ratio(split),
    )


def work(options: argparse.Namespace, command: str) -> None:
    made = measure(options, command)
    rows = rows_of(made)
    write_json(
        options.out / "allocation.json",
        {
            "command": command,
            "solver": options.solver,
            "solver_options": dict(options.set),
            "pattern": options.pattern,
            "accounting": options.accounting,
            "candidates": options.candidates,
            "cells": [cell.record() for cell in made],
            "means": [row.record() for row in rows],
        },
    )
    title = f"allocators on validation, refined by {options.solver}, {len(options.seeds)} seeds"
    points = [point(row, "validation") for row in rows]
    save(allocators_figure(points, made[0].summary.model, title), options.out / "allocators.png")
    out = cells.console()
    for split in cells.figures(made[0].summary):
        for budget in options.budgets:
            out.print(table([row for row in rows if row.budget == budget], split), "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cells.option_parser(__doc__)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.3, 0.2], help="fractions kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--allocators",
        type=Contender.parse,
        nargs="+",
        default=[Contender.parse(text) for text in FIELD],
        metavar="NAME[:OPTION=VALUE,...][@TOKENS]",
        help=f"of {', '.join(TABLE)}; all if left out",
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1_000_000], help="limits of those that use the objective"
    )
    parser.add_argument(
        "--candidates", default="auto", choices=CANDIDATES, help="layers of the candidates that the objective evaluates"
    )
    cells.add_solver(parser)
    parser.add_argument("--match", default="none", choices=MATCHES, help="train what is kept, as `search` does")
    parser.add_argument("--pattern", default="unstructured", help="unstructured, or KEEP:OF such as 2:4")
    parser.add_argument("--accounting", default="params", choices=ACCOUNTINGS)
    return cells.run_script(work, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
