"""What the benchmarks share: their options, one cache for many cells, and a cell that leaves the model as it was.

A cell is one compression in a run folder of its own. A finished cell is read back, an unfinished one goes on where it
stopped, and a folder made from other options is refused (`globalopt.runs.folder.Run`). The cells of a benchmark share
one cache (`globalopt.runs.cache.Cache`), and so the analysis of a seed; searches and their refinements are each cell's
own, so that their times do not depend on the cells before.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from globalopt.analysis import corrections, metric_choices
from globalopt.analysis.layer_analysis import LayerAnalysis
from globalopt.budgets import budget_file
from globalopt.errors import GlobalOptError, UsageError
from globalopt.objective.of_run import SearchObjective
from globalopt.pipeline import analyse
from globalopt.pipeline import search as pipeline
from globalopt.pipeline import session as sessions
from globalopt.pipeline.addresses import FINISHED, VERSIONS, algorithms, objective_addresses
from globalopt.pipeline.method_records import method_record
from globalopt.pipeline.options import ModelOptions, TextOptions
from globalopt.pipeline.plan import SearchPlan
from globalopt.pipeline.reporter import Reporter
from globalopt.pipeline.reuse import opened
from globalopt.pipeline.session import Session
from globalopt.protocols import Reads
from globalopt.runs.artefacts import Stage
from globalopt.runs.cache import FOLDER, Address, Cache
from globalopt.runs.files import read_json, write_json
from globalopt.runs.folder import WORK, Run
from globalopt.values.budget import Target
from globalopt.values.metrics import Metrics
from globalopt.values.problem import Problem
from globalopt.values.results import Summary
from reports import formats, make_progress
from reports.quality_tables import divergence
from solvers import SOLVERS

err = Console(stderr=True)

WIDTH = 140
"""Columns of tables that are not printed on a terminal."""

OF_ALLOCATION = ("budget", "allocator", "allocator_options", "search_tokens")
"""Options of a search that an analysis does not read."""

TIMED = (Stage.OBJECTIVE, *FINISHED)
"""Stages that every search computes itself."""

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


def add_rows(parser: argparse.ArgumentParser, rows: Iterable[str], match: Sequence[str]) -> None:
    """Add the options that choose rows, matchings and seeds, and more words of every search."""
    parser.add_argument("--match", nargs="+", default=list(match), choices=["none", "block", "model"])
    parser.add_argument("--rows", nargs="+", default=list(rows), choices=list(rows))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(%(default)s)")
    parser.add_argument(
        "--with", dest="extra", default="", help="more words of every search, such as '--set preset=fast'"
    )


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


def reporter() -> Reporter:
    """A reporter whose clock is at zero; it shows stages on a terminal only."""
    return Reporter(make_progress(err, quiet=not err.is_terminal))


def set_up(options: argparse.Namespace, seed: int) -> Session:
    """The session of a seed: the model, dense, and its windows."""
    text = TextOptions(
        calibration=options.calibration,
        nsamples=options.nsamples,
        seqlen=options.seqlen,
        eval_windows=options.eval_windows,
    )
    return sessions.set_up(ModelOptions(model=options.model), text, seed, reporter())


def cache_of(options: argparse.Namespace) -> Cache:
    """The cache that all cells of a benchmark share."""
    return Cache(options.out / FOLDER)


class SearchCache(Cache):
    """The cache of one search: it shares all but the stages that are timed, and has those in its run folder."""

    def __init__(self, shared: Cache, run: Path) -> None:
        super().__init__(shared.folder)
        self._own = Cache(run / WORK)

    def path(self, address: Address) -> Path:
        """The folder of an address."""
        return self._own.path(address) if address.stage in TIMED else super().path(address)


@dataclass(frozen=True, eq=False)
class Analysed:
    """An analysed model.

    Args:
        run: holds the addresses of the artefacts.
        seconds: that the analysis took when it was computed; after an interruption, those of its last part.
    """

    session: Session
    analysis: LayerAnalysis
    run: Run
    seconds: float

    def problem(self, plan: SearchPlan) -> Problem:
        """The allocation problem of a search on this analysis."""
        return pipeline.pose(self.session, plan, self.run, Reads.SURFACES)

    def objective(self, plan: SearchPlan, problem: Problem) -> AbstractContextManager[SearchObjective]:
        """The objective of that search, with a journal in the shared cache."""
        return pipeline.true_loss(self.session, plan, self.analysis, problem)

    def loss(self, plan: SearchPlan, targets: Mapping[str, Target]) -> float:
        """KL of `targets` on the selection text, of the candidates that this search evaluates."""
        with self.objective(plan, self.problem(plan)) as objective:
            return float(objective.losses([targets], range(objective.chunks)).mean())


def analysed(session: Session, plan: SearchPlan, folder: Path, cache: Cache) -> Analysed:
    """Analyse the model for a search, or find that it was analysed; neither budget nor allocator is read.

    Args:
        folder: of the record of what was analysed, and how long it took; one of another analysis is refused.
    """
    identity = {
        **session.identity(),
        "analysis": {name: value for name, value in plan.words.items() if name not in OF_ALLOCATION},
        "methods": {"solver": method_record(plan.analysis.solver), "probe": method_record(plan.analysis.probe)},
        "algorithms": algorithms(stage for stage in VERSIONS if stage not in FINISHED),
    }
    path, timed = folder / "seconds.json", reporter()
    with opened(session, folder, identity, "analysis", cache, fresh=False) as (run, at):
        at(objective_addresses(session, plan))
        # All allocators share it, one of which reads spans.
        analysis = analyse.analyse(session, timed, plan.analysis, run, Reads.SURFACES | Reads.SPANS)
        if timed.costs or not path.exists():
            write_json(path, sum(stage.seconds for stage in timed.costs))
    return Analysed(session, analysis, run, float(read_json(path)))


def analysis_tokens(session: Session, predicted: bool) -> int:
    """What an analysis reads, in forward tokens: one walk over the calibration text for the Grams.

    Args:
        predicted: with the sweep for output Grams, a walk and a pass forward and backward (a backward token counts as
            two), such a pass on a few windows for the metrics, and the rounds of corrections, each one too,
            and another pass forward.
    """
    windows = session.splits.calibration.windows
    if not predicted:
        return windows.numel()
    checked = 5 * min(len(windows), metric_choices.WINDOWS)
    measured = 4 * corrections.ROUNDS * min(len(session.splits.selection.windows), corrections.WINDOWS)
    return 4 * windows.numel() + (checked + measured) * windows.shape[1]


def search(session: Session, plan: SearchPlan, folder: Path, command: str, cache: Cache) -> Summary:
    """One cell: a search whose analysis is computed if it is not in the cache."""
    with dense_after(session):
        return pipeline.search(session, reporter(), plan, folder, command, SearchCache(cache, folder))[0]


def selection_loss(analysed: Analysed, plan: SearchPlan, folder: Path) -> float:
    """KL of a finished cell's allocation on the selection text, of the candidates that a search evaluates."""
    run = Run.open(folder)
    found = run.summary().search
    return analysed.loss(plan, targets_of(analysed.session, run)) if found is None else found.loss


def targets_of(session: Session, run: Run) -> Mapping[str, Target]:
    """What the budget file of a run gives every layer of the session's model."""
    file = budget_file.read(run.budget_path)
    return file.for_model(session.fingerprint, session.layers.specs, run.budget_path).targets


@contextlib.contextmanager
def dense_after(session: Session) -> Iterator[None]:
    """The session's model, which refinement changes in place and frees in the end, is dense again after the body."""
    model = session.loaded.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(before, assign=True)
        model.tie_weights()


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
    """Seconds of all `stages` of a cell, or of every one; an analysis that was there before is none of them."""
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
