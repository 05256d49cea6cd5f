"""How do time, memory and disk of every stage of a search grow with the width, the depth and the tokens?

    python benchmarks/cost.py --out OUT [--widths 128 256 512] [--depths 4 8] [--windows 16 64] [--set preset=fast]
    python benchmarks/cost.py --out OUT --model FOLDER       # one real model in place of random ones
    python benchmarks/cost.py --out OUT --program /path/to/globalopt      # another version in place of this one

Llamas of random weights are searched by the real command, each in a process of its own, with a cache of its own. Its
summary has the seconds and the peak memory of every stage, its folders the bytes. Exponents are fitted to the
logarithms by least squares, over all sizes together; from them follows what the shapes of Llama-3-8B would take on this
machine, beside what `--dry-run` says. Stages that are over in less than a fifth of a second are left out of the fit. A
finished cell is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from finished_cells import Cells
from memory import make_model
from rich.console import Console
from transformers import LlamaConfig

from globalopt.machine.memory import size_text
from globalopt.reference import reference_folder
from globalopt.runs.cache import FOLDER
from globalopt.runs.folder import Run
from reports.formats import duration
from reports.table_style import add_numbers, report_table

NAMES = ("width", "depth", "windows")
"""Sizes of which costs are powers."""

LEAST = 0.2
"""Seconds below which a stage is left out of the fit."""

SEQLEN = 128
VOCABULARY = json.loads((reference_folder() / "config.json").read_text(encoding="utf-8"))["vocab_size"]

LLAMA_3_8B = (4096, 32, 128 * 2048)
"""Width, depth and calibration tokens for which costs are extrapolated."""

FOLDERS = ("layers", "matched", "model")
"""Folders of a finished run; the other stages lie below its work folder."""


@dataclass(frozen=True)
class Size:
    """Width, number of blocks and calibration windows of a synthetic Llama."""

    width: int
    depth: int
    windows: int

    @property
    def name(self) -> str:
        """How the cell is called."""
        return f"{self.width}x{self.depth}-{self.windows}"

    def config(self) -> LlamaConfig:
        """A Llama with grouped queries and the proportions of Llama 3."""
        return LlamaConfig(
            hidden_size=self.width,
            intermediate_size=7 * self.width // 2,
            num_hidden_layers=self.depth,
            num_attention_heads=max(1, self.width // 64),
            num_key_value_heads=max(1, self.width // 256),
            vocab_size=VOCABULARY,
            max_position_embeddings=2 * SEQLEN,
        )


@dataclass(frozen=True)
class Cost:
    """What one search took: seconds and peak bytes by stage, bytes on disk by folder, and the estimates before it."""

    seconds: dict[str, float]
    peak: dict[str, int]
    disk: dict[str, int]
    estimated_seconds: dict[str, float]
    estimated_peak: int
    estimated_disk: int
    weights: int


def measure(program: Sequence[str], model: Path, out: Path, windows: int, options: Sequence[str]) -> Cost:
    """Search `model` by the command `program` and read what it took from its folder."""
    command = [*program, "search", str(model), "--budget", "0.5", "--allow-low-coverage"]
    command += ["--calibration", str(reference_text()), "--nsamples", str(windows), "--seqlen", str(SEQLEN)]
    command += ["--eval-windows", "8", "--cache", str(out / FOLDER), *options]
    estimate = subprocess.run(
        [*command, "--out", str(out / "dry"), "--dry-run", "--json"], check=True, capture_output=True, text=True
    )
    expected = json.loads(estimate.stdout)
    subprocess.run([*command, "--out", str(out), "--quiet"], check=True, stdout=subprocess.DEVNULL)
    run = Run.open(out)
    summary = run.summary()
    # Those of the run first: what is in the cache too has the same files.
    folders = {name: out / name for name in FOLDERS} | {path.name: path for path in (out / FOLDER).iterdir()}
    seen: set[int] = set()
    return Cost(
        {cost.name: cost.seconds for cost in summary.stages},
        {cost.name: cost.peak_bytes for cost in summary.stages},
        {name: size for name, path in folders.items() if (size := bytes_below(path, seen))},
        expected["seconds"],
        expected["peak_bytes"],
        expected["disk_bytes"],
        summary.total,
    )


def reference_text() -> Path:
    """The bundled text."""
    return reference_folder().parent / "text" / "calibration.txt"


def bytes_below(folder: Path, seen: set[int]) -> int:
    """Sum the sizes of the files below a folder that were not `seen` under another name, and add them to `seen`."""
    files = {(found := path.stat()).st_ino: found.st_size for path in folder.rglob("*") if path.is_file()}
    size = sum(bytes for inode, bytes in files.items() if inode not in seen)
    seen |= files.keys()
    return size


def fit(sizes: Sequence[Size], values: Sequence[float]) -> tuple[float, ...] | None:
    """Fit `log value = c + a log width + b log depth + d log windows`; None where there are too few values.

    Returns:
        (c, a, b, d); the exponent of a size that does not vary is 0.
    """
    rows = [(size, value) for size, value in zip(sizes, values, strict=True) if value > 0]
    columns = [[math.log(getattr(size, name)) for size, _ in rows] for name in NAMES]
    varied = [i for i, name in enumerate(NAMES) if len({getattr(size, name) for size in sizes}) > 1]
    if len(rows) <= len(varied):
        return None
    matrix = np.array([[1.0] * len(rows), *(columns[i] for i in varied)]).T
    found = np.linalg.lstsq(matrix, np.log([value for _, value in rows]), rcond=None)[0]
    exponents = dict(zip(varied, found[1:].tolist(), strict=True))
    return (float(found[0]), *(exponents.get(i, 0.0) for i in range(3)))


def at(found: Sequence[float], width: int, depth: int, windows: float) -> float:
    """Extrapolate a fit to another size."""
    constant, *exponents = found
    sizes = zip(exponents, (width, depth, windows), strict=True)
    return math.exp(constant + sum(power * math.log(size) for power, size in sizes))


def show(console: Console, costs: Mapping[Size, Cost]) -> None:
    """Print seconds by stage and size, with exponents, memory and disk beside their estimates."""
    sizes = list(costs)
    stages = list(dict.fromkeys(name for cost in costs.values() for name in cost.seconds))
    width, depth, tokens = LLAMA_3_8B
    table = report_table("Seconds by stage")
    table.add_column("stage")
    add_numbers(table, [*(size.name for size in sizes), "width^", "depth^", "tokens^", "Llama-3-8B here"])
    for stage in stages:
        seconds = [costs[size].seconds.get(stage, 0.0) for size in sizes]
        found = fit(sizes, [value if value >= LEAST else 0.0 for value in seconds])
        tail = ["", "", "", ""]
        if found is not None:
            tail = [*(f"{power:.1f}" for power in found[1:]), duration(at(found, width, depth, tokens / SEQLEN))]
        table.add_row(stage, *(f"{value:.2f}" for value in seconds), *tail)
    console.print(table)
    table = report_table("Memory and disk, beside what the dry run said")
    table.add_column("size")
    names = ["weights", "peak", "estimated", "disk", "estimated", "disk / bf16", "seconds", "estimated"]
    add_numbers(table, names)
    for size, cost in costs.items():
        peak, disk = max(cost.peak.values()), sum(cost.disk.values())
        table.add_row(
            size.name,
            f"{cost.weights:,}",
            *(size_text(value) for value in (peak, cost.estimated_peak, disk, cost.estimated_disk)),
            f"{disk / 2 / cost.weights:.2f}",
            *(duration(sum(seconds.values())) for seconds in (cost.seconds, cost.estimated_seconds)),
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all sizes and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--windows", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--set", default="preset=fast", help="options of the solver")
    parser.add_argument("--allocator", default="knapsack")
    parser.add_argument("--match", default="block")
    parser.add_argument("--model", type=Path, help="a real model in place of random ones")
    parser.add_argument("--program", help="path of the globalopt of another version, to measure that one")
    options = parser.parse_args(arguments)
    words = ["--set", options.set, "--allocator", options.allocator, "--match", options.match]
    program = [options.program] if options.program else [sys.executable, "-m", "globalopt"]
    measured = {"options": words, "model": str(options.model)} | ({"program": program} if options.program else {})
    cells = Cells(options.out / "cells", measured)
    # One size is the middle of all; each of the others differs from it in one of width, depth and windows.
    middle = Size(options.widths[len(options.widths) // 2], options.depths[0], options.windows[0])
    sizes = {Size(width, middle.depth, middle.windows): None for width in options.widths}
    sizes |= {Size(middle.width, depth, middle.windows): None for depth in options.depths}
    sizes |= {Size(middle.width, middle.depth, windows): None for windows in options.windows}
    if options.model is not None:
        sizes = {Size(0, 0, windows): None for windows in options.windows}
    costs: dict[Size, Cost] = {}
    for size in sizes:
        folder = options.out / size.name
        model = options.model or folder / "model"

        def compute(size: Size = size, folder: Path = folder, model: Path = model) -> Cost:
            if options.model is None:
                make_model(model, size.config(), seed=0)
            return measure(program, model, folder / "run", size.windows, words)

        costs[size] = cells.get(Cost, size.name, {"size": size.name}, compute)
    console = Console(width=None if sys.stdout.isatty() else 160)
    show(console, costs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
