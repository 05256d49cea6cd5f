"""How long does robust PCA take, beside the same iteration with SVDs, and what does its tolerance decide?

    OMP_NUM_THREADS=1 python benchmarks/spans_time.py --out OUT [--shapes 576x576,576x1536] [--repeats 3]
    OMP_NUM_THREADS=1 python benchmarks/spans_time.py --out OUT --model FOLDER --calibration TEXT

Matrices are the layers of a model's middle block, scaled by their inputs as for spans, and random ones of the
`--shapes` with power-law spectra. Times are the least wall seconds of `--repeats`; ratios are of the twins in
`tests/reference`, at the first of the tolerances and timed in the same run. Every tolerance is compared with the first
one: by the error, in scaled coordinates, of what is cut from the span, by its leading directions, and by its largest
entries.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from statistics import fmean
from typing import Any

import cells
import torch
from finished_cells import Cells
from from_tests import rpca
from layer_problems import Stopwatch, geometric_mean, shapes
from rich.text import Text
from torch import Tensor

from globalopt.analysis.spans import compute_span, input_scale
from globalopt.kernels.projection import keep_weights
from globalopt.kernels.rpca import robust_pca
from globalopt.models.walk import walk_blocks
from globalopt.runs.files import write_json
from globalopt.values.span import Span
from reports.table_style import add_numbers, footed, report_table

TWINS = {"full SVD": rpca.full, "subspace": rpca.subspace}
DIRECTIONS = 0.1  # leading ones that are compared, of the smaller side
ENTRIES = 0.2  # largest ones that are compared, of all
CUTS = tuple(product((0.3, 0.5), (0.1, 0.2, 0.4)))  # kept fraction, rank share


@dataclass(frozen=True)
class Timing:
    """Seconds on one matrix, ours and by twin, and the largest distance of L from a twin's, relative to L."""

    matrix: str
    steps: int
    rank: int
    seconds: float
    twins: dict[str, float]
    distance: float


@dataclass(frozen=True)
class Looser:
    """The span of a matrix at one tolerance against that at the first: overlaps in [0, 1], ratios of errors."""

    matrix: str
    tolerance: float
    steps: float
    seconds: float
    directions: float
    entries: float
    errors: tuple[float, ...]


