"""What each further target of a layer costs on a path of warm starts, against a cold solve of the same target."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from cells import err
from contenders import Ours, dense, repetitions, warm_up
from finished_cells import Cells
from layer_problems import Problem, Stopwatch, geometric_mean, unstructured
from rich.console import Group as Stack
from rich.text import Text

from globalopt.errors import UsageError
from globalopt.values.decomposition import Solution
from reports import formats
from reports.table_style import add_numbers, footed, report_table

KEPT = (0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3)


@dataclass(frozen=True)
class PathOutcome:
    """One path: its median seconds, those of each cold solve, and the relative errors; no preparation in either."""

    kept: tuple[float, ...]
    path_s: float
    cold_s: tuple[float, ...]
    path_errors: tuple[float, ...]
    cold_errors: tuple[float, ...]

    @property
    def extra(self) -> float:
        """Seconds of a further target over those of its cold solve: `(path - first cold) / sum of the other colds`."""
        return (self.path_s - self.cold_s[0]) / sum(self.cold_s[1:])

    @property
    def error_ratios(self) -> list[float]:
        """Of the further targets; 1 where the cold error is 0."""
        pairs = zip(self.path_errors[1:], self.cold_errors[1:], strict=True)
        return [path / cold if cold > 0 else 1.0 for path, cold in pairs]


def measure_path(problem: Problem, contender: Ours, repeats: int) -> PathOutcome:
    """Solve the targets `KEPT` one by one from nothing, and as a path."""
    device = problem.weight.device
    warm_up(contender, device)
    state = contender.solver.prepare(problem.weight, problem.metric)
    targets = [unstructured(problem.spec, kept) for kept in KEPT]
    cold: list[list[float]] = [[] for _ in targets]
    paths: list[float] = []
    alone: list[Solution] = []
    together: list[Solution] = []
    for _ in range(repeats):
        alone = []
        for target, times in zip(targets, cold, strict=True):
            with Stopwatch(device) as watch:
                alone.append(contender.solver.solve(state, target))
            times.append(watch.seconds)
        with Stopwatch(device) as watch:
            together = list(contender.solver.solve_path(state, targets))
        paths.append(watch.seconds)
    return PathOutcome(
        KEPT,
        statistics.median(paths),
        tuple(map(statistics.median, cold)),
        tuple(problem.relative_error(dense(solution.value)) for solution in together),
        tuple(problem.relative_error(dense(solution.value)) for solution in alone),
    )


@dataclass(frozen=True)
class PathCell:
    """One contender's path on one problem."""

    problem: str
    contender: str
    outcome: PathOutcome

    def record(self) -> dict[str, Any]:
        found = self.outcome
        return {
            "problem": self.problem,
            "contender": self.contender,
            **asdict(found),
            "extra": found.extra,
            "error_ratios": found.error_ratios,
        }


def measure_all(problems: Sequence[Problem], field: Sequence[Ours], repeats: int, cells: Cells) -> list[PathCell]:
    """All paths, in the order of problems and contenders; finished ones are read back.

    Raises:
        UsageError: a contender has no low rank, or spends bits on signs.
    """
    if unable := [ours.label for ours in field if ours.signs or not ours.low_rank]:
        raise UsageError(f"The targets of a path have rank and no signs; {', '.join(unable)} cannot meet them.")
    made: list[PathCell] = []
    for problem in problems:
        for ours in field:
            times = repetitions(problem, repeats)
            outcome = cells.get(
                PathOutcome,
                f"{problem.name} path {ours.label}",
                {"problem": problem.sha256, "repeats": times, "kept": KEPT},
                partial(measure_path, problem, ours, times),
            )
            made.append(PathCell(problem.name, ours.label, outcome))
            err.print(
                f"{len(made)}/{len(problems) * len(field)}  {problem.name}  path {ours.label}  "
                f"a further target {outcome.extra:.3f} of cold",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    return made


def table(made: Sequence[PathCell]) -> Stack:
    """Cost and errors of every path."""
    rows = report_table(f"A path of targets, kept {KEPT[0]:g} to {KEPT[-1]:g}, against cold solves")
    for header in ("\nproblem", "\ncontender"):
        rows.add_column(header, overflow="fold")
    add_numbers(rows, ("cost of a\nfurther target", "error\nmean", "\nworst", "path\ntime", "cold\ntimes"))
    for cell in made:
        found = cell.outcome
        rows.add_row(
            Text(cell.problem),
            Text(cell.contender),
            f"{found.extra:.3f}",
            f"{geometric_mean(found.error_ratios):.3f}",
            f"{max(found.error_ratios):.3f}",
            formats.duration(found.path_s),
            formats.duration(sum(found.cold_s)),
        )
    return footed(
        rows,
        "cost: (path - first cold solve) / the other cold solves; no preparation in either",
        f"error: of the {len(KEPT) - 1} further targets over their cold solves; means are geometric",
    )
