"""How do the time and the memory of every allocator grow with the number of layers?

    python benchmarks/many_layers.py --out OUT [--layers 100 1000 3000 10000] [--limit 600]
    python benchmarks/many_layers.py --out OUT --allocators knapsack auto:rounds=1

Problems are synthetic: layers of the shapes of a mixture of experts with the options that an analysis offers for them,
and predicted losses that fall log-linearly with what is kept, with a ripple. The objective bends them by factors that
the surfaces do not know, and couples neighbouring layers. It needs no model, and its time is left out, so that the time
is the allocator's own: seconds of the processor, which other programs do not change. Every cell is a process of its
own, which is ended after `--limit` seconds of the clock; larger problems are then left out. `surfaces` makes the
problem, and `budget file` writes, reads, compares and checks budget files.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import cells
import numpy as np
import torch
from allocator_contenders import Contender
from finished_cells import Cells
from rich.console import Group as Stack
from rich.text import Text
from torch import Tensor

from allocators import ALLOCATORS
from globalopt.analysis.grid import Options
from globalopt.budgets import budget_file
from globalopt.budgets.diff import diff, record
from globalopt.protocols import Candidate
from globalopt.runs.files import write_json
from globalopt.values.budget import Budget, Target
from globalopt.values.error_unit import ErrorUnit
from globalopt.values.layer import LayerSpec
from globalopt.values.problem import OUTLIER_THRESHOLDS, Problem, Profile
from globalopt.values.span import Mask, Span
from globalopt.values.surface import ErrorSurface
from reports import formats
from reports.table_style import add_numbers, footed, report_table

SHAPES = {"q_proj": (2048, 2048), "k_proj": (512, 2048), "down_proj": (2048, 768), "up_proj": (768, 2048)}
"""Kinds of layers and their shapes; in every block the last two are those of all experts."""

SMALL = {"q_proj": (32, 32), "k_proj": (16, 32), "down_proj": (32, 24), "up_proj": (24, 32)}
"""The same for allocators that hold every component of all spans at once."""

EXPERTS = 15
PER_BLOCK = 2 + 2 * EXPERTS

CHUNKS, WINDOWS, SEQLEN = 8, 8, 256
"""Chunks of the selection text, windows of a chunk, tokens of a window: as in a search with default options."""

TOKENS = 500_000
SURFACES, FILE = "surfaces", "budget file"
PRESETS = {"evolution": ("evopress", "guided"), "bernoulli": ("cap", "default")}
FIELD = (
    SURFACES,
    FILE,
    *(name for name in ALLOCATORS if name not in PRESETS),
    *(f"{name}:preset={preset}" for name, presets in PRESETS.items() for preset in presets),
)


def make_surfaces(layers: int, seed: int, small: bool) -> tuple[ErrorSurface, ...]:
    """Make the surfaces of `layers` layers; their options are those of `Options.of`, made anew for every layer."""
    rng = np.random.default_rng(seed)
    shapes = SMALL if small else SHAPES
    grids = {}
    for kind, (d_out, d_in) in shapes.items():
        spec = LayerSpec(kind, 0, kind, kind, d_out, d_in)
        targets = Options.of(spec, max_rank=min(d_out, d_in) // 3).targets
        rank = np.array([target.rank for target in targets])
        nnz = np.array([target.nnz for target in targets])
        # A direction keeps more than its parameters, the more the fewer there are.
        kept = np.minimum(1, nnz / spec.numel + 1.6 * (rank * (d_out + d_in) / spec.numel) ** 0.9)
        grids[kind] = targets, kept, nnz == spec.numel
    surfaces = []
    for number in range(layers):
        block, place = divmod(number, PER_BLOCK)
        kind = list(shapes)[place] if place < 2 else list(shapes)[2 + place % 2]
        name = f"model.layers.{block}.{kind}.{place}"
        targets, kept, dense = grids[kind]
        steep = rng.uniform(4, 9)
        level = math.exp(rng.normal(-6, 1.2))
        ripple = np.exp(0.03 * rng.standard_normal(len(kept)))
        error = np.where(dense, 0.0, level * (np.exp(-steep * kept) - math.exp(-steep)) * ripple).clip(0.0)
        made = tuple(Target(target.rank, target.nnz) for target in targets)
        surfaces.append(ErrorSurface(LayerSpec(name, block, name, kind, *shapes[kind]), made, tuple(error.tolist())))
    return tuple(surfaces)


def make_problem(layers: int, kept: float, seed: int, small: bool = False) -> Problem:
    """Pose the problem, with profiles; where it is `small` also with spans."""
    surfaces = make_surfaces(layers, seed, small)
    rng = random.Random(seed)
    profiles = {
        s.spec.name: Profile({m: rng.uniform(0.0, 0.1) / m for m in OUTLIER_THRESHOLDS}, rng.uniform(2.0, 6.0))
        for s in surfaces
    }
    specs = {surface.spec.name: surface.spec for surface in surfaces}

    def span(name: str) -> Span:
        """Of a weight of random directions and entries, which is not decomposed again."""
        spec = specs[name]
        generator = torch.Generator().manual_seed(len(name) + spec.block)
        k = spec.max_rank // 3
        U, V = (torch.linalg.qr(torch.randn(n, k, generator=generator)).Q for n in (spec.d_out, spec.d_in))
        s = torch.rand(k, generator=generator).sort(descending=True).values
        S = torch.randn(spec.d_out, spec.d_in, generator=generator) / spec.d_in
        return Span(U, s, V.mT, S, torch.ones(spec.d_in), torch.ones(spec.d_out, 1))

    budget = Budget.fraction(kept, list(specs.values()))
    return Problem(surfaces, budget, seed=seed, profiles=profiles, spans=span if small else None)


@dataclass
class SyntheticObjective:
    """Windows' losses `scale_n (sum_l m_l error_l + COUPLING sum_l sqrt(m_l error_l m_l+1 error_l+1))^POWER`.

    The multipliers `m_l` are log-normal by kind and by layer. `seconds` is the time spent in it.
    """

    problem: Problem
    limit: int = TOKENS
    tokens: int = 0
    seconds: float = 0.0
    COUPLING: ClassVar[float] = 0.3
    POWER: ClassVar[float] = 0.9
    BEND: ClassVar[float] = 0.35

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.problem.seed + 1)
        kinds = {kind: rng.normal(0, self.BEND) for kind in sorted({spec.kind for spec in self.problem.specs})}
        surfaces = sorted(self.problem.surfaces, key=lambda surface: surface.spec.name)
        self._layers = [
            (surface.spec.name, surface, math.exp(kinds[surface.spec.kind] + rng.normal(0, self.BEND)))
            for surface in surfaces
        ]
        self._errors: list[dict[Target, float]] = [{} for _ in surfaces]
        self._scales = torch.from_numpy(np.exp(0.2 * rng.standard_normal((CHUNKS, WINDOWS))))
        self._counted: set[tuple[int, int]] = set()

    @property
    def chunks(self) -> int:
        return CHUNKS

    @property
    def chunk_tokens(self) -> int:
        return WINDOWS * SEQLEN

    def losses(self, candidates: Sequence[Candidate], chunks: Sequence[int]) -> Tensor:
        """Compute the losses (candidates, windows of the chunks)."""
        started = time.process_time()
        rows = []
        for candidate in candidates:
            key, total = self._total(candidate)
            self.tokens += self.chunk_tokens * sum((key, chunk) not in self._counted for chunk in chunks)
            self._counted.update((key, chunk) for chunk in chunks)
            rows.append(torch.cat([self._scales[chunk] * total for chunk in chunks]))
        self.seconds += time.process_time() - started
        return torch.stack(rows)

    def true(self, candidate: Candidate) -> float:
        """Compute the loss without the windows' scales."""
        error = np.empty(len(self._layers))
        for i, (name, surface, multiplier) in enumerate(self._layers):
            kept = candidate[name]
            target = kept.target() if isinstance(kept, Mask) else kept
            known = self._errors[i]
            if target not in known:
                known[target] = multiplier * surface.predict(target)
            error[i] = known[target]
        return float((error.sum() + self.COUPLING * np.sqrt(error[1:] * error[:-1]).sum()) ** self.POWER)

    def _total(self, candidate: Candidate) -> tuple[int, float]:
        """Return a key of the candidate and its loss; equal candidates have equal losses and equal keys."""
        total = self.true(candidate)
        return hash(total), total


