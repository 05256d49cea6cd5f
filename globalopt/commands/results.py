"""Print a finished run or family: tables and pictures, or JSON, and the command to type next."""

# Heavy imports are inside the functions: `globalopt --help` must not wait for torch.
from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from globalopt.commands.console import DONE_WITH_FALLBACKS, err, out, print_json, say

if TYPE_CHECKING:
    from globalopt.pipeline.estimates.job import Job
    from globalopt.pipeline.estimates.shape import Structure
    from globalopt.pipeline.options import ModelOptions, TextOptions
    from globalopt.runs.folder import Run
    from globalopt.values.family import Family
    from globalopt.values.results import Summary
    from reports import Written


def show(summary: Summary, run: Run, quiet: bool, verbose: bool, as_json: bool) -> None:
    """Print a finished run; exit with `DONE_WITH_FALLBACKS` where a layer needed one.

    Args:
        quiet: a few lines with the result, and no page and pictures, which are most of the work of a report.
    """
    from dataclasses import asdict

    from globalopt.values.decomposition import Status

    if as_json:
        print_json(asdict(summary))
    elif quiet:
        from reports.brief import brief

        say([*brief(summary), *_made(run, summary)])
    else:
        show_report(summary, run, verbose)
    if any(layer.status == Status.FALLBACK.value for layer in summary.layers):
        raise typer.Exit(DONE_WITH_FALLBACKS)


def show_or_compute(
    folder: Path,
    asked: str | None,
    compute: Callable[[], tuple[Summary, Run]],
    fresh: bool,
    quiet: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Print the run in `folder` if it is finished and was asked the same; else compute it first.

    Args:
        asked: of `pipeline.finished.question`; None computes.
        compute: loads the model and runs the job.
        fresh: compute in any case.
    """
    from globalopt.machine import ranks
    from globalopt.pipeline.finished import finished, remember

    before = None if fresh else finished(folder, asked)
    if ranks.told(before is None):
        before = compute()
        if ranks.writer():
            remember(folder, asked)
    elif not quiet:
        err.print(f"{folder} is finished; nothing was computed again.", markup=False, highlight=False)
    if ranks.writer() and before is not None:
        show(*before, quiet, verbose, as_json)


def show_dry_run(structure: Structure, models: ModelOptions, texts: TextOptions, job: Job, as_json: bool) -> None:
    """Print the parameters, memory, disk and time that a run would take."""
    from globalopt.pipeline.dry_run import dry_run

    plan = dry_run(structure, models, texts, job)
    if as_json:
        print_json(plan.record())
    else:
        from reports.dry_run import dry_run_table

        out.print(dry_run_table(plan))


def show_report(summary: Summary, run: Run, verbose: bool, drawn: bool = True) -> None:
    """Print the tables of a run, write its page and its pictures, and print their paths.

    Args:
        drawn: False: page and pictures are left out where they cannot be written, and one line says so.
    """
    import reports
    from globalopt.analysis.grid import LARGEST_SHARE, LEAST_KEPT, NNZ_LEVELS

    menu = reports.Menu(LEAST_KEPT, LARGEST_SHARE, NNZ_LEVELS)
    details = run.details(layer.name for layer in summary.layers)
    with _drawing(drawn):
        written = reports.report(summary, run.report_folder, out, verbose, details, menu)
        refine = _compress_command(run, run.budget_path, "hassle-free")
        say([*_made(run, summary), *_drawn(written), ("next", refine)])


def _made(run: Run, summary: Summary) -> list[tuple[str, object]]:
    made: list[tuple[str, object]] = [("budget", run.budget_path), ("model", run.model_folder)]
    return made if summary.compressed else [*made, ("measure", shlex.join(["globalopt", "eval", str(run.folder)]))]


@contextlib.contextmanager
def _drawing(needed: bool) -> Iterator[None]:
    """Print an error of writing, if what is written is not needed."""
    from globalopt.errors import ArtefactError
    from globalopt.runs.files import advising

    if needed:
        yield
        return
    try:
        with advising(""):
            yield
    except ArtefactError as cause:
        err.print(f"Page and pictures are not drawn. {cause}", soft_wrap=True, highlight=False, markup=False)


def _drawn(written: Written) -> list[tuple[str, object]]:
    return [("report", written.page), *(("picture", path) for path in written.pictures)]


def show_family(family: Family, run: Run, quiet: bool, as_json: bool, drawn: bool = True) -> None:
    """Print a family of budgets and draw its curve; for `quiet` see `show`, for `drawn` see `show_report`."""
    from dataclasses import asdict

    import reports

    if as_json:
        print_json(asdict(family))
    elif quiet:
        from reports.frontier import frontier_table

        out.print(frontier_table(family))
        say([("budgets", run.folder / "budgets")])
    else:
        with _drawing(drawn):
            written = reports.report_family(family, run.report_folder, out)
            middle = family.points[len(family.points) // 2]
            refine = _compress_command(run, run.folder / middle.file, family.solver, family.solver_options)
            say([("budgets", run.folder / "budgets"), *_drawn(written), ("next", refine)])


def _compress_command(run: Run, budget: Path, solver: str, options: Mapping[str, str] | None = None) -> str:
    """Return the command that refines a budget of the run on the same model and text.

    A model or a text that was given in memory appears as MODEL or TEXT.
    """
    from globalopt.pipeline import session
    from globalopt.pipeline.live import IN_MEMORY

    _, models, texts = session.recorded(run.folder)
    model = "MODEL" if models.in_memory else models.model
    words = ["globalopt", "compress", *([model] if model else [])]
    words += ["--budget-file", str(budget), "--solver", solver]
    if options:
        words += ["--set", ",".join(f"{name}={value}" for name, value in options.items())]
    for recorded in (models, texts):
        for name, default in defaults(type(recorded)).items():
            value = getattr(recorded, name)
            if name not in ("model", "in_memory") and value != default:
                words.append(("--no-" if value is False else "--") + name.replace("_", "-"))
                words += [] if isinstance(value, bool) else ["TEXT" if value == IN_MEMORY else str(value)]
    return shlex.join(words)


def defaults(cls: Any) -> dict[str, object]:
    """Map the fields of a dataclass to their defaults."""
    from dataclasses import fields

    return {field.name: field.default for field in fields(cls)}
