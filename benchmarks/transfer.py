"""Does a budget serve solvers it was not made with? Budgets of several allocators, each refined by several solvers.

    python benchmarks/transfer.py --out OUT [--budget 0.3] [--seeds 0 1 2] [--made-for 3basil] [--disturbed 12]
    python benchmarks/transfer.py --out OUT --solvers oats wanda --allocators knapsack auto@6500000
    python benchmarks/transfer.py --out OUT BUDGET.json [BUDGET.json ...]

Budgets are searched for one solver, `--made-for`, on its predicted losses, and refined by all. Ratios are of KL to the
best uniform budget under the same solver, by validation KL; the gain kept is `(1 - ratio) / (1 - ratio under the solver
it was made for)`. `--disturbed` adds knapsacks on surfaces whose levels are off by random factors, so that the rank
correlation of KL between solvers has allocations to go over. Files given must be of the same size; they stand beside
the others. Nothing is chosen on test.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import cells
import numpy as np
from allocator_contenders import UNIFORM, Contender, Disturbed, told_apart
from rich.console import Group as Stack
from rich.text import Text

from globalopt.budgets import budget_file
from globalopt.budgets.budget_file import BudgetFile
from globalopt.budgets.conversion import convert_target
from globalopt.errors import UsageError
from globalopt.pipeline import compress
from globalopt.pipeline.options import RefineOptions, SearchOptions
from globalopt.pipeline.plan import SearchPlan, resolve_refinement
from globalopt.pipeline.session import Session
from globalopt.runs.files import write_json
from globalopt.runs.folder import Run
from globalopt.values.budget import ACCOUNTINGS, Budget
from globalopt.values.results import Summary
from reports import formats
from reports.surrogate import rank_correlation
from reports.table_style import add_numbers, footed, report_table
from solvers import SOLVERS, get_solver

BASELINE = "uniform:rank_share=0.1"

Source = tuple[Path, BudgetFile]


@dataclass(frozen=True)
class Cell:
    """One budget refined by one solver, with its KL over that of the best uniform budget."""

    seed: int
    solver: str
    budget: str
    allocator: str
    summary: Summary
    ratios: Mapping[str, float | None]

    def kl(self, split: str) -> float:
        return cells.figures(self.summary)[split].kl

    def record(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "solver": self.solver,
            "budget": self.budget,
            "allocator": self.allocator,
            "used": self.summary.used,
            "total": self.summary.total,
            "seconds": cells.seconds(self.summary),
            **cells.split_records(self.summary, self.ratios),
        }


@dataclass(frozen=True)
class Found:
    """All cells, and the solver that the budgets were made for."""

    cells: Sequence[Cell]
    made_for: str

    @property
    def solvers(self) -> list[str]:
        return list(dict.fromkeys(cell.solver for cell in self.cells))

    @property
    def budgets(self) -> list[str]:
        """Those that stand in tables: without the disturbed ones."""
        return list(dict.fromkeys(cell.budget for cell in self.cells if cell.allocator != Disturbed.name))

    def of(self, solver: str, budget: str) -> list[Cell]:
        """One per seed."""
        return [cell for cell in self.cells if (cell.solver, cell.budget) == (solver, budget)]

    def kl(self, solver: str, budget: str, split: str) -> tuple[float, float | None]:
        """Mean over seeds and standard deviation between them."""
        kl = [cell.kl(split) for cell in self.of(solver, budget)]
        return fmean(kl), stdev(kl) if len(kl) > 1 else None

    def ratio(self, solver: str, budget: str, split: str) -> float | None:
        return cells.mean([cell.ratios[split] for cell in self.of(solver, budget)])

    def kept(self, solver: str, budget: str, split: str) -> float | None:
        """The gain kept, of mean ratios; None where there is none to keep."""
        ratio, own = self.ratio(solver, budget, split), self.ratio(self.made_for, budget, split)
        return None if ratio is None or own is None or own >= 1 else (1 - ratio) / (1 - own)

    def correlation(self, solver: str, split: str) -> float | None:
        """Spearman's over all budgets, of KL under the solver and under the one they were made for; mean over seeds."""
        by_seed = []
        for seed in dict.fromkeys(cell.seed for cell in self.cells):
            here, there = (
                np.array([cell.kl(split) for cell in self.cells if (cell.seed, cell.solver) == (seed, name)])
                for name in (solver, self.made_for)
            )
            by_seed.append(rank_correlation(here, there))
        return cells.mean(by_seed)

    def record(self, split: str) -> list[dict[str, Any]]:
        """Means over seeds, and what follows from them."""
        return [
            {
                "solver": solver,
                "budget": budget,
                "kl": self.kl(solver, budget, split)[0],
                "kl_spread": self.kl(solver, budget, split)[1],
                "ratio": self.ratio(solver, budget, split),
                "gain_kept": self.kept(solver, budget, split),
            }
            for solver in self.solvers
            for budget in self.budgets
        ]


