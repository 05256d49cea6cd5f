"""`globalopt budget`: look at budget files, compare and convert them."""

# Heavy imports are inside the functions: `globalopt --help` must not wait for torch.
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from globalopt.commands.arguments import named
from globalopt.commands.console import errors, out, print_json
from globalopt.commands.options import Json, Trust

app = typer.Typer(help="Look at budget files, compare and convert them.", no_args_is_help=True)

BudgetPath = Annotated[Path, typer.Argument(help="A budget.json.", show_default=False)]


@app.command()
def show(path: BudgetPath) -> None:
    """Print what a budget file gives to every layer."""
    with errors():
        import reports
        from globalopt import budget_file

        out.print(reports.budget_file(budget_file.read(path)))


@app.command()
def validate(
    path: BudgetPath,
    model: Annotated[
        str | None, typer.Option(help="Also check that it belongs to this model.", show_default=False)
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Check that a budget file is whole and adds up."""
    with errors():
        from globalopt import budget_file

        file = budget_file.read(path)
        if model is not None:
            from globalopt.layers import find_layers
            from globalopt.models import load_model, model_fingerprint, reference_folder

            source = named(model) or str(reference_folder())
            loaded = load_model(source, device="cpu", trust_remote_code=trust_remote_code)
            layers = find_layers(loaded.model, allow_low_coverage=True)
            file.for_model(model_fingerprint(layers), layers.specs, path)
        share = file.used / file.limit
        out.out(
            f"{path}: valid. {len(file.layers)} layers, {file.used:,} of {file.limit:,} {file.accounting} "
            f"({share:.3%}).",
            highlight=False,
        )


@app.command()
def diff(
    before: BudgetPath,
    after: Annotated[Path, typer.Argument(help="Another budget of the same model.", show_default=False)],
    moves: Annotated[int, typer.Option(help="Most rows of the table of the largest moves.", min=0)] = 10,
    as_json: Json = False,
) -> None:
    """Say what moved between two budgets of one model."""
    with errors():
        import reports
        from globalopt import budget_diff, budget_file

        files = budget_file.read(before), budget_file.read(after)
        found = budget_diff.diff(*files, (before, after))
        if as_json:
            print_json(budget_diff.record(found))
        else:
            out.print(reports.budget_diff(found, files, (str(before), str(after)), moves))
