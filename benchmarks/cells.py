"""What the benchmarks share: their options, one analysis for many cells, and a cell that leaves the model as it was.

A cell is one compression in a run folder of its own. A finished cell is read back, an unfinished one goes on where it
stopped, and a folder made from other options is refused (`globalopt.runs.folder.Run`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from globalopt.analysis.one_layer_losses import MEASURED_WINDOWS
from globalopt.budgets import budget_file
from globalopt.errors import GlobalOptError, UsageError
from globalopt.machine.clock import StageClock
from globalopt.pipeline import analyse, session
from globalopt.pipeline import search as pipeline
from globalopt.pipeline.options import AS_FITTED, ModelOptions, RefineOptions, SearchOptions, TextOptions
from globalopt.pipeline.session import Bench
from globalopt.protocols import Allocator
from globalopt.runs.files import read_json, write_json
from globalopt.runs.folder import Run
from globalopt.values.budget import Target
from globalopt.values.layer import NM
from globalopt.values.results import Metrics, Summary
from reports import formats, make_progress
from reports.tables import divergence
from solvers import SOLVERS

err = Console(stderr=True)

WIDTH = 140
"""Columns of tables that are not printed on a terminal."""

ANALYSIS = ("profiles", "outputs", "weighing", "spans", "ratios", "fits", "measured", "sensitivity")
"""Folders of an analysis; prices last, since a run that has them is taken to have been analysed."""

SEARCHES = ("allocate", "search")
"""Stages in which an allocator works."""


def option_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options every benchmark has: model, text and folder."""
    text = TextOptions()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; the bundled reference model if left out")
    parser.add_argument("--calibration", help="text for a model of your own")
    parser.add_argument("--nsamples", type=int, default=text.nsamples, help="calibration windows (%(default)s)")
    parser.add_argument("--seqlen", type=int, default=text.seqlen, help="tokens per window (%(default)s)")
    parser.add_argument("--eval-windows", type=int, default=text.eval_windows, help="per split, at most (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of all cells; the same command resumes")
    return parser


def add_solver(parser: argparse.ArgumentParser) -> None:
    """The options that name a solver and set its own."""
    parser.add_argument("--solver", default="3basil", choices=list(SOLVERS))
    parser.add_argument("--set", type=option_pair, nargs="+", default=[], metavar="NAME=VALUE", help="solver options")


def option_pair(text: str) -> tuple[str, str]:
    """NAME=VALUE of a command line, apart."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"takes NAME=VALUE; got '{text}'")
    return name.replace("-", "_"), value


def run_script(
    work: Callable[[argparse.Namespace, str], None], parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> int:
    """Parse, work, and turn an error of the family into one line and its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        work(parser.parse_args(given), shlex.join([parser.prog, *given]))
    except GlobalOptError as cause:
        err.print(f"error: {cause}", markup=False, highlight=False, soft_wrap=True)
        return cause.exit_code
    return 0


def set_up(options: argparse.Namespace, seed: int) -> Bench:
    """The bench of a seed: the model, dense, and its windows. Progress is shown on a terminal only."""
    text = TextOptions(
        calibration=options.calibration,
        nsamples=options.nsamples,
        seqlen=options.seqlen,
        eval_windows=options.eval_windows,
    )
    progress = make_progress(err, quiet=not err.is_terminal)
    return session.set_up(ModelOptions(model=options.model), text, seed, progress, StageClock())


def analysed(
    bench: Bench,
    pattern: str,
    seed: int,
    folder: Path,
    solver: str = "3basil",
    pricing: str = SearchOptions.pricing,
    scaling: str = SearchOptions.scaling,
    solver_options: Mapping[str, str] | None = None,
) -> Run:
    """The finished analysis of a seed, which depends on neither budget nor allocator."""
    options = SearchOptions(
        budget=1.0,
        pattern=pattern,
        solver=solver,
        solver_options=solver_options or {},
        seed=seed,
        pricing=pricing,
        scaling=scaling,
    )
    run = Run.start(folder, {**bench.identity(seed), "analysis": options.words()}, bench.facts("analysis"))
    timed = replace(bench, clock=StageClock())
    analyse.analyse(timed, options, run, NM.parse(pattern))
    if timed.clock.costs:
        write_json(_seconds_path(run), sum(stage.seconds for stage in timed.clock.costs))
    return run


def analysis_seconds(run: Run) -> float:
    """Seconds the analysis took; after an interruption, those of its last part."""
    return float(read_json(_seconds_path(run)))


def analysis_tokens(bench: Bench, priced: bool) -> int:
    """What an analysis reads, in forward tokens: one walk over the calibration text for the Grams.

    Args:
        priced: with the sweeps for output Grams and for prices, each a walk and a pass forward and backward (a backward
            token counts as two), and every layer looked at twice to choose its metric and about five times for its
            lowest options, on a few windows.
    """
    windows = bench.splits.calibration.windows
    if not priced:
        return windows.numel()
    looks = 7 * len(bench.layers.specs) * min(len(windows), MEASURED_WINDOWS)
    return 8 * windows.numel() + looks * windows.shape[1]


