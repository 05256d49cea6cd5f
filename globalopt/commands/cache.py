"""`globalopt cache`: list the artefacts that runs share, and delete them."""

# Heavy imports are inside the functions: `globalopt --help` must not wait for torch.
from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from globalopt.commands.console import errors, out, print_json
from globalopt.commands.options import Json

if TYPE_CHECKING:
    from globalopt.runs.cache import Cache, Entry

app = typer.Typer(help="List the artefacts that runs share, and delete them.", no_args_is_help=True)

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

Folder = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        help="The cache folder. If omitted: GLOBALOPT_CACHE, or else runs/globalopt-cache.",
        show_default=False,
    ),
]
StageName = Annotated[
    str | None, typer.Option("--stage", help="Only artefacts of this stage, as `list` shows it.", show_default=False)
]
Age = Annotated[
    str | None,
    typer.Option(
        "--older-than",
        help="Only artefacts that no run has used for so long: a number with s, m, h, d or w, such as 7d.",
        metavar="AGE",
        show_default=False,
    ),
]


@app.command(name="list")
def list_entries(folder: Folder = None, stage: StageName = None, older_than: Age = None, as_json: Json = False) -> None:
    """List the artefacts of every stage with their size, the time of their last use and their model."""
    with errors():
        import reports

        cache, entries = _chosen(folder, stage, older_than)
        if as_json:
            print_json([_record(entry) for entry in entries])
        else:
            out.print(reports.cache_table(cache.folder, entries))


@app.command()
def prune(folder: Folder = None, stage: StageName = None, older_than: Age = None) -> None:
    """Delete artefacts: all of them, or those that --stage and --older-than select. Runs recompute what they need."""
    with errors():
        from globalopt.machine.memory import size_text

        cache, entries = _chosen(folder, stage, older_than)
        cache.prune(entries)
        freed = size_text(sum(entry.bytes for entry in entries))
        out.out(f"Deleted {len(entries)} entries ({freed}) from {cache.folder}.", highlight=False)


def _chosen(folder: Path | None, stage: str | None, older_than: str | None) -> tuple[Cache, list[Entry]]:
    """Open the cache, and list the entries that the options select."""
    from globalopt.errors import UnknownNameError
    from globalopt.runs.artefacts import Stage
    from globalopt.runs.cache import Cache
    from globalopt.runs.cache import older_than as idle

    cache = Cache(folder) if folder is not None else Cache.beside(Path("runs") / "any")
    entries = cache.entries()
    if stage is not None:
        if stage not in list(Stage):
            raise UnknownNameError("stage", stage, list(Stage))
        entries = [entry for entry in entries if entry.stage == stage]
    return cache, entries if older_than is None else idle(entries, _seconds(older_than))


def _seconds(age: str) -> float:
    """Convert an age such as 7d to seconds."""
    from globalopt.errors import UsageError

    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", age.strip())
    if found is None:
        raise UsageError(f"--older-than takes a number with s, m, h, d or w, such as 7d; got '{age}'.")
    return float(found[1]) * UNITS[found[2]]


def _record(entry: Entry) -> dict[str, object]:
    """Return an entry of the cache as JSON."""
    return {
        "stage": entry.stage.value,
        "model": entry.model,
        "bytes": entry.bytes,
        "used": entry.used,
        "folder": str(entry.folder),
    }
