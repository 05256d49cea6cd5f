"""Does a budget serve solvers it was not made with? The same budget files, refined by several solvers.

    python benchmarks/reuse.py --out OUT [--budgets 0.5 0.3] [--solvers 3basil hassle-free oats sparsegpt wanda]
    python benchmarks/reuse.py --out OUT BUDGET.json [BUDGET.json ...]

Without files, one is made per budget by the exact knapsack. Each stands beside the uniform budget of the same size,
sparse only and, for solvers with low rank, also with a tenth of its parameters as rank; the ratio of its KL is to the
better of the two by validation KL, solver by solver. Nothing is chosen on test.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cells
from rich.console import Console
from rich.console import Group as Stack
from rich.text import Text

from allocators import Knapsack, Uniform
from globalopt import budget_file, pipeline
from globalopt.budget_file import BudgetFile
from globalopt.errors import UsageError
from globalopt.pipeline import NATS, Bench
from globalopt.protocols import Allocator
from globalopt.refine import for_solver
from globalopt.store import Run, write_json
from globalopt.summary import Summary
from globalopt.types import NM, Budget, Problem
from reports import formats
from reports.tables import add_numbers, divergence, footed, report_table
from solvers import SOLVERS, get_solver

RANK_SHARES = (0.0, 0.1)


@dataclass(frozen=True)
class Cell:
    """One budget file refined by one solver, with its KL over that of the better uniform budget."""

    file: str
    budget: str
    solver: str
    summary: Summary
    ratios: Mapping[str, float | None]

    def record(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "budget": self.budget,
            "solver": self.solver,
            "used": self.summary.used,
            "total": self.summary.total,
            "seconds": cells.seconds(self.summary),
            **cells.split_records(self.summary, self.ratios),
        }


@dataclass(frozen=True)
class Job:
    """A budget file and a solver, with the uniform budgets of the same size by label; files with their paths."""

    name: str
    solver: str
    file: tuple[Path, BudgetFile]
    uniform: Mapping[str, tuple[Path, BudgetFile]]


def pattern_of(file: BudgetFile, name: str) -> str:
    """The one pattern of a budget file, as typed."""
    patterns = {entry.pattern for entry in file.layers}
    if len(patterns) > 1:
        raise UsageError(f"{name} has layers of several patterns; a uniform budget beside it has one.")
    return patterns.pop() or "unstructured"


def allocate(
    bench: Bench, analysis: Run, budget: Budget, asked: float, pattern: str, allocator: Allocator, seed: int
) -> BudgetFile:
    """The budget file that `allocator` makes of a finished analysis."""
    surfaces = tuple(analysis.read_sensitivity(spec)[0] for spec in bench.layers.specs)
    problem = Problem(surfaces, budget, NM.parse(pattern), seed)
    allocation = allocator.allocate(problem)
    coverage = bench.layers.coverage
    return budget_file.make(
        allocation, problem, bench.fingerprint, coverage.covered, coverage.block_params, asked, NATS
    )


def uniforms(pattern: str, solver: str) -> dict[str, Uniform]:
    """The uniform allocators that differ for a solver, by label."""
    if pattern != "unstructured":
        # The pattern fixes the nonzeros, and the rank is what they leave.
        return {"uniform": Uniform()}
    # A solver without low rank turns any rank back into the same nonzeros.
    shares = RANK_SHARES if SOLVERS[solver].low_rank else RANK_SHARES[:1]
    return {f"uniform {share:g}": Uniform(rank_share=share) for share in shares}


def compared_files(bench: Bench, options: argparse.Namespace) -> dict[str, tuple[Path, BudgetFile]]:
    """The files given, or else one made by the knapsack per budget, by name."""
    if options.files:
        # Runs call their file budget.json; their folder tells them apart.
        given = [(path.resolve().parent.name if path.stem == "budget" else path.stem, path) for path in options.files]
        if len({name for name, _ in given}) < len(given):
            given = [(f"{i}-{name}", path) for i, (name, path) in enumerate(given, start=1)]
        return {name: (path, budget_file.read(path)) for name, path in given}
    budgets = {kept: Budget.fraction(kept, bench.layers.specs) for kept in options.budgets}
    pattern = "unstructured"
    analysis = analysed(bench, options, pattern)
    return {
        f"{kept:g}": written(
            options.out / "budgets" / f"{kept:g}.json",
            allocate(bench, analysis, budget, kept, pattern, Knapsack(), options.seed),
        )
        for kept, budget in budgets.items()
    }


def jobs(bench: Bench, options: argparse.Namespace) -> list[Job]:
    """Every file with every solver; refused here, before anything is refined, where a solver cannot meet a file."""
    found: list[Job] = []
    for name, (path, file) in compared_files(bench, options).items():
        allocation = file.for_model(bench.fingerprint, bench.layers.specs, path)
        pattern = pattern_of(file, name)
        for solver, spec in itertools.product(options.solvers, bench.layers.specs):
            for_solver(allocation.targets[spec.name], spec, get_solver(solver), allocation.budget)
        analysis = analysed(bench, options, pattern)
        for solver in options.solvers:
            beside = {
                label: written(
                    options.out / "budgets" / name / f"{label.replace(' ', '-')}.json",
                    allocate(bench, analysis, allocation.budget, file.asked, pattern, allocator, options.seed),
                )
                for label, allocator in uniforms(pattern, solver).items()
            }
            found.append(Job(name, solver, (path, file), beside))
    return found


def analysed(bench: Bench, options: argparse.Namespace, pattern: str) -> Run:
    folder: Path = options.out / f"analysis-{pattern.replace(':', 'of')}"
    return cells.analysed(bench, pattern, options.seed, folder)


def written(path: Path, file: BudgetFile) -> tuple[Path, BudgetFile]:
    budget_file.write(path, file)
    return path, file


def measure(options: argparse.Namespace, command: str) -> list[Cell]:
    """All cells, in the order of files, solvers, budgets."""
    bench = cells.set_up(options, options.seed)
    wanted = jobs(bench, options)
    total = sum(1 + len(job.uniform) for job in wanted)
    done = 0
    made: list[Cell] = []
    for job in wanted:

        def refined(label: str, source: tuple[Path, BudgetFile], job: Job = job) -> Summary:
            nonlocal done
            folder = options.out / "cells" / job.name / job.solver / label.replace(" ", "-")
            with cells.dense_after(bench) as fresh:
                summary, _ = pipeline.compress(fresh, *source, job.solver, {}, options.seed, folder, command)
            done += 1
            cells.say(done, total, f"{job.name}  {job.solver}  {label}", summary)
            return summary

        uniform = {label: refined(label, source) for label, source in job.uniform.items()}
        best = min((cells.figures(summary) for summary in uniform.values()), key=lambda found: found["validation"].kl)
        own = refined("file", job.file)
        made += [
            Cell(job.name, label, job.solver, summary, cells.ratios(summary, best))
            for label, summary in [*uniform.items(), (job.file[1].allocator, own)]
        ]
    return made


def table(made: Sequence[Cell], split: str) -> Stack:
    """All cells on one split."""
    rows = report_table(f"One budget, several solvers, on {split}")
    for name in ("file", "solver", "budget"):
        rows.add_column(name, overflow="fold")
    add_numbers(rows, ("used", "KL to dense", "perplexity", "ratio", "time"))
    for cell in made:
        found = cells.figures(cell.summary)[split]
        rows.add_row(
            Text(cell.file),
            Text(cell.solver),
            Text(cell.budget),
            f"{cell.summary.used / cell.summary.total:.4f}",
            divergence(found.compressed),
            formats.significant(found.compressed.perplexity),
            cells.shown(cell.ratios[split]),
            formats.duration(cells.seconds(cell.summary)),
        )
    dense = cells.figures(made[0].summary)[split].dense
    return footed(
        rows,
        f"dense perplexity {formats.significant(dense.perplexity)}; used: of the dense size; KL: nats per token",
        "ratio: of KL to the best uniform budget by validation KL, same size and solver",
    )


def work(options: argparse.Namespace, command: str) -> None:
    made = measure(options, command)
    write_json(options.out / "reuse.json", {"command": command, "cells": [cell.record() for cell in made]})
    out = Console()
    for split in cells.figures(made[0].summary):
        out.print(table(made, split), "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cells.option_parser(__doc__)
    parser.add_argument("files", type=Path, nargs="*", metavar="BUDGET.json", help="made by `globalopt search`")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.3], help="fractions kept, without files")
    parser.add_argument(
        "--solvers",
        nargs="+",
        default=["3basil", "hassle-free", "oats", "sparsegpt", "wanda"],
        choices=list(SOLVERS),
    )
    parser.add_argument("--seed", type=int, default=0)
    return cells.run_script(work, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