@dataclass(frozen=True)
class Cell:
    """Seconds of one contender at one number of layers, and the most bytes its process held.

    Args:
        seconds: of its own; None where the limit of time came first.
        objective: seconds in the objective, which are not in `seconds`.
        tokens: that it evaluated.
        problem_bytes: that the process held when the problem was made.
        predicted, gap, found: of its allocation: predicted loss, gap to the bound, true loss.
        parts: seconds of its parts by name.
    """

    layers: int
    label: str
    seconds: float | None
    objective: float = 0.0
    tokens: int = 0
    problem_bytes: int = 0
    peak_bytes: int = 0
    predicted: float | None = None
    gap: float | None = None
    found: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)


def measure(label: str, layers: int, kept: float, seed: int) -> Cell:
    """Measure a contender in this process."""
    started = time.process_time()
    if label == SURFACES:
        surfaces = make_surfaces(layers, seed, small=False)
        made = time.process_time()
        Problem(surfaces, Budget.fraction(kept, [surface.spec for surface in surfaces]))
        parts = {"surfaces": made - started, "problem": time.process_time() - made}
        return Cell(layers, label, sum(parts.values()), problem_bytes=peak(), peak_bytes=peak(), parts=parts)
    if label == FILE:
        problem = make_problem(layers, kept, seed)
        held = peak()
        parts = budget_parts(problem)
        return Cell(layers, label, sum(parts.values()), problem_bytes=held, peak_bytes=peak(), parts=parts)
    contender = Contender.parse(label)
    problem = make_problem(layers, kept, seed, small=dict(contender.options).get("preset") == "cap")
    held = peak()
    allocator = contender.make()
    objective = SyntheticObjective(problem, contender.limit or TOKENS)
    started = time.process_time()
    found = allocator.allocate(problem, objective)
    seconds = time.process_time() - started - objective.seconds
    most = peak()
    spent, tokens = objective.seconds, objective.tokens
    true = objective.true(found.targets)
    return Cell(layers, label, seconds, spent, tokens, held, most, found.predicted, found.gap, true)


