"""`globalopt export`: write a finished run in a format that other programs load."""

# Heavy imports are inside the functions: `globalopt --help` must not wait for torch.
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from globalopt.commands.console import errors, print_json, say
from globalopt.commands.options import Json, Silent, Trust


def export(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.", show_default=False)],
    *,
    out: Annotated[Path, typer.Option("--out", help="Folder to write; it must not exist.", show_default=False)],
    format_name: Annotated[
        str,
        typer.Option(
            "--format",
            help="Format to write: dense (an ordinary checkpoint), adapter (a sparse base and a LoRA adapter), packed "
            "(only the kept values; loads after `import globalopt`) or factors (plain tensors per layer).",
        ),
    ] = "dense",
    ranks: Annotated[
        str,
        typer.Option(
            "--ranks",
            help="Ranks of an adapter: padded (zeros up to the largest rank, which every program reads rightly) or own "
            "(smaller files, for peft alone: others may scale layers wrongly).",
        ),
    ] = "padded",
    trust_remote_code: Trust = False,
    quiet: Silent = False,
    as_json: Json = False,
) -> None:
    """Write the model of a finished run in another format."""
    with errors():
        from globalopt.export.formats import decoded_in, larger_than_dense, loading
        from globalopt.export.formats import export as write
        from globalopt.runs.files import advising

        with advising("Choose a writable --out."):
            size = write(run, format_name, out, trust_remote_code, ranks)
        larger = larger_than_dense(run, out)
        if as_json:
            print_json({"format": format_name, "folder": str(out), "bytes": size, "larger_than_dense": bool(larger)})
        elif not quiet:
            lines = [
                ("written", out),
                ("size", f"{size / 1e6:,.2f} MB"),
                ("note", larger),
                ("note", decoded_in(run, format_name)),
            ]
            say([line for line in lines if line[1]] + [("load", loading(format_name, out))])