def _seconds_path(run: Run) -> Path:
    return run.folder / "seconds.json"


def share_analysis(analysis: Run, run: Run, folders: Sequence[str] = ANALYSIS) -> None:
    """Give a run the `folders` of artefacts of another, as links where the file system can."""
    for name in folders:
        for source in sorted((analysis.folder / name).glob("*")):
            path = run.folder / name / source.name
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, path)
            except OSError:
                shutil.copyfile(source, path)


def search(
    bench: Bench,
    options: SearchOptions,
    analysis: Run,
    folder: Path,
    command: str,
    allocator: Allocator | None = None,
    refining: RefineOptions = AS_FITTED,
) -> Summary:
    """`pipeline.search` of one cell on an analysis that is there already."""
    run = Run.start(folder, pipeline.search_identity(bench, options, refining), bench.facts(command))
    share_analysis(analysis, run)
    with dense_after(bench) as fresh:
        return pipeline.search(fresh, options, folder, command, allocator=allocator, refining=refining)[0]


def selection_loss(bench: Bench, options: SearchOptions, folder: Path) -> float:
    """KL of a finished cell's allocation on the selection text, of the candidates that a search asks about."""
    run = Run.open(folder)
    summary = run.read_summary()
    return loss_of(bench, options, run, targets_of(bench, run)) if summary.search is None else summary.search.loss


def targets_of(bench: Bench, run: Run) -> Mapping[str, Target]:
    """What the budget file of a run gives every layer of the bench's model."""
    file = budget_file.read(run.budget_path)
    return file.for_model(bench.fingerprint, bench.layers.specs, run.budget_path).targets


def loss_of(bench: Bench, options: SearchOptions, run: Run, targets: Mapping[str, Target]) -> float:
    """KL of `targets` on the selection text, of candidates made from the analysis in `run`; its journal remembers."""
    problem = pipeline.pose(bench, options, run)
    with pipeline.true_loss(replace(bench, clock=StageClock()), options, run, problem) as objective:
        return float(objective.losses([targets], range(objective.chunks)).mean())


@contextlib.contextmanager
def dense_after(bench: Bench) -> Iterator[Bench]:
    """The bench with a clock of its own; its model, which refinement changes in place, is dense again afterwards."""
    model = bench.loaded.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        yield replace(bench, clock=StageClock())
    finally:
        model.load_state_dict(before)


@dataclass(frozen=True)
class Figures:
    """Quality of one cell on one split: distance from the dense model, and both perplexities."""

    dense: Metrics
    compressed: Metrics

    @property
    def kl(self) -> float:
        if self.compressed.kl is None:
            raise UsageError("A cell was not compared with its dense model; delete its folder and run again.")
        return self.compressed.kl

    def record(self) -> dict[str, Any]:
        return {
            "kl": self.kl,
            "kl_stderr": self.compressed.kl_stderr,
            "perplexity": self.compressed.perplexity,
            "dense_perplexity": self.dense.perplexity,
            "windows": self.compressed.windows,
            "text_sha256": self.compressed.text_sha256,
        }


def figures(summary: Summary) -> dict[str, Figures]:
    """The figures of a run by split, validation first."""
    pairs = zip(summary.dense, summary.compressed, strict=True)
    return {compressed.split: Figures(dense, compressed) for dense, compressed in pairs}


def seconds(summary: Summary, stages: Sequence[str] | None = None) -> float:
    """Seconds of all `stages` of a cell, or of every one; the shared analysis is none of them."""
    return sum(stage.seconds for stage in summary.stages if stages is None or stage.name in stages)


def ratios(summary: Summary, baseline: Mapping[str, Figures]) -> dict[str, float | None]:
    """KL of a run over that of the baseline, by split; None where the baseline loses nothing."""
    return {
        split: found.kl / baseline[split].kl if baseline[split].kl > 0 else None
        for split, found in figures(summary).items()
    }


def split_records(summary: Summary, ratios: Mapping[str, float | None]) -> dict[str, dict[str, Any]]:
    """Figures and ratio of a run by split, for a JSON file."""
    return {split: {**found.record(), "ratio": ratios[split]} for split, found in figures(summary).items()}


def console() -> Console:
    """Where tables are printed: as wide as the terminal, or `WIDTH` where there is none."""
    out = Console()
    return out if out.is_terminal else Console(width=WIDTH)


def mean(values: Sequence[float | None]) -> float | None:
    """None where one of them is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def folder_name(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^\w.=-]+", "-", label)


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def say(done: int, total: int, what: str, summary: Summary) -> None:
    """One line for a finished cell."""
    kl = divergence(figures(summary)["validation"].compressed)
    line = f"{done}/{total}  {what}  KL {kl}  {formats.duration(seconds(summary))}"
    err.print(line, markup=False, highlight=False, soft_wrap=True)