def asked(options: argparse.Namespace, seed: int, contender: Contender) -> SearchPlan:
    """The search that makes one budget."""
    search = SearchOptions(
        budget=options.budget,
        accounting=options.accounting,
        pattern=options.pattern,
        solver=options.made_for,
        seed=seed,
    )
    return contender.plan(search)


def field(options: argparse.Namespace) -> list[Contender]:
    """What makes the budgets, uniform among them."""
    given: list[Contender] = options.allocators
    if not any(contender.allocator == UNIFORM for contender in given):
        given = [Contender.parse(BASELINE), *given]
    disturbed = [Contender(Disturbed.name, (("number", str(i)),)) for i in range(options.disturbed)]
    return [
        found
        for contender in told_apart([*given, *disturbed], options.made_for, options.pattern)
        for found in contender.at([options.tokens])
    ]


def given_files(options: argparse.Namespace) -> dict[str, Source]:
    """The files given, by name: runs call theirs budget.json, and their folder tells them apart."""
    names = [path.resolve().parent.name if path.stem == "budget" else path.stem for path in options.files]
    if len(set(names)) < len(names):
        names = [f"{i}-{name}" for i, name in enumerate(names, start=1)]
    return {f"file:{name}": (path, budget_file.read(path)) for name, path in zip(names, options.files, strict=True)}


def refuse_unfit(
    session: Session, files: Mapping[str, Source], options: argparse.Namespace, solvers: Sequence[str]
) -> None:
    """`UsageError` for a file of another size, or one that a solver cannot meet."""
    budget = Budget.fraction(options.budget, session.layers.specs, options.accounting)
    for path, file in files.values():
        if (file.limit, file.accounting) != (budget.limit, budget.accounting):
            raise UsageError(
                f"{path} is of {file.limit} {file.accounting}; the others keep {budget.limit} {budget.accounting}. "
                f"Give --budget {file.asked:g} --accounting {file.accounting}, or other files."
            )
        targets = file.for_model(session.fingerprint, session.layers.specs, path).targets
        for solver in solvers:
            for spec in session.layers.specs:
                convert_target(targets[spec.name], spec, get_solver(solver), budget)


def measure(options: argparse.Namespace, command: str) -> Found:
    """All cells, in the order of seeds, solvers, budgets."""
    contenders = field(options)
    for contender in contenders:
        asked(options, 0, contender)
    solvers = list(dict.fromkeys([*options.solvers, options.made_for]))
    for solver in solvers if options.pattern != "unstructured" else []:
        if not SOLVERS[solver].low_rank:
            raise UsageError(f"Solver {solver} has no low-rank part; budgets under a pattern differ in rank alone.")
    files = given_files(options)
    total = len(options.seeds) * len(solvers) * (len(contenders) + len(files))
    done = itertools.count(1)
    cache = cells.cache_of(options)
    made: list[Cell] = []
    for seed in options.seeds:
        folder: Path = options.out / f"seed{seed}"
        session = cells.set_up(options, seed)
        refuse_unfit(session, files, options, solvers)
        # First, so that the time of no cell holds the analysis.
        cells.analysed(session, asked(options, seed, contenders[0]), folder / "analysis", cache)
        sources: dict[str, Source] = {}
        measured: dict[str, dict[str, Summary]] = {solver: {} for solver in solvers}

        for contender in contenders:
            where = folder / options.made_for / cells.folder_name(contender.label)
            summary = cells.search(session, asked(options, seed, contender), where, command, cache)
            measured[options.made_for][contender.label] = summary
            cells.say(next(done), total, f"seed {seed}  {options.made_for}  {contender.label}", summary)
            path = Run.open(where).budget_path
            sources[contender.label] = path, budget_file.read(path)
        sources |= files
        for solver in solvers:
            plan = resolve_refinement(RefineOptions(), get_solver(solver), fisher=True, seed=seed)
            for label, source in sources.items():
                if label not in measured[solver]:
                    where = folder / solver / cells.folder_name(label)
                    with cells.dense_after(session):
                        summary, _ = compress.compress(session, cells.reporter(), plan, *source, where, command, cache)
                    measured[solver][label] = summary
                    cells.say(next(done), total, f"seed {seed}  {solver}  {label}", summary)
        uniform = [contender.label for contender in contenders if contender.allocator == UNIFORM]
        for solver, of in measured.items():
            baselines = [cells.figures(of[label]) for label in uniform]
            best = min(baselines, key=lambda figures: figures["validation"].kl)
            made += [
                Cell(seed, solver, label, file.allocator, of[label], cells.ratios(of[label], best))
                for label, (_, file) in sources.items()
            ]
    return Found(made, options.made_for)