def power_law(d_out: int, d_in: int, power: float) -> Tensor:
    """Singular values `i^-power`, noise of a third of what they give, and log-normal scales of the columns."""
    generator = torch.Generator().manual_seed(0)
    k = min(d_out, d_in)
    U = torch.linalg.qr(torch.randn(d_out, k, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(d_in, k, generator=generator)).Q
    L = (U * torch.arange(1.0, k + 1) ** -power) @ V.mT
    noise = 0.3 * float(L.std()) * torch.randn(d_out, d_in, generator=generator)
    return (L + noise) * (0.7 * torch.randn(d_in, generator=generator)).exp()


def matrices(options: argparse.Namespace) -> Iterator[tuple[str, Tensor]]:
    """Every matrix with its name."""
    session = cells.set_up(options, seed=0)
    for visit in walk_blocks(session.runner(options.out)):
        if visit.index == len(session.layers.blocks) // 2:
            grams = visit.grams()
            for spec in visit.specs:
                scaled = session.layers.weight(spec.name) * input_scale(grams[spec.site], spec.d_in)
                yield f"{spec.kind} {spec.d_out}x{spec.d_in}", scaled
    for (d_out, d_in), power in product(options.shapes, options.powers):
        yield f"i^-{power:g} {d_out}x{d_in}", power_law(d_out, d_in, power)


def timed(run: Callable[[], Any], repeats: int) -> float:
    """The least seconds of `repeats` calls: what else the machine does only adds to them."""
    found = []
    for _ in range(repeats):
        with Stopwatch(torch.device("cpu")) as watch:
            run()
        found.append(watch.seconds)
    return min(found)


def timing(name: str, M: Tensor, options: argparse.Namespace) -> Timing:
    """Ours and the twins on one matrix."""
    tolerance, repeats = options.tolerances[0], options.repeats
    ours = robust_pca(M, tolerance=tolerance)
    L = (ours.U * ours.s) @ ours.Vh
    theirs = [rpca.iterate(M, above, tolerance)[0] for above in TWINS.values()]
    return Timing(
        name,
        ours.steps,
        len(ours.s),
        timed(lambda: robust_pca(M, tolerance=tolerance), repeats),
        {twin: timed(lambda above=above: rpca.iterate(M, above, tolerance), repeats) for twin, above in TWINS.items()},
        max(float(torch.linalg.matrix_norm(L - other) / torch.linalg.matrix_norm(other)) for other in theirs),
    )


def largest(span: Span) -> Tensor:
    """Which entries of `S` are among the largest."""
    return keep_weights(span.S.abs(), int(ENTRIES * span.S.numel()))


def cut_error(span: Span, kept: float, share: float) -> float:
    """The squared error of the span's cut at a kept fraction and rank share."""
    rank = min(span.max_rank, int(share * kept * span.S.numel() / sum(span.S.shape)))
    rest = span.residual(rank)
    chosen = keep_weights(rest.abs(), int(kept * rest.numel() - rank * sum(rest.shape)))
    return float(torch.where(chosen, 0.0, rest).double().square().sum())


def looser(name: str, M: Tensor, options: argparse.Namespace) -> tuple[Looser, ...]:
    """Every tolerance against the first one."""
    first: Span | None = None
    found = []
    leading = max(1, int(DIRECTIONS * min(M.shape)))
    for tolerance in options.tolerances:
        with Stopwatch(torch.device("cpu")) as watch:
            span = compute_span(M, scaling="none", tolerance=tolerance)
        first = first or span
        overlap = (first.U[:, :leading].mT @ span.U[:, :leading]).square().sum() / leading
        entries = (largest(first) & largest(span)).sum() / largest(first).sum()
        errors = tuple(cut_error(span, *cut) / cut_error(first, *cut) for cut in CUTS)
        steps = span.stats["steps"]
        found.append(Looser(name, tolerance, steps, watch.seconds, float(overlap), float(entries), errors))
    return tuple(found)


def work(options: argparse.Namespace, command: str) -> None:
    timings: list[Timing] = []
    found: list[Looser] = []
    asked = {"tolerances": options.tolerances, "repeats": options.repeats, "threads": torch.get_num_threads()}
    finished = Cells(options.out / "cells", asked)
    for name, M in matrices(options):
        identity = {"norm": float(torch.linalg.matrix_norm(M))}
        timings.append(finished.get(Timing, f"time {name}", identity, partial(timing, name, M, options)))
        found += finished.get(tuple[Looser, ...], f"looser {name}", identity, partial(looser, name, M, options))
        cells.err.print(f"{name}: {timings[-1].seconds:.3f} s", highlight=False)
    record = {"command": command, "torch": torch.__version__, **asked}
    cuts = {"timings": [asdict(each) for each in timings], "tolerances": [asdict(each) for each in found]}
    write_json(options.out / "spans-time.json", {**record, **cuts})
    out = cells.console()
    table = report_table("Seconds of a twin over ours")
    table.add_column("matrix")
    add_numbers(table, ("steps", "rank", "seconds", *TWINS, "distance"))
    for each in timings:
        ratios = (f"{spent / each.seconds:.2f}" for spent in each.twins.values())
        figures = (str(each.steps), str(each.rank), f"{each.seconds:.3f}", *ratios, f"{each.distance:.1e}")
        table.add_row(Text(each.matrix), *figures)
    means = (geometric_mean([each.twins[twin] / each.seconds for each in timings]) for twin in TWINS)
    table.add_section()
    table.add_row("geometric mean", "", "", "", *(f"{mean:.2f}" for mean in means), "")
    out.print(
        footed(table, f"at tolerance {options.tolerances[0]:g}; distance: of L from the twins', relative to it"), ""
    )
    table = report_table("Spans at looser tolerances")
    add_numbers(table, ("tolerance", "steps", "seconds", "directions", "least", "entries", "least", "error", "worst"))
    for tolerance in options.tolerances:
        some = [each for each in found if each.tolerance == tolerance]
        errors = [ratio for each in some for ratio in each.errors]
        table.add_row(
            f"{tolerance:g}",
            f"{fmean(each.steps for each in some):.1f}",
            f"{sum(each.seconds for each in some):.2f}",
            f"{fmean(each.directions for each in some):.4f}",
            f"{min(each.directions for each in some):.4f}",
            f"{fmean(each.entries for each in some):.4f}",
            f"{min(each.entries for each in some):.4f}",
            f"{fmean(errors):.4f}",
            f"{max(errors):.4f}",
        )
    shares = (
        f"overlap of the leading {DIRECTIONS:g} directions and largest {ENTRIES:g} of the entries with the first span's"
    )
    out.print(footed(table, shares, "error: of cuts of the span, over those of the first"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cells.option_parser(__doc__)
    parser.add_argument("--shapes", type=shapes, default=shapes("192x576,576x576,1536x576,576x1536"))
    parser.add_argument("--powers", type=float, nargs="+", default=[0.3, 1.0], help="of the random spectra")
    parser.add_argument("--tolerances", type=float, nargs="+", default=[1e-3, 2e-3, 5e-3, 1e-2, 2e-2])
    parser.add_argument("--repeats", type=int, default=3)
    return cells.run_script(work, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
