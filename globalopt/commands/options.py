"""The options that several commands take, each said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str | None,
    typer.Argument(help="Local folder or hub id. Left out: the bundled reference model.", show_default=False),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "--model-name-or-path", help="The same as the argument.", show_default=False),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16: what the model computes in.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
LowCoverage = Annotated[
    bool, typer.Option("--allow-low-coverage", help="Go on where under half of the block parameters is compressible.")
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="Most memory to use, such as 8GiB: blocks of the model are loaded one at a time where it needs more, and "
        "hidden states are kept in files. Left out: what is available.",
        metavar="SIZE",
        show_default=False,
    ),
]
SolverName = Annotated[str, typer.Option("--solver", help="What fits the layers; `globalopt list` shows them all.")]
SolverSet = Annotated[
    list[str] | None,
    typer.Option("--set", help="Solver options, comma separated; may be repeated.", metavar="NAME=VALUE"),
]
Sequential = Annotated[
    str,
    typer.Option(
        help="When the inputs of a layer are looked at: site (after the layers before it were replaced) or block (once "
        "per block)."
    ),
]
Match = Annotated[
    str,
    typer.Option(
        help="What is trained after the solver, supports fixed: none; block (every block to the dense one's output); "
        "model (also the whole model to the dense one's predictions)."
    ),
]
MatchSet = Annotated[
    list[str] | None,
    typer.Option(help="Options of block matching, comma separated; may be repeated.", metavar="NAME=VALUE"),
]
DistillSet = Annotated[
    list[str] | None,
    typer.Option(help="Options of model matching, comma separated; may be repeated.", metavar="NAME=VALUE"),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        # The backslash keeps rich from reading markup.
        help=r"Text: .txt, .jsonl or .parquet file, a folder saved by datasets, hub data set ID\[@CONFIG][:SPLIT], or "
        "`reference`: the bundled one.",
        show_default=False,
    ),
]
EvalText = Annotated[
    str | None,
    typer.Option(help="Another text for the test split. Left out: the end of --calibration.", show_default=False),
]
TextColumn = Annotated[str | None, typer.Option(help="Column of the text in a table.", show_default=False)]
Nsamples = Annotated[int, typer.Option(help="Calibration windows.")]
Seqlen = Annotated[int, typer.Option(help="Tokens per window.")]
EvalWindows = Annotated[int, typer.Option(help="Most windows of each evaluation split.")]
BatchSize = Annotated[int, typer.Option(help="Windows per forward pass.", max=2**20)]
Seed = Annotated[int, typer.Option(help="Of windows, labels and search.", min=0, max=2**32 - 1)]
ServingProfile = Annotated[
    str,
    typer.Option(
        help="Where the model will be served: dense (anywhere); adapter (as LoRA: rank at most 512, a multiple of 8); "
        "two-four (every sparse part 2:4); factors (no sparse parts: rank alone, or layers kept or dropped whole).",
    ),
]
RankMultiple = Annotated[
    int | None,
    typer.Option(
        help="Every rank is a multiple of it, or 0. Left out: what --serving-profile says, else any.",
        min=1,
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Run folder. Left out: runs/NAME, made from the options.", show_default=False),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print parameters, coverage, memory, disk and time of the run, and stop."),
]
Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="Delete an earlier run in the folder and start over; the cache is kept and used."),
]
CacheFolder = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        help="Folder of artefacts that runs share. Left out: globalopt-cache beside the run folder, or where the "
        "variable GLOBALOPT_CACHE says.",
        show_default=False,
    ),
]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Keep this run's artefacts in its own folder and share nothing.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also a row per layer.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of tables.")]
