"""What does each part of a refinement add? Held-out KL and perplexity, from published 3BASiL up to the whole pipeline.

    python benchmarks/refine.py --out OUT [--budgets 0.5 0.3 0.2 2:4@0.56] [--seeds 0 1 2]
    python benchmarks/refine.py --out OUT --budgets 0.3 --rungs --solvers wanda sparsegpt oats hassle-free
    python benchmarks/refine.py --out OUT --model FOLDER --calibration TEXT

Rungs of the ladder: `published` is a transcription of 3BASiL at a uniform budget, `published+tm` its transformer
matching on top with the published settings; `solver` is our 3basil at the same budget, `allocation` gives it the budget
of `--allocator`, `matching` and `model` match blocks and then the whole model. With `--solvers` every solver is run at
the uniform budget without and with block matching. A budget `2:4@0.56` keeps 0.56 of the parameters under pattern 2:4;
the other uniform budgets spend a tenth on rank. The gap is the perplexity above the dense model's; its ratio is to
`published+tm`, or to what the solver does without matching.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import cells
import torch
from from_tests import randomized, three_basil
from rich.console import Group as Stack
from rich.text import Text
from torch import Tensor

from globalopt.budgets import budget_file
from globalopt.budgets.budget_file import BudgetFile
from globalopt.pipeline import compress
from globalopt.pipeline.addresses import search_addresses
from globalopt.pipeline.options import RefineOptions, SearchOptions
from globalopt.pipeline.plan import SearchPlan, resolve, resolve_refinement
from globalopt.pipeline.reuse import opened
from globalopt.pipeline.search import allocated, budget_of, search_identity
from globalopt.pipeline.session import Session
from globalopt.protocols import Solver
from globalopt.runs.cache import Cache
from globalopt.runs.files import write_json
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Solution
from globalopt.values.metric import Metric
from globalopt.values.results import Summary
from reports import formats
from reports.table_style import add_numbers, footed, report_table
from solvers import SOLVERS, get_solver

RANK_SHARE = "0.1"
BLOCK = RefineOptions(match="block")


@dataclass(frozen=True)
class Published(Solver[tuple[Tensor, Metric]]):
    """The transcription of the published 3BASiL loop as a solver."""

    name: ClassVar[str] = "3basil-published"
    paper: ClassVar[str] = "arXiv:2603.01376"

    def prepare(self, weight: Tensor, metric: Metric) -> tuple[Tensor, Metric]:
        return weight, metric

    def solve(self, state: tuple[Tensor, Metric], target: Target, start: Decomposition | None = None) -> Solution:
        weight, metric = state
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            S, L = three_basil.fit(
                weight,
                metric.inputs.matrix,
                target.rank,
                target.nnz,
                target.pattern,
                dtype=torch.float32,
                svd=randomized,
            )
        U, s, Vh = torch.linalg.svd(L, full_matrices=False)
        value = Decomposition(S, U[:, : target.rank] * s[: target.rank], Vh[: target.rank])
        return Solution(value, metric.error(weight - value.dense()))


@dataclass(frozen=True, eq=False)
class Rung:
    """One way to refine.

    Args:
        baseline: label of the rung that ratios are to.
        searched: whether the budget is the allocator's, else the uniform one.
    """

    label: str
    baseline: str
    solver: Solver
    refining: RefineOptions = field(default_factory=RefineOptions)
    searched: bool = False


def ladder(names: Sequence[str], solvers: Sequence[str], options: dict[str, str]) -> list[Rung]:
    """The rungs asked for, and two for each of the `solvers`."""
    ours, published = get_solver("3basil", options), "published+tm"
    tm = RefineOptions(match="block", match_options={"preset": "tm"})
    known = [
        Rung("published", published, Published()),
        Rung(published, published, Published(), tm),
        Rung("solver", published, ours),
        Rung("allocation", published, ours, searched=True),
        Rung("matching", published, ours, BLOCK, searched=True),
        Rung("model", published, ours, replace(BLOCK, match="model"), searched=True),
    ]
    found = [rung for rung in known if rung.label in names]
    for name in solvers:
        solver = get_solver(name, {})
        found += [Rung(name, name, solver), Rung(f"{name}+matching", name, solver, BLOCK)]
    return found


RUNGS = ("published", "published+tm", "solver", "allocation", "matching", "model")


@dataclass(frozen=True)
class Cell:
    """One compressed model."""

    budget: str
    seed: int
    rung: Rung
    summary: Summary

    def figures(self, split: str) -> cells.Figures:
        return cells.figures(self.summary)[split]

    def gap(self, split: str) -> float:
        """Perplexity above the dense model's."""
        found = self.figures(split)
        return found.compressed.perplexity - found.dense.perplexity

    def record(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            "seed": self.seed,
            "rung": self.rung.label,
            "used": self.summary.used,
            "total": self.summary.total,
            "seconds": cells.seconds(self.summary, ("refine", "match")),
            "splits": {
                split: {**f.record(), "gap": self.gap(split)} for split, f in cells.figures(self.summary).items()
            },
        }


def asked(budget: str, seed: int, allocator: str, options: argparse.Namespace) -> SearchPlan:
    """How the budget of a cell is made; `budget` as typed."""
    pattern, at, kept = budget.rpartition("@")
    share = {} if at or allocator != "uniform" else {"rank_share": RANK_SHARE}
    search = SearchOptions(
        budget=float(kept),
        pattern=pattern if at else "unstructured",
        allocator=allocator,
        allocator_options=share,
        solver="3basil",
        solver_options=dict(options.set),
        search_tokens=options.tokens,
        seed=seed,
    )
    return resolve(search)


