"""How many swaps still improve a finished budget? Random budget-neutral swaps, measured on the true loss.

    python benchmarks/local_optimality.py RUN [RUN ...] --out OUT [--swaps 100] [--draw 0]

RUN is the folder of a finished `globalopt search`, or a cell of `allocation.py` (`OUT/seed0/0.5/knapsack`). A swap
takes a 64th of a mean layer from one layer and gives it to another; it improves where the loss on the whole selection
text falls by a paired t above 2. That is the text searches chose on: the question is whether they were done with it.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cells
from finished_cells import Cells
from rich.console import Group as Stack
from rich.text import Text

from allocators import Uniform
from allocators._moves import improving_share
from globalopt.errors import ArtefactError
from globalopt.pipeline import session as sessions
from globalopt.pipeline.options import SearchOptions
from globalopt.pipeline.plan import resolve
from globalopt.runs.artefacts import SUMMARY
from globalopt.runs.cache import FOLDER, Cache
from globalopt.runs.files import write_json
from globalopt.runs.folder import WORK, Run
from reports import formats
from reports.table_style import add_numbers, footed, report_table


@dataclass(frozen=True)
class Optimality:
    """Of `tried` random swaps `improving` lower the `loss`; at 95 % confidence at most `bound` of all swaps do."""

    allocator: str
    budget: float
    seed: int
    loss: float
    improving: int
    tried: int
    bound: float


def search_options(run: Run) -> SearchOptions:
    """What a finished search was asked for; `ArtefactError` if the run is none."""
    found = run.manifest["identity"].get("search")
    if found is None or not run.has(SUMMARY, None):
        raise ArtefactError(f"{run.folder} is no finished search; give the folder of one.")
    try:
        solver = run.manifest["identity"]["methods"]["solver"]["options"]
        return SearchOptions(**found, solver_options={name: str(value) for name, value in solver.items()})
    except (KeyError, TypeError) as cause:
        raise ArtefactError(f"{run.folder} was made by another version ({cause}). Make it again.") from None


def cache_of(folder: Path) -> Cache:
    """The cache of a run: the nearest one above it, else the one in its folder."""
    above = (Cache(parent / FOLDER) for parent in folder.absolute().parents)
    return next((found for found in (Cache.beside(folder), *above) if found.folder.is_dir()), Cache(folder / WORK))


def measure(folder: Path, options: argparse.Namespace) -> Optimality:
    """Of one run; the analysis is computed again if the cache does not hold it."""
    run, model, text = sessions.recorded(folder)
    search = search_options(run)
    session = sessions.set_up(model, text, search.seed, cells.reporter())
    # One more than the swaps for the allocation itself, and one that the next evaluation could cost.
    windows = len(session.splits.selection.windows) + text.batch_size
    search = replace(search, search_tokens=(options.swaps + 2) * windows * session.splits.selection.seqlen)
    # The allocator that was used is not read, and may be one of a benchmark's own.
    plan = resolve(search, allocator=Uniform())
    cache = cache_of(folder) if options.cache is None else Cache(options.cache)
    analysed = cells.analysed(session, plan, options.out / "analyses" / key(run), cache)
    problem = analysed.problem(plan)
    targets = cells.targets_of(session, run)
    with analysed.objective(plan, problem) as objective:
        loss = float(objective.losses([targets], range(objective.chunks)).mean())
        found = improving_share(problem, objective, targets, options.swaps, random.Random(options.draw))
    allocator = run.summary().allocator
    return Optimality(allocator, search.budget, search.seed, loss, found.improving, found.tried, found.bound)


def key(run: Run) -> str:
    return run.manifest["fingerprint"][:12]


def table(found: Sequence[tuple[Path, Optimality]]) -> Stack:
    rows = report_table("Swaps that still improve")
    rows.add_column("run", overflow="fold")
    rows.add_column("allocator")
    add_numbers(rows, ("budget", "seed", "selection", "improving", "tried", "share", "at most"))
    for folder, of in found:
        rows.add_row(
            Text(str(folder)),
            Text(of.allocator),
            f"{of.budget:g}",
            str(of.seed),
            formats.significant(of.loss),
            str(of.improving),
            str(of.tried),
            formats.share(of.improving / of.tried) if of.tried else "-",
            formats.share(of.bound),
        )
    return footed(
        rows,
        "selection: KL on the selection text, nats per token",
        "at most: share of all swaps that improve, upper end of a one-sided 95 % confidence interval",
    )


def work(options: argparse.Namespace, command: str) -> None:
    store = Cells(options.out / "cells", {"swaps": options.swaps, "draw": options.draw})
    found: list[tuple[Path, Optimality]] = []
    for folder in options.runs:
        run = Run.open(folder)
        search_options(run)
        identity = {"run": run.manifest["fingerprint"]}

        def compute(folder: Path = folder) -> Optimality:
            return measure(folder, options)

        found.append((folder, store.get(Optimality, key(run), identity, compute)))
        of = found[-1][1]
        cells.err.print(f"{folder}  {of.improving} of {of.tried} improve", markup=False, highlight=False)
    records: list[dict[str, Any]] = [{"run": str(folder), **asdict(of)} for folder, of in found]
    write_json(options.out / "local_optimality.json", {"command": command, "cells": records})
    cells.console().print(table(found))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a finished search")
    parser.add_argument("--out", type=Path, required=True, help="folder of results; the same command resumes")
    parser.add_argument("--swaps", type=int, default=100, help="random swaps per run (%(default)s)")
    parser.add_argument("--cache", type=Path, help="of the runs; the nearest one above each run if left out")
    parser.add_argument("--draw", type=int, default=0, help="seed of the swaps (%(default)s)")
    return cells.run_script(work, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
