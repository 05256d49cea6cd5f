"""Declare the options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def one_of(*words: str) -> str:
    """Write the words that an option takes, as the help shows them.

    >>> one_of("none", "block")
    '[none|block]'
    """
    return f"[{'|'.join(words)}]"


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        help="The model: a local folder, a .gguf file or a hub id. If it is left out, the bundled model is used.",
        show_default=False,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "--model-name-or-path", help="The model, in place of the argument.", show_default=False),
]
GGUFFile = Annotated[
    str | None,
    typer.Option(
        "--gguf-file",
        help="Name of the GGUF file in the model's folder or on the hub. It is dequantised once, into the cache.",
        metavar="NAME",
        show_default=False,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Data type in which the model computes.", metavar=one_of("auto", "float32", "bfloat16", "float16")
    ),
]
Device = Annotated[
    str,
    typer.Option(help="Device on which the model computes.", metavar=one_of("auto", "cpu", "cuda", "cuda:N", "mps")),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Allow code that comes with the model to run.")]
LowCoverage = Annotated[
    bool,
    typer.Option(
        "--allow-low-coverage", help="Accept a model of which less than half of the block parameters are compressible."
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="Most memory to use, such as 8GiB. A model that needs more is loaded one block at a time, and its hidden "
        "states are kept in files. If it is left out, the limit is the available memory.",
        metavar="SIZE",
        show_default=False,
    ),
]
SolverName = Annotated[
    str,
    typer.Option(
        "--solver", help="Solver that decomposes the layers; `globalopt list` shows all solvers.", metavar="NAME"
    ),
]
SolverSet = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Options of the solver, separated by commas; may be repeated. `globalopt list SOLVER` shows them.",
        metavar="NAME=VALUE",
    ),
]
Sequential = Annotated[
    str,
    typer.Option(
        help="When Grams are collected during refinement: block (once per block, before any of its layers is replaced) "
        "or site (for each input site, after the layers before it were replaced).",
        metavar=one_of("block", "site"),
    ),
]
MATCH_HELP = (
    "Training of the kept parameters after the solver, with fixed supports: none; block (every block learns to "
    "reproduce the outputs of the dense one); model (then the whole model also learns the dense predictions)."
)
MATCHES = one_of("none", "block", "model")
Match = Annotated[str, typer.Option(help=MATCH_HELP, metavar=MATCHES)]
MatchOrNot = Annotated[
    str | None,
    typer.Option(
        help=f"{MATCH_HELP} Without it: none with --budget, block with --budget-file.",
        metavar=MATCHES,
        show_default=False,
    ),
]
MatchSet = Annotated[
    list[str] | None,
    typer.Option(
        help="Options of block matching, separated by commas; may be repeated. `globalopt list matching` shows them.",
        metavar="NAME=VALUE",
    ),
]
DistillSet = Annotated[
    list[str] | None,
    typer.Option(
        help="Options of model matching, separated by commas; may be repeated. `globalopt list distillation` shows "
        "them.",
        metavar="NAME=VALUE",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        # The backslash keeps rich from reading markup.
        help=r"Text to calibrate on: a .txt, .jsonl or .parquet file, a folder saved by datasets, a hub data set "
        r"ID\[@CONFIG][:SPLIT], `self` for text that the model writes, `reference` for the bundled text, or a mixture "
        r"TEXT:WEIGHT,TEXT:WEIGHT. Rows of messages are written with the chat template of the tokenizer.",
        metavar="TEXT",
        show_default=False,
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        help="Prompts that the model goes on with, for --calibration self: a .txt file with one per line, or a .jsonl "
        "file with a column `prompt` or `messages`. If it is left out, it writes from the BOS token on.",
        metavar="FILE",
        show_default=False,
    ),
]
EvalText = Annotated[
    str | None,
    typer.Option(
        help="Another text for the test part. If it is left out, the end of --calibration is used.", show_default=False
    ),
]
TextColumn = Annotated[
    str | None,
    typer.Option(help="Column that holds the text or the messages, where the text is a table.", show_default=False),
]
Nsamples = Annotated[int, typer.Option(help="Number of calibration windows.")]
Seqlen = Annotated[int, typer.Option(help="Number of tokens per window.")]
Bos = Annotated[
    str,
    typer.Option(
        help="Whether every window begins with the BOS token: auto (if the tokenizer puts one in front of a text), yes "
        "or no.",
        metavar=one_of("auto", "yes", "no"),
    ),
]
EvalWindows = Annotated[
    int, typer.Option(help="Largest number of windows in each of the selection, validation and test parts.")
]
SampleCount = Annotated[
    int,
    typer.Option(
        "--samples",
        help="Number of texts that both models go on with, after the evaluation, for the report; 0 writes none.",
        min=0,
    ),
]
Evaluate = Annotated[
    bool,
    typer.Option(
        "--evaluate/--no-evaluate",
        help="Measure the result beside the dense model, and write --samples of both; `globalopt eval` on the run, or "
        "the same command with --evaluate, does it later.",
    ),
]
BatchSize = Annotated[int, typer.Option(help="Number of windows per forward pass.", max=2**20)]
Seed = Annotated[
    int,
    typer.Option(help="Seed of the choice of windows, of the sampled labels and of the search.", min=0, max=2**32 - 1),
]
ServingProfile = Annotated[
    str,
    typer.Option(
        help="Where the model will be served, which limits every layer: dense (no limits); adapter (LoRA: rank a "
        "multiple of 8, at most 512); two-four (sparse parts are 2:4); factors (no sparse parts: rank alone, or the "
        "layer kept or dropped whole).",
        metavar=one_of("dense", "adapter", "two-four", "factors"),
    ),
]
RankMultiple = Annotated[
    int | None,
    typer.Option(
        help="Every rank is 0 or a multiple of this number. If it is left out, --serving-profile decides.",
        min=1,
        show_default=False,
    ),
]
MaxRank = Annotated[
    int | None,
    typer.Option(
        help="Largest rank of a layer; 0 makes every layer a sparse matrix alone. If it is left out, "
        "--serving-profile decides.",
        min=0,
        show_default=False,
    ),
]
StorageMenu = Annotated[
    str,
    typer.Option(
        "--storage",
        help="Bits of the stored numbers (16, 8, 6, 5, 4 or 3): one number; VALUES/FACTORS such as 4/8; a menu of "
        "these, separated by commas, from which every layer gets one; or auto, all of them. Budgets are then in bytes.",
        metavar="BITS",
    ),
]
Embeddings = Annotated[
    str | None,
    typer.Option(
        "--embeddings",
        help="Bits of the token embedding and of lm_head, which --budget then counts too, in bytes: 16, 8, 6, or auto "
        "(search only: the bits of each that lose least). Without it they stay as they are and are not counted.",
        metavar=one_of("16", "8", "6", "auto"),
        show_default=False,
    ),
]
Accounting = Annotated[
    str | None,
    typer.Option(
        help="Unit of --budget. Without it: params, or bytes with --embeddings or a --storage of less than 16 bits.",
        metavar=one_of("params", "bytes"),
        show_default=False,
    ),
]


Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="Run folder. If it is left out, runs/NAME is used, with a name made from the options.",
        show_default=False,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print the parameters, coverage, memory, disk and time that the run will take, and stop."
    ),
]
Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="Delete an earlier run in the run folder and start over; the cache is kept and used."),
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
    bool,
    typer.Option(
        "--no-cache",
        help="Share nothing: keep this run's artefacts in its own folder, each until the run has read it for the last "
        "time. Takes the least disk space.",
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print no progress, only the result in a few lines; draw no page and pictures."),
]
QuietScores = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress, only the result.")]
Silent = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but notes and errors.")]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Also print one row per layer, and of several processes what each one does."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of tables.")]
