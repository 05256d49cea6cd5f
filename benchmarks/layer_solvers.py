"""Error and time of every layer solver, beside the public code's numbers and transcriptions timed in the same run.

    python benchmarks/layer_solvers.py --problems FOLDER --out OUT --solvers 3basil oats:steps=40 --twins 3basil oats
    python benchmarks/layer_solvers.py --synthetic 1024x1024,4096x4096 --out OUT --device cuda
    python benchmarks/layer_solvers.py --problems FOLDER --out OUT --path --solvers 3basil
    python benchmarks/layer_solvers.py --problems FOLDER --out OUT --bits 9 6 4.5 --solvers slab 3basil oats

FOLDER holds layer_problems.safetensors with NAME/W (d_out, d_in) and NAME/G (d_in, d_in) of every problem, and
optionally public_code.json with the public code's results. Errors are tr(E G Eᵀ) / tr(W G Wᵀ), undamped. Times are
wall seconds with the preparation, and gemms: the same in units of one float32 product of W and G.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import equal_bits
import target_path
import torch
from cells import run_script
from contenders import PUBLIC_METHODS, TWINS, Contender, Ours, Outcome, Twin, aimed, elapsed, measure, repetitions, say
from finished_cells import Cells
from layer_problems import SETTINGS, Problem, chosen, geometric_mean, read_problems, shapes, synthetic_problem
from rich.console import Console
from rich.console import Group as Stack
from rich.text import Text

from globalopt.errors import UsageError
from globalopt.runs.files import write_json
from reports import formats
from reports.table_style import add_numbers, footed, report_table


@dataclass(frozen=True, eq=False)
class Cell:
    """One contender on one problem at one setting."""

    problem: Problem
    setting: str
    contender: Contender
    outcome: Outcome

    def record(self) -> dict[str, Any]:
        return {
            "problem": self.problem.name,
            "setting": self.setting,
            "contender": self.contender.label,
            "method": self.contender.method,
            **asdict(self.outcome),
            "gemms": self.outcome.gemms,
        }


@dataclass(frozen=True)
class Ratio:
    """Error and time of a contender over those of what it is compared with, on one problem at one setting."""

    problem: str
    setting: str
    error: float
    time: float


@dataclass(frozen=True)
class Ratios:
    """The ratios of a contender at one setting, or at "all"; `against` says what it is compared with."""

    setting: str
    contender: str
    against: str
    of: tuple[Ratio, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """The problems that count, each once."""
        return tuple(dict.fromkeys(ratio.problem for ratio in self.of))

    def figures(self) -> tuple[float, float, float, float]:
        """Geometric mean and worst of the errors, then of the times."""
        errors, times = [ratio.error for ratio in self.of], [ratio.time for ratio in self.of]
        return geometric_mean(errors), max(errors), geometric_mean(times), max(times)

    def record(self) -> dict[str, Any]:
        names = ("error_mean", "error_worst", "time_mean", "time_worst")
        return {**asdict(self), **dict(zip(names, self.figures(), strict=True)), "problems": self.problems}


def compare(
    problems: Sequence[Problem], field: Sequence[Contender], settings: Sequence[str], repeats: int, cells: Cells
) -> list[Cell]:
    """All cells, in the order of problems, settings, contenders; finished ones are read back."""
    if signed := [contender.label for contender in field if contender.signs]:
        raise UsageError(f"{signed[0]} spends bits on signs, which these settings do not count; give it --bits.")
    wanted = [
        (problem, name, SETTINGS[name](problem.spec).check(problem.spec)) for problem in problems for name in settings
    ]
    made: list[Cell] = []
    for problem, setting, full in wanted:
        for contender in field:
            target, times = aimed(contender, full, problem.spec), repetitions(problem, repeats)
            what = f"{problem.name} {setting} {contender.label}"
            outcome = cells.get(
                Outcome,
                what,
                {"problem": problem.sha256, "repeats": times, "target": asdict(target)},
                partial(measure, problem, target, contender, times),
            )
            made.append(Cell(problem, setting, contender, outcome))
            say(len(made), len(wanted) * len(field), what, outcome)
    return made


Made = Mapping[tuple[str, str, str], Cell]  # by problem, setting, contender
Comparison = Callable[[Cell, Made], tuple[str, float, float] | None]


def to_public(cell: Cell, _: Made) -> tuple[str, float, float] | None:
    """The public method of a cell, and the ratios of error and of gemms to it."""
    method = PUBLIC_METHODS.get(cell.contender.method, "")
    public = cell.problem.public.get(cell.setting, {}).get(method)
    if public is None or not (public.rel_error > 0 and public.gemms > 0):
        return None
    return method, cell.outcome.rel_error / public.rel_error, cell.outcome.gemms / public.gemms


def to_twin(cell: Cell, made: Made) -> tuple[str, float, float] | None:
    """The twin of a cell that is none itself, and the ratios of error and of seconds to it."""
    label = f"twin {cell.contender.method}"
    twin = made.get((cell.problem.name, cell.setting, label))
    if twin is None or twin is cell or not twin.outcome.rel_error > 0:
        return None
    return (
        label,
        cell.outcome.rel_error / twin.outcome.rel_error,
        cell.outcome.seconds / twin.outcome.seconds,
    )


def all_ratios(made: Sequence[Cell], against: Comparison) -> list[Ratios]:
    """Ratios by setting and contender, then over all settings; pairs with nothing to compare are left out."""
    by_key = {(cell.problem.name, cell.setting, cell.contender.label): cell for cell in made}
    groups: dict[tuple[str, str, str], list[Ratio]] = {}
    settings = list(dict.fromkeys(cell.setting for cell in made))
    for setting in [*settings, *(["all"] if len(settings) > 1 else [])]:
        for cell in made:
            found = against(cell, by_key) if setting in (cell.setting, "all") else None
            if found is not None:
                other, error, time = found
                ratio = Ratio(cell.problem.name, cell.setting, error, time)
                groups.setdefault((setting, cell.contender.label, other), []).append(ratio)
    return [Ratios(*key, of=tuple(group)) for key, group in groups.items()]


def ratio_table(title: str, rows: Sequence[Ratios], *notes: str) -> Stack:
    """Geometric mean and worst of errors and times; every row says which problems count."""
    table = report_table(title)
    table.add_column("\nsetting", no_wrap=True)
    table.add_column("\ncontender", overflow="fold")
    table.add_column("\nagainst", overflow="fold")
    add_numbers(table, ("error\nmean", "\nworst", "time\nmean", "\nworst", "\nover"))
    sets = list(dict.fromkeys(row.problems for row in rows))
    for i, row in enumerate(rows):
        if i and rows[i - 1].setting != row.setting:
            table.add_section()
        mark = chr(ord("a") + sets.index(row.problems))
        table.add_row(
            Text(row.setting),
            Text(row.contender),
            Text(row.against),
            *(f"{figure:.3f}" for figure in row.figures()),
            f"{len(row.of)} {mark}",
        )
    counted = [
        f"{chr(ord('a') + i)}: {len(names)} problem{'s' * (len(names) > 1)}, {', '.join(names)}"
        for i, names in enumerate(sets)
    ]
    return footed(table, "means are geometric; below 1 the contender is better", *notes, *counted)


def detail_table(problem: Problem, setting: str, made: Iterable[Cell]) -> Stack:
    """Every contender on one problem at one setting."""
    spec = problem.spec
    table = report_table(f"{spec.name}, {spec.d_out} x {spec.d_in}, at {setting}")
    table.add_column("contender", overflow="fold")
    add_numbers(table, ("error", "nnz", "prepare", "time", "gemms", "steps"))
    table.add_column("status", no_wrap=True)
    for cell in made:
        found = cell.outcome
        table.add_row(
            Text(cell.contender.label),
            formats.scientific(found.rel_error),
            formats.compact(found.nnz),
            "-" if found.prepare_s is None else elapsed(found.prepare_s),
            elapsed(found.seconds),
            f"{found.gemms:,.0f}",
            "-" if found.steps is None else str(found.steps),
            Text(found.status),
        )
    return footed(table, "time: preparation included")


def report(public: Sequence[Ratios], twin: Sequence[Ratios], out: Console) -> None:
    """Print both comparisons, as far as there is something to compare with."""
    if public:
        note = (
            "time: in products W G, on each machine by its own; the public nnz differs by its rounding per row or block"
        )
        out.print(ratio_table("Against the public code's numbers", public, note), "")
    if twin:
        out.print(ratio_table("Against the transcription", twin, "time: seconds on this machine"))
    if not (public or twin):
        out.print(Text("Nothing to compare with: no public numbers of these methods, and no twin of them in the run."))


def work(options: argparse.Namespace, command: str) -> None:
    if options.problems is None and not options.synthetic:
        raise UsageError("There is no problem; give --problems FOLDER, --synthetic D_OUTxD_IN, or both.")
    if options.repeats < 1 or (options.threads is not None and options.threads < 1):
        raise UsageError("--repeats and --threads must be at least 1.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda asks for a GPU that this machine or this torch does not have.")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    ours: list[Ours] = [Ours.parse(text) for text in options.solvers]
    field: list[Contender] = [*ours, *(Twin(name) for name in options.twins)]
    labels = [contender.label for contender in field]
    if len(set(labels)) < len(labels):
        raise UsageError(f"A contender is named twice among {', '.join(labels)}.")
    device = torch.device(options.device)
    problems = read_problems(options.problems, device) if options.problems else []
    problems += [synthetic_problem(d_out, d_in, device) for d_out, d_in in options.synthetic]
    problems = chosen(problems, options.only)
    cells = Cells(options.out / "cells", {"threads": torch.get_num_threads(), "device": options.device})
    facts = {**cells.common, "command": command, "torch": torch.__version__}
    out = Console()
    if options.path:
        paths = target_path.measure_all(problems, ours, options.repeats, cells)
        write_json(options.out / "paths.json", {**facts, "cells": [path.record() for path in paths]})
        out.print(target_path.table(paths))
    elif options.bits:
        bits = equal_bits.measure_all(problems, field, options.bits, options.repeats, cells)
        write_json(options.out / "bits.json", {**facts, "cells": [cell.record() for cell in bits]})
        out.print(equal_bits.table(bits))
    else:
        made = compare(problems, field, options.settings, options.repeats, cells)
        public, twin = all_ratios(made, to_public), all_ratios(made, to_twin)
        record = {
            **facts,
            "cells": [cell.record() for cell in made],
            "against_public": [ratios.record() for ratios in public],
            "against_twin": [ratios.record() for ratios in twin],
        }
        write_json(options.out / "solvers.json", record)
        if options.detail:
            for (problem, setting), group in groupby(made, key=lambda cell: (cell.problem, cell.setting)):
                out.print(detail_table(problem, setting, group), "")
        report(public, twin, out)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=Path, help="folder of layer_problems.safetensors")
    parser.add_argument("--synthetic", type=shapes, default=[], metavar="D_OUTxD_IN[,...]", help="layers to make")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these problems, not all")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--solvers", nargs="+", default=["3basil", "hassle-free", "oats"], metavar="NAME[:KEY=VALUE]")
    parser.add_argument("--twins", nargs="*", default=[], metavar="METHOD", help=f"transcriptions: {', '.join(TWINS)}")
    parser.add_argument("--repeats", type=int, default=3, help="fits of which the median time counts; large layers: 1")
    parser.add_argument("--threads", type=int, help="of torch; its own choice if left out")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--detail", action="store_true", help="also print every cell")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--path", action="store_true", help="cost of each further target on a path of warm starts")
    modes.add_argument("--bits", type=float, nargs="+", default=[], metavar="BITS", help="bits per weight, of 16")
    parser.add_argument("--out", type=Path, required=True, help="folder of all cells; the same command resumes")
    return run_script(work, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
