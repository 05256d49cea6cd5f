"""`globalopt report`: print the report of a run, or compare several runs."""

# Heavy imports are inside the functions: `globalopt --help` must not wait for torch.
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from globalopt.commands.console import errors, out, print_json, say
from globalopt.commands.options import Json, Verbose
from globalopt.commands.results import show_family, show_report


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders; several runs are compared with the first.", show_default=False)
    ],
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for comparison.html and its pictures, with several runs.", show_default=False
        ),
    ] = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Print and draw the results of a run, or compare several runs.

    Several runs are compared with the first, with confidence intervals.
    If two runs cannot be compared, the report says why.
    """
    with errors():
        from dataclasses import asdict

        import reports
        from globalopt.errors import UsageError
        from globalopt.runs.artefacts import FAMILY
        from globalopt.runs.files import advising
        from globalopt.runs.folder import Run

        if folder is not None and len(runs) == 1:
            raise UsageError(f"--out is for several runs; the report of one is written into {runs[0]}/report.")
        opened = [Run.open(run) for run in runs]
        if len(opened) == 1 and opened[0].has(FAMILY, None):
            show_family(opened[0].family(), opened[0], quiet=False, as_json=as_json, drawn=False)
            return
        summaries = [run.summary() for run in opened]
        labels = [str(run) for run in runs]
        losses = [run.window_losses() for run in opened]
        if as_json:
            apart = reports.differences_to_first(summaries, labels, losses)
            found = [{"run": label, **asdict(summary)} for label, summary in zip(labels, summaries, strict=True)]
            print_json({"runs": found, "differences": [asdict(one) for one in apart]})
        elif len(opened) == 1:
            show_report(summaries[0], opened[0], verbose, drawn=False)
        else:
            out.print(reports.comparison(summaries, labels, losses=losses))
        if folder is not None:
            with advising("Choose a writable --out."):
                written = reports.report_comparison(summaries, labels, losses, folder)
            if not as_json:
                say([("report", written.page), *(("picture", path) for path in written.pictures)])