def budget_parts(problem: Problem) -> dict[str, float]:
    """Time every step from targets to a compared and checked budget file."""
    seconds: dict[str, float] = {}
    mark = time.process_time()

    def took(name: str) -> None:
        nonlocal mark
        seconds[name] = time.process_time() - mark
        mark = time.process_time()

    targets = {s.spec.name: min(s.targets, key=lambda t: t.params(s.spec)) for s in problem.surfaces}
    took("targets")
    allocation = problem.finish(targets, by="hand")
    took("finish")
    total = problem.budget.total
    file = budget_file.make(allocation, problem, "f" * 64, total, total, problem.budget.kept, ErrorUnit.NATS)
    took("make")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "budget.json"
        budget_file.write(path, file)
        took("write")
        again = budget_file.read(path)
        took("read and validate")
        other = budget_file.without_rank(again)
        took("without rank")
        record(diff(again, other, (path, path)))
        took("diff")
        again.for_model(file.fingerprint, problem.specs, path)
        took("for model")
    return seconds


def peak() -> int:
    """Return the most bytes of memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def apart(label: str, layers: int, options: argparse.Namespace) -> Cell:
    """Measure a contender in a process of its own, which ends after the limit of time."""
    command = [sys.executable, __file__, "--cell", label, "--layers", str(layers), "--out", str(options.out)]
    command += ["--kept", str(options.kept), "--seed", str(options.seed)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=options.limit, check=True)
    except subprocess.TimeoutExpired:
        return Cell(layers, label, None)
    return Cell(**json.loads(done.stdout))


def exponent(made: Sequence[Cell]) -> float | None:
    """Fit `seconds = c layers^exponent` by least squares of the logarithms, over sizes of at least a tenth second."""
    known = [cell for cell in made if cell.seconds is not None and cell.seconds >= 0.1]
    if len(known) < 2:
        return None
    logs = np.log([[cell.layers, cell.seconds or 0.0] for cell in known])
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def table(made: Sequence[Cell], options: argparse.Namespace) -> Stack:
    """One row per contender, one column per number of layers."""
    rows = report_table(f"Processor seconds of an allocator's own, kept {options.kept:g}")
    rows.add_column("allocator")
    add_numbers(rows, (*(f"{layers:,}" for layers in options.layers), "exponent", "memory"))
    for label in dict.fromkeys(cell.label for cell in made):
        own = [cell for cell in made if cell.label == label]
        seconds = {cell.layers: cell.seconds for cell in own}
        shown = ["-" if (s := seconds.get(n)) is None else formats.significant(s) for n in options.layers]
        slope = exponent(own)
        largest = own[-1].peak_bytes
        rows.add_row(
            Text(label),
            *shown,
            "-" if slope is None else f"{slope:.2f}",
            f"{largest / 2**20:,.0f} MiB" if largest else "-",
        )
    return footed(
        rows,
        "without the seconds in the objective; -: not in the limit of time, or left out after it",
        "exponent: of layers in the seconds, by least squares of logarithms, over cells of at least 0.1 s",
        f"memory: the most that the process held at {options.layers[-1]:,} layers, imports and problem included",
        f"limit of the objective: {formats.compact(TOKENS)} tokens, {CHUNKS * WINDOWS * SEQLEN:,} a full evaluation",
    )


def work(options: argparse.Namespace, command: str) -> None:
    if options.cell is not None:
        sys.stdout.write(json.dumps(asdict(measure(options.cell, options.layers[0], options.kept, options.seed))))
        return
    store = Cells(options.out / "cells", {"kept": options.kept, "seed": options.seed, "limit": options.limit})
    made: list[Cell] = []
    for label in options.allocators:
        for layers in sorted(options.layers):

            def compute(label: str = label, layers: int = layers) -> Cell:
                return apart(label, layers, options)

            made.append(store.get(Cell, f"{label} {layers}", {}, compute))
            cells.err.print(f"{label} at {layers:,} layers: {made[-1].seconds} s", markup=False, highlight=False)
            if made[-1].seconds is None:
                break
    write_json(options.out / "many_layers.json", {"command": command, "cells": [asdict(cell) for cell in made]})
    cells.console().print(table(made, options))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results; the same command resumes")
    parser.add_argument("--layers", type=int, nargs="+", default=[100, 1000, 3000, 10000])
    parser.add_argument("--allocators", nargs="+", default=list(FIELD), metavar="NAME[:OPTION=VALUE,...][@TOKENS]")
    parser.add_argument("--kept", type=float, default=0.3, help="fraction kept (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds of one cell (%(default)s)")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return cells.run_script(work, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
