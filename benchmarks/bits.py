"""How few bytes can a model be kept in: by rounding alone, by pruning alone, or by a search over both?

    python benchmarks/bits.py --out runs/bits
    python benchmarks/bits.py --out runs/bits --seeds 0 1 2 --kept 0.5 0.27 --rows gptq knapsack joint
    python benchmarks/bits.py --out OUT --model MODEL --calibration TRAIN.txt --eval-text TEST.txt

Every cell is `globalopt search` or `globalopt compress` to a fraction of the bytes in 16 bits, with the evaluation that
the command makes. `rtn` and `gptq` keep every weight in as many bits as the fraction pays for; where it
does not pay for three they have no cell. `half-B` keeps half of the parameters in B bits, at the bytes that this takes.
All cells share one cache. A finished cell is read back, an interrupted one goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import cells
from finished_cells import Cells
from real_models import Text, run

from globalopt.runs.cache import FOLDER
from globalopt.runs.files import write_json
from globalopt.runs.folder import Run
from globalopt.values.results import Summary
from globalopt.values.storage import BITS, GROUP, SCALE_BYTES
from reports import formats
from reports.bytes_figure import BytesPoint, draw_bytes

WHOLE = ("rtn", "gptq")
"""Rows that keep every weight, in the bits that the fraction pays for."""

HALVES: Mapping[str, str] = {f"half-{bits}": f"search --allocator uniform --storage {bits}" for bits in (8, 6, 4)}
"""Rows that keep half of the parameters, at no other fraction."""

SEARCHES: Mapping[str, str] = {
    "knapsack": "search --allocator knapsack --storage 16",
    "bits": "search --allocator knapsack --solver gptq --storage auto",
    "joint": "search --allocator knapsack --storage auto",
}
"""Words of `globalopt` for rows that use the whole fraction: in 16 bits, with every weight kept, and of all options."""

ROWS = (*WHOLE, *HALVES, *SEARCHES)
NAMES: Mapping[str, str] = {
    "knapsack": "sparse + low rank, 16 bits",
    "bits": "bits alone",
    "joint": "sparse + low rank + bits",
} | {name: f"half kept, {name.removeprefix('half-')} bits" for name in HALVES}


@dataclass(frozen=True)
class Cell:
    """What one row gave.

    Args:
        bytes: of the compressed layers.
        kept: the same as a fraction of the layers in 16 bits.
        seconds: of the stages that were its own.
        texts: by name of the split.
    """

    bytes: int
    kept: float
    seconds: float
    texts: dict[str, Text]

    @classmethod
    def of(cls, summary: Summary) -> Cell:
        """Read a cell from the summary of a run."""
        texts = {}
        for each, dense in zip(summary.compressed, summary.dense, strict=True):
            assert each.kl is not None, "a compressed model has a loss"
            assert each.kl_stderr is not None
            texts[each.split] = Text(each.kl, each.kl_stderr, each.perplexity, dense.perplexity)
        size = sum(layer.bytes for layer in summary.layers)
        whole = sum(2 * layer.d_out * layer.d_in for layer in summary.layers)
        return cls(size, size / whole, sum(stage.seconds for stage in summary.stages), texts)


def affordable_bits(kept: float) -> int | None:
    """The most bits in which every weight fits into a fraction of 16; None where three do not."""
    return max((bits for bits in BITS if kept >= 1 or (bits < 16 and bits_share(bits) <= kept)), default=None)


def bits_share(bits: int) -> float:
    """Bytes of a number in `bits`, with its part of a scale, as a fraction of two bytes."""
    return (bits / 8 + SCALE_BYTES / GROUP) / 2


def row_words(row: str, kept: float) -> list[str]:
    """The command, method and budget of a row."""
    if row in WHOLE:
        return f"compress --solver {row} --accounting bytes --storage {affordable_bits(kept)} --budget {kept}".split()
    if row in HALVES:
        return [*HALVES[row].split(), "--accounting", "params", "--budget", "0.5"]
    return [*SEARCHES[row].split(), "--accounting", "bytes", "--budget", str(kept)]


def chosen(options: argparse.Namespace) -> Iterator[tuple[float, str, str, int]]:
    """Fraction, row, matching and seed of every cell; the fraction of a row that keeps half is 0.5."""
    for match in options.match:
        for row in options.rows:
            for kept in [0.5] if row in HALVES else options.kept:
                if row not in (*WHOLE, "bits") or affordable_bits(kept) is not None:
                    for seed in options.seeds:
                        yield kept, row, match, seed


def measure(options: argparse.Namespace, name: str, words: Sequence[str], match: str, seed: int) -> Cell:
    """Compress and evaluate one cell."""
    place, folder = options.out / "runs" / name, options.out / "logs" / name
    method, *others = words
    command = [sys.executable, "-m", "globalopt"]
    texts = ["--calibration", options.calibration] if options.calibration else []
    texts += ["--eval-text", options.eval_text] if options.eval_text else []
    sizes = ["--nsamples", str(options.nsamples), "--seqlen", str(options.seqlen)]
    sizes += ["--eval-windows", str(options.eval_windows), "--samples", "0"]
    given = [*others, *texts, *sizes, "--match", match, "--seed", str(seed)]
    given += shlex.split(options.extra) if method == "search" else []
    if options.model:
        given.insert(0, options.model)
    run([*command, method, *given, "--out", str(place), "--cache", str(options.out / FOLDER), "--quiet"], folder)
    return Cell.of(Run.open(place).summary())


def work(options: argparse.Namespace, command: str) -> None:
    """Measure the cells asked for, write their table, and draw them."""
    identity = ("model", "calibration", "eval_text", "nsamples", "seqlen", "eval_windows", "extra")
    done = Cells(options.out / "cells", {name: str(getattr(options, name)) for name in identity})
    found: dict[tuple[str, str, float], list[Cell]] = {}
    asked = list(chosen(options))
    for count, (kept, row, match, seed) in enumerate(asked, 1):
        name, words = f"{kept:g}-{row}-{match}-seed{seed}", row_words(row, kept)

        def compute(name: str = name, words: Sequence[str] = words, match: str = match, seed: int = seed) -> Cell:
            return measure(options, name, words, match, seed)

        cell = done.get(Cell, name, {"words": words}, compute)
        found.setdefault((row, match, kept), []).append(cell)
        line = f"{count}/{len(asked)}  {name}  KL {cell.texts['test'].kl:.3g}  {formats.duration(cell.seconds)}"
        cells.err.print(line, markup=False, highlight=False, soft_wrap=True)
    records = {
        f"{kept:g} {row} {match}": [asdict(cell) for cell in every] for (row, match, kept), every in found.items()
    }
    write_json(options.out / "bits.json", {"command": command, "cells": records})
    table = _table(found)
    (options.out / "bits.md").write_text(table)
    points = [_point(row, match, every) for (row, match, _), every in found.items()]
    if points:
        draw_bytes(points, options.out / "bits.png")
    print(table)


def _table(found: Mapping[tuple[str, str, float], Sequence[Cell]]) -> str:
    """The Markdown table: means over seeds, least bytes last."""
    heads = ["kept", "method", "matching", "bytes", "of 16 bits", "perplexity (dense)", "KL"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for (row, match, kept), every in sorted(found.items(), key=lambda item: -fmean(cell.kept for cell in item[1])):
        text = [cell.texts["test"] for cell in every]
        kl, error = fmean(one.kl for one in text), fmean(one.stderr for one in text)
        words = [f"{kept:g}", row, match, f"{fmean(cell.bytes for cell in every):.0f}"]
        words += [f"{fmean(cell.kept for cell in every):.3f}"]
        words += [f"{fmean(one.perplexity for one in text):.2f} ({fmean(one.dense for one in text):.2f})"]
        lines.append(_line([*words, f"{kl:.4g} ± {error:.2g}"]))
    return "\n".join(lines) + "\n"


def _line(words: Sequence[str]) -> str:
    return f"| {' | '.join(words)} |"


def _point(row: str, match: str, every: Sequence[Cell]) -> BytesPoint:
    """Mean of a cell over its seeds, to be drawn."""
    name = NAMES.get(row, row) + ("" if match == "none" else f", {match} matching")
    text = [cell.texts["test"] for cell in every]
    kl, error = fmean(one.kl for one in text), fmean(one.stderr for one in text)
    return BytesPoint(name, kept=fmean(cell.kept for cell in every), kl=kl, stderr=error)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cells.option_parser(__doc__)
    parser.add_argument("--eval-text", help="text of the test split")
    parser.add_argument("--kept", nargs="+", type=float, default=[0.5, 0.4, 0.33, 0.27, 0.2, 0.15])
    cells.add_rows(parser, ROWS, ["none", "block"])
    return cells.run_script(work, parser, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