def shared_budget(session: Session, plan: SearchPlan, folder: Path, command: str, cache: Cache) -> BudgetFile:
    """The budget of a search whose model is not refined; made once."""
    with opened(session, folder, search_identity(session, plan), command, cache, fresh=False) as (run, at):
        if not run.budget_path.exists():
            at(search_addresses(session, plan))
            problem, allocation, _ = allocated(session, cells.reporter(), plan, run)
            budget_file.write(run.budget_path, budget_of(session, plan, problem, allocation))
        return budget_file.read(run.budget_path)


def refined(
    session: Session, rung: Rung, seed: int, file: BudgetFile, folder: Path, command: str, cache: Cache
) -> Summary:
    """One cell. Layers and blocks that a rung has in common with one below are found in the cache."""
    plan = resolve_refinement(rung.refining, rung.solver, fisher=True, seed=seed)
    with cells.dense_after(session):
        source = folder / "budget.json"
        summary, _ = compress.compress(session, cells.reporter(), plan, source, file, folder, command, cache)
        return summary


def measure(options: argparse.Namespace, command: str) -> list[Cell]:
    """All cells, in the order of seeds, budgets, rungs."""
    rungs = ladder(options.rungs, options.solvers, dict(options.set))
    for typed in options.budgets:
        asked(typed, 0, options.allocator, options)
    total = len(options.seeds) * len(options.budgets) * len(rungs)
    cache = cells.cache_of(options)
    made: list[Cell] = []
    for seed in options.seeds:
        session = cells.set_up(options, seed)
        for typed in options.budgets:
            folder: Path = options.out / f"seed{seed}" / typed.replace(":", "of")
            files: dict[bool, BudgetFile] = {}
            for searched in sorted({rung.searched for rung in rungs}):
                allocator = options.allocator if searched else "uniform"
                plan = asked(typed, seed, allocator, options)
                files[searched] = shared_budget(session, plan, folder / f"budget-{allocator}", command, cache)
            for rung in rungs:
                where = folder / cells.folder_name(rung.label)
                summary = refined(session, rung, seed, files[rung.searched], where, command, cache)
                made.append(Cell(typed, seed, rung, summary))
                cells.say(len(made), total, f"seed {seed}  budget {typed}  {rung.label}", summary)
    return made


def table(made: Sequence[Cell], split: str) -> Stack:
    """Means over the seeds on one split."""
    rows = report_table(f"Refinement, on {split}")
    rows.add_column("budget")
    rows.add_column("refined by")
    add_numbers(rows, ("KL to dense", "perplexity", "gap", "ratio of gaps", "of KL", "time"))
    for budget in dict.fromkeys(cell.budget for cell in made):
        for rung in dict.fromkeys(cell.rung for cell in made):
            group = [cell for cell in made if (cell.budget, cell.rung) == (budget, rung)]
            base = [cell for cell in made if (cell.budget, cell.rung.label) == (budget, rung.baseline)]
            rows.add_row(
                Text(budget),
                Text(rung.label),
                formats.significant(fmean(cell.figures(split).kl for cell in group)),
                formats.significant(fmean(cell.figures(split).compressed.perplexity for cell in group)),
                formats.significant(fmean(cell.gap(split) for cell in group)),
                ratio([cell.gap(split) for cell in group], [cell.gap(split) for cell in base]),
                ratio([cell.figures(split).kl for cell in group], [cell.figures(split).kl for cell in base]),
                formats.duration(fmean(cells.seconds(cell.summary, ("refine", "match")) for cell in group)),
            )
    dense = fmean(cell.figures(split).dense.perplexity for cell in made)
    return footed(
        rows,
        f"means over {len({cell.seed for cell in made})} seeds; dense perplexity {formats.significant(dense)}",
        "gap: perplexity above the dense model's; ratios to published+tm, or to the solver without matching",
        "time: of the solver and of matching",
    )


def ratio(values: Sequence[float], base: Sequence[float]) -> str:
    """Mean of `values / base`, seed by seed; - where there is nothing to divide by."""
    pairs = [value / other for value, other in zip(values, base, strict=False) if other > 0]
    return cells.shown(fmean(pairs) if pairs and len(pairs) == len(values) else None)


def work(options: argparse.Namespace, command: str) -> None:
    made = measure(options, command)
    write_json(
        options.out / "refine.json",
        {
            "command": command,
            "allocator": options.allocator,
            "solver_options": dict(options.set),
            "cells": [cell.record() for cell in made],
        },
    )
    out = cells.console()
    for split in cells.figures(made[0].summary):
        out.print(table(made, split), "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cells.option_parser(__doc__)
    parser.add_argument("--budgets", nargs="+", default=["0.5", "0.3", "0.2", "2:4@0.56"], help="KEPT or PATTERN@KEPT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rungs", nargs="*", default=list(RUNGS), choices=RUNGS)
    parser.add_argument(
        "--solvers", nargs="*", default=[], choices=list(SOLVERS), help="also without and with matching"
    )
    parser.add_argument("--allocator", default="auto", help="of the rungs above `solver` (%(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=500_000, help="limit of an allocator that uses the objective (%(default)s)"
    )
    parser.add_argument(
        "--set", type=cells.option_pair, nargs="+", default=[], metavar="NAME=VALUE", help="options of 3basil"
    )
    return cells.run_script(work, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
