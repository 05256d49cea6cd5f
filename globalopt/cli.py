"""The `globalopt` program: register the commands, and start."""

# Nothing heavy here or in the modules of the commands: `globalopt --help` must not wait for torch.
from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from globalopt.commands import budget, cache
from globalopt.commands.compress import compress
from globalopt.commands.console import out
from globalopt.commands.doctor import doctor
from globalopt.commands.evaluate import evaluate
from globalopt.commands.export import export
from globalopt.commands.methods import list_methods
from globalopt.commands.report import report
from globalopt.commands.search import search

app = typer.Typer(
    name="globalopt",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        import globalopt

        out.out(f"globalopt {globalopt.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Compress a trained language model into sparse + low-rank layers under one global budget."""


app.command()(search)
app.command()(compress)
app.command(name="eval")(evaluate)
app.command()(report)
app.command()(export)
app.command(name="list")(list_methods)
app.command()(doctor)
app.add_typer(budget.app, name="budget")
app.add_typer(cache.app, name="cache")


def main() -> None:
    """Run the `globalopt` command."""
    # The hub's client reads it when it is imported; its retries would bury the one line that says what is wrong.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        # A terminal or file that has no letter for a sign must not lose the result of a long run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app()