def table(
    found: Found, title: str, shown: Callable[[str, str], str], notes: Sequence[str], split: str | None = None
) -> Stack:
    """A figure of every solver (rows) and budget (columns), with a `split` the rank correlation on it."""
    rows = report_table(title)
    rows.add_column("solver")
    add_numbers(rows, found.budgets)
    if split:
        add_numbers(rows, ["Spearman"])
    for solver in found.solvers:
        last = [cells.shown(found.correlation(solver, split))] if split else []
        rows.add_row(Text(solver), *(shown(solver, budget) for budget in found.budgets), *last)
    return footed(rows, *notes)


def tables(found: Found, split: str) -> list[Stack]:
    """KL, ratio, and the gain kept with the rank correlation, on one split."""
    seeds = len({cell.seed for cell in found.cells})
    dense = fmean(cells.figures(cell.summary)[split].dense.perplexity for cell in found.cells)
    allocations = len({cell.budget for cell in found.cells})
    return [
        table(
            found,
            f"KL on {split}",
            lambda solver, budget: formats.measured(*found.kl(solver, budget, split)),
            [
                f"to the dense model (perplexity {formats.significant(dense)}), nats per token; "
                f"means over {seeds} seeds, ±: standard deviation between them",
                f"budgets were made for {found.made_for}; without low rank, a rank's parameters are kept as nonzeros",
            ],
        ),
        table(
            found,
            f"Ratio on {split}",
            lambda solver, budget: cells.shown(found.ratio(solver, budget, split)),
            ["of KL to the best uniform budget under the same solver, by validation KL, seed by seed"],
        ),
        table(
            found,
            f"Gain kept on {split}",
            lambda solver, budget: cells.shown(found.kept(solver, budget, split)),
            [
                f"(1 - ratio) / (1 - ratio under {found.made_for}); -: there is no gain to keep",
                f"Spearman: of KL with that under {found.made_for}, over {allocations} budgets, mean over seeds",
            ],
            split,
        ),
    ]


def work(options: argparse.Namespace, command: str) -> None:
    found = measure(options, command)
    splits = list(found.cells[0].ratios)
    write_json(
        options.out / "transfer.json",
        {
            "command": command,
            "made_for": found.made_for,
            "budget": options.budget,
            "accounting": options.accounting,
            "pattern": options.pattern,
            "cells": [cell.record() for cell in found.cells],
            "means": {split: found.record(split) for split in splits},
            "spearman": {split: {s: found.correlation(s, split) for s in found.solvers} for split in splits},
        },
    )
    out = cells.console()
    for split in splits:
        for shown in tables(found, split):
            out.print(shown, "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cells.option_parser(__doc__)
    parser.add_argument("files", type=Path, nargs="*", metavar="BUDGET.json", help="made by `globalopt search`")
    parser.add_argument("--budget", type=float, default=0.3, help="fraction kept (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--solvers", nargs="+", default=["oats", "hassle-free", "3basil"], choices=list(SOLVERS), help="refine"
    )
    parser.add_argument("--made-for", default="3basil", choices=list(SOLVERS), help="refines too (%(default)s)")
    parser.add_argument(
        "--allocators",
        type=Contender.parse,
        nargs="+",
        default=[Contender.parse(text) for text in (BASELINE, "knapsack", "auto")],
        metavar="NAME[:OPTION=VALUE,...][@TOKENS]",
    )
    parser.add_argument(
        "--tokens", type=int, default=1_000_000, help="limit of those that use the objective (%(default)s)"
    )
    parser.add_argument("--disturbed", type=int, default=0, help="knapsacks on disturbed surfaces (%(default)s)")
    parser.add_argument("--pattern", default="unstructured", help="unstructured, or KEEP:OF such as 2:4")
    parser.add_argument("--accounting", default="params", choices=ACCOUNTINGS)
    return cells.run_script(work, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
