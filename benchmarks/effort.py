"""What does a whole search take, and what does it give, at every level of effort?

    python benchmarks/effort.py --out OUT [--budgets 0.5 0.3 0.2] [--efforts quick default best] [--seeds 0 1 2]
    python benchmarks/effort.py --out OUT --other before=/path/to/globalopt   # another version, beside this one
    python benchmarks/effort.py --out OUT --model FOLDER --calibration TEXT --with "--match none"

Every cell is `globalopt search` as a command of its own with an empty cache, so that its seconds are all that a
newcomer waits for. Commands that are compared run one after the other for every budget and seed; a finished cell is
read back, an unfinished one starts over. Times mean little where other programs share the processor.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import cells
from finished_cells import Cells
from rich.console import Group as Stack
from rich.text import Text

from globalopt.errors import UsageError
from globalopt.pipeline.effort import EFFORTS
from globalopt.runs.files import write_json
from globalopt.runs.folder import Run
from reports import formats
from reports.table_style import add_numbers, footed, report_table

PARTS = {
    "search": ("allocate", "search"),
    "refinement": ("refine", "match"),
    "evaluation": ("save", "evaluate", "samples"),
}
"""Stages of the parts of a search; all others but `load` are the analysis."""


@dataclass(frozen=True)
class Cell:
    """What one command took and gave.

    Args:
        seconds: of the whole command, as a newcomer waits for it.
        parts: seconds of its stages, summed by part.
        peak_bytes: largest memory of a stage.
        kl: of the compressed model, by split.
    """

    seconds: float
    parts: dict[str, float]
    peak_bytes: int
    kl: dict[str, float]


@dataclass(frozen=True)
class Contender:
    """A command that makes a compressed model of a budget.

    Args:
        name: in the table.
        words: of the command, without budget, seed, text and folders.
    """

    name: str
    words: tuple[str, ...]


def contenders(options: argparse.Namespace) -> list[Contender]:
    """The levels of effort that were asked for, after the commands they are set beside."""
    here = (sys.executable, "-m", "globalopt", "search")
    others = [Contender(name, (path, "search")) for name, path in options.other]
    return others + [Contender(effort, (*here, "--effort", effort)) for effort in options.efforts]


def measure(contender: Contender, options: argparse.Namespace, budget: float, seed: int, folder: Path) -> Cell:
    """Run one command from the beginning."""
    shutil.rmtree(folder, ignore_errors=True)
    words = [*contender.words, "--budget", f"{budget:g}", "--seed", str(seed), "--out", str(folder / "run")]
    words += ["--cache", str(folder / "cache"), "--seqlen", str(options.seqlen)]
    # The same text for all: losses on fewer windows would be those of another text.
    words += ["--eval-windows", str(options.eval_windows)]
    for option in ("model", "calibration", "eval_text"):
        if (value := getattr(options, option)) is not None:
            words += [f"--{option.replace('_', '-')}", value]
    words += shlex.split(options.extra)
    folder.mkdir(parents=True)
    started = time.perf_counter()
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(words, stdout=log, stderr=log, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise UsageError(f"{shlex.join(words)} ended with {done.returncode}; see {folder / 'log.txt'}.")
    summary = Run.open(folder / "run").summary()
    named = {stage: part for part, stages in PARTS.items() for stage in stages}
    parts = dict.fromkeys(["analysis", *PARTS], 0.0)
    for stage in summary.stages:
        if stage.name != "load":
            parts[named.get(stage.name, "analysis")] += stage.seconds
    # What a later run would use again; only figures and the model are of interest here.
    shutil.rmtree(folder / "cache", ignore_errors=True)
    kl = {split: found.kl for split, found in cells.figures(summary).items()}
    return Cell(seconds, parts, max(stage.peak_bytes for stage in summary.stages), kl)


def work(options: argparse.Namespace, command: str) -> None:
    """Measure all cells and print a table per budget."""
    common = {
        name: str(getattr(options, name))
        for name in ("model", "calibration", "eval_text", "seqlen", "eval_windows", "extra")
    }
    found = Cells(options.out / "cells", common)
    every = contenders(options)
    total, done = len(options.budgets) * len(options.seeds) * len(every), 0
    table: dict[float, dict[str, list[Cell]]] = {}
    for budget in options.budgets:
        for seed in options.seeds:
            for contender in every:
                name = f"{contender.name}-{budget:g}-seed{seed}"
                folder = options.out / "runs" / cells.folder_name(name)

                def compute(contender=contender, budget=budget, seed=seed, folder=folder) -> Cell:
                    return measure(contender, options, budget, seed, folder)

                cell = found.get(Cell, name, {"command": contender.name}, compute)
                table.setdefault(budget, {}).setdefault(contender.name, []).append(cell)
                done += 1
                cells.err.print(f"{done}/{total}  {name}  {cell.seconds:.0f} s", markup=False, highlight=False)
    write_json(
        options.out / "effort.json",
        {
            "command": command,
            "cells": {
                f"{budget:g}": {name: [asdict(cell) for cell in row] for name, row in rows.items()}
                for budget, rows in table.items()
            },
        },
    )
    for budget, rows in table.items():
        cells.console().print(_shown(budget, rows, options.seeds))


def _shown(budget: float, rows: dict[str, list[Cell]], seeds: Sequence[int]) -> Stack:
    """The table of one budget: means over seeds, and ratios to the first row."""
    shown = report_table(f"Effort at {budget:g} of the parameters")
    shown.add_column("effort")
    numbers = ["whole", "analysis", "search", "refinement", "evaluation", "memory", "KL, validation", "KL, test"]
    add_numbers(shown, [*numbers, "time", "KL"])
    first = next(iter(rows.values()))
    for name, found in rows.items():
        parts = {part: fmean(cell.parts[part] for cell in found) for part in found[0].parts}
        ratio = fmean(one.seconds / base.seconds for one, base in zip(found, first, strict=True))
        worse = fmean(one.kl[s] / base.kl[s] for one, base in zip(found, first, strict=True) for s in one.kl)
        shown.add_row(
            Text(name),
            formats.duration(fmean(cell.seconds for cell in found)),
            *(formats.duration(parts[part]) for part in ("analysis", *PARTS)),
            formats.memory(max(cell.peak_bytes for cell in found)),
            *(f"{fmean(cell.kl[split] for cell in found):.3g}" for split in ("validation", "test")),
            f"{ratio:.2f}",
            f"{worse:.2f}",
        )
    seen = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    return footed(shown, f"Means of {seen}; time and KL on the right are ratios to the first row, KL of both splits.")


def _named(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"takes NAME=PATH of a globalopt command; got '{text}'")
    return name, path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all cells; the same command resumes")
    parser.add_argument("--model", help="folder or hub id; the bundled reference model if left out")
    parser.add_argument("--calibration", help="text for a model of your own")
    parser.add_argument("--eval-text", help="text of the test split")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens per window (%(default)s)")
    parser.add_argument("--eval-windows", type=int, default=128, help="per split, at most (%(default)s)")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5], help="fractions kept (%(default)s)")
    parser.add_argument("--efforts", nargs="+", default=list(EFFORTS), choices=list(EFFORTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(%(default)s)")
    parser.add_argument(
        "--other", type=_named, action="append", default=[], metavar="NAME=PATH", help="another command"
    )
    parser.add_argument("--with", dest="extra", default="", help="more words for every command, such as '--match none'")
    return cells.run_script(work, parser, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
