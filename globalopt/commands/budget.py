"""`globalopt budget`: print, check, compare and convert budget files."""

# Heavy imports are inside the functions: `globalopt --help` must not wait for torch.
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from globalopt.commands.arguments import named
from globalopt.commands.console import err, errors, out, print_json
from globalopt.commands.options import Json, Silent, Trust

if TYPE_CHECKING:
    from globalopt.budgets.budget_file import BudgetFile
    from globalopt.budgets.formats import Format
    from globalopt.models.layers import ModelLayers

app = typer.Typer(help="Print, check, compare and convert budget files.", no_args_is_help=True)

BUDGET = "budget"
EVOPRESS = "evopress"

BudgetPath = Annotated[Path, typer.Argument(help="The budget file, a budget.json.", show_default=False)]


@app.command()
def show(path: BudgetPath) -> None:
    """Print the rank, the nonzeros and the cost of every layer in a budget file."""
    with errors():
        import reports
        from globalopt.budgets import budget_file

        out.print(reports.budget_file(budget_file.read(path)))


@app.command()
def validate(
    path: BudgetPath,
    model: Annotated[
        str | None, typer.Option(help="Also check that the budget belongs to this model.", show_default=False)
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Check that a budget file is complete and that its costs add up."""
    with errors():
        from globalopt.budgets import budget_file
        from globalopt.embeddings.find import check_embeddings
        from globalopt.models.identity import model_fingerprint
        from reports.bits import embedding_facts, stored_facts

        file = budget_file.read(path)
        if model is not None:
            layers = _layers_of(model, trust_remote_code)
            file.for_model(model_fingerprint(layers), layers.specs, path)
            check_embeddings(layers.model, file.matrices, path)
        share = file.used / file.limit
        facts = [*stored_facts(file.plans), *embedding_facts(file.matrices)]
        stored = "".join(f" {label.capitalize()}: {said}." for label, said in facts)
        out.out(
            f"{path}: valid. {len(file.layers)} layers, {file.used:,} of {file.limit:,} {file.accounting} "
            f"({share:.3%}).{stored}",
            highlight=False,
        )


@app.command()
def diff(
    before: BudgetPath,
    after: Annotated[Path, typer.Argument(help="Another budget of the same model.", show_default=False)],
    moves: Annotated[
        int, typer.Option(help="Largest number of rows in the table of the largest differences.", min=0)
    ] = 10,
    as_json: Json = False,
) -> None:
    """Print the differences between two budgets of one model."""
    with errors():
        import reports
        from globalopt.budgets import budget_file, diff

        files = budget_file.read(before), budget_file.read(after)
        found = diff.diff(*files, (before, after))
        if as_json:
            print_json(diff.record(found))
        else:
            out.print(reports.budget_diff(found, files, (str(before), str(after)), moves))


@app.command()
def convert(
    path: Annotated[Path, typer.Argument(help="The file to convert.", show_default=False)],
    source: Annotated[
        str, typer.Option("--from", help="Format of the file: budget, csv, sparsities, peft or evopress.")
    ] = BUDGET,
    wanted: Annotated[
        str, typer.Option("--to", help="Format to write: budget, csv, sparsities, peft or evopress.")
    ] = BUDGET,
    *,
    written: Annotated[Path, typer.Option("--out", help="File to write; it must not exist.", show_default=False)],
    like: Annotated[
        Path | None,
        typer.Option(
            help="A budget of the same model, for everything that the other format does not hold.", show_default=False
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model itself, in place of --like.", show_default=False)] = None,
    accounting: Annotated[
        str | None, typer.Option(help="Unit of the budget, with --model: params or bytes.", show_default="params")
    ] = None,
    rank_as_nonzeros: Annotated[
        bool, typer.Option("--rank-as-nonzeros", help="Turn low-rank parts into nonzeros of the same cost.")
    ] = False,
    level_sparsity: Annotated[
        float | None,
        typer.Option(
            help="For evopress: sparsity of level 0. If it is left out, that of the budget is used.", show_default=False
        ),
    ] = None,
    level_step: Annotated[
        int | None, typer.Option(help="For evopress: number of weights per level.", show_default=False)
    ] = None,
    trust_remote_code: Trust = False,
    quiet: Silent = False,
) -> None:
    """Convert a budget file into the format of another program, or the other way round.

    The format csv holds everything, sparsities (for llm-compressor) and evopress hold only nonzeros, peft only ranks.

    If a part of the budget would be lost, the conversion is refused, or a note names that part.
    """
    with errors():
        from globalopt.budgets import budget_file
        from globalopt.budgets.formats import FORMATS, EvoPress
        from globalopt.budgets.formats.checks import embeddings_left_out
        from globalopt.errors import UnknownNameError, UsageError
        from globalopt.runs.files import write_text

        names = (BUDGET, *FORMATS)
        for name in (source, wanted):
            if name not in names:
                raise UnknownNameError("format", name, names)
        if source == wanted == BUDGET and not rank_as_nonzeros:
            raise UsageError("Nothing to convert: name another format with --from or --to.")
        if EVOPRESS not in (source, wanted) and (level_sparsity is not None or level_step is not None):
            raise UsageError("--level-sparsity and --level-step say what EvoPress's levels mean; nothing else has any.")
        if accounting is not None and model is None:
            raise UsageError("--accounting is for --model; a budget has its own.")
        if written.exists():
            raise UsageError(f"--out {written} exists. Choose another file.")
        formats: dict[str, Format] = {name: made() for name, made in FORMATS.items() if made is not EvoPress}
        formats[EVOPRESS] = EvoPress(level_sparsity, level_step)
        notes: tuple[str, ...] = ()
        if source == BUDGET:
            if like is not None or model is not None:
                raise UsageError("A budget file says everything itself: leave out --like and --model.")
            file = budget_file.read(path)
        else:
            file, notes = _imported(
                path, formats[source], source, like, model, trust_remote_code, accounting or "params"
            )
        if rank_as_nonzeros:
            ranked = sum(1 for entry in file.layers if entry.rank)
            file = budget_file.without_rank(file)
            notes += (f"the rank of {ranked} layers is kept as nonzeros of the same cost.",) if ranked else ()
        if wanted == BUDGET:
            budget_file.write(written, file)
        else:
            text, left_out = formats[wanted].write(file)
            write_text(written, text)
            notes += left_out + embeddings_left_out(file, wanted)
        if not quiet:
            out.out(f"{written}: {wanted}, {len(file.layers)} layers", highlight=False)
        # What was lost is said to whoever asked for quiet, too.
        for note in notes:
            err.out(f"note: {note}", highlight=False)


def _imported(
    path: Path,
    source: Format,
    what: str,
    like: Path | None,
    model: str | None,
    trust_remote_code: bool,
    accounting: str,
) -> tuple[BudgetFile, tuple[str, ...]]:
    """Read the budget that a file of the format `what` describes, with notes on the parts taken from elsewhere."""
    from globalopt.budgets import budget_file
    from globalopt.budgets.formats import Peft
    from globalopt.budgets.formats.checks import embeddings_of_like
    from globalopt.errors import ArtefactError, UsageError
    from globalopt.runs.files import read_text

    if (like is None) == (model is None):
        raise UsageError("Shapes are not in the file: give a budget of the model with --like, or --model.")
    if like is None and isinstance(source, Peft):
        raise UsageError("PEFT knows ranks only: give the budget that has the nonzeros with --like.")
    base = budget_file.read(like) if like is not None else _whole_budget(model, trust_remote_code, accounting)
    text = read_text(path)
    try:
        targets, notes = source.read(text, base)
        return budget_file.imported(targets, base), notes + embeddings_of_like(base, what)
    except ArtefactError as cause:
        raise ArtefactError(f"{path}: {cause}") from None


def _whole_budget(model: str | None, trust_remote_code: bool, accounting: str) -> BudgetFile:
    """Make the budget that keeps a model whole."""
    from globalopt.budgets import budget_file
    from globalopt.models.identity import model_fingerprint

    layers = _layers_of(model, trust_remote_code)
    coverage = layers.coverage
    return budget_file.whole(
        layers.specs, model_fingerprint(layers), coverage.covered, coverage.block_params, accounting
    )


def _layers_of(model: str | None, trust_remote_code: bool) -> ModelLayers:
    """Read the structure of a model, without its weights."""
    from globalopt.pipeline.estimates.shape import Structure
    from globalopt.pipeline.options import ModelOptions

    models = ModelOptions(named(model), trust_remote_code=trust_remote_code, allow_low_coverage=True)
    return Structure.of(models).layers
