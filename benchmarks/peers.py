"""Prune or round a model by llm-compressor and by globalopt, side by side: what is lost, and what does it take?

    python benchmarks/peers.py MODEL --calibration TRAIN.txt --eval-text TEST.txt --out OUT [--install]
        [--rows NAME ...] [--repeats R] [--threads T]

All runs on the CPU. llm-compressor has an environment of its own, OUT/environments/llm-compressor; `--install` makes it
with pip where it is missing (torch pinned by constraints.txt). Both programs compute in float32, read the token ids of
the same calibration windows in the same order and batches, and save a model in the type of the dense one.

Every program is a process of its own that is measured from outside: CPU seconds (user and system), wall seconds and
peak resident memory, imports and loading included. The two programs of a row run one after the other, in the other
order in every other repeat. Neither evaluates what it saves: globalopt is run with `--no-evaluate`.

All saved models are evaluated here, on the first windows of the evaluation text: perplexity, and KL to the dense model,
whose logits are computed once and held. Differences are paired by window. Sizes are those of the compressed layers as
shares of 16 bits per weight, with scales, and the cheapest index of a sparse part. The models of later repeats are
compared with the first by their hash and deleted. Finished cells are not run again. The source of a program is not part
of their key: after changing one, choose another `--out`.

llm-compressor rounds to integers, in groups of 128 inputs or of the largest power of two that divides the width
(W4A16 and W8A16). globalopt has groups of 64 numbers and a grid without zero. Scales take 16 bits in both, so that
globalopt keeps up to an eighth of a bit more per weight. Their sizes stand beside each other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from environments import HERE, install, last_line, measure_python, python_of
from finished_cells import Cells
from peer_tables import Made, Quality, Result, Row, document

from globalopt.errors import ArtefactError, GlobalOptError, UsageError
from globalopt.evaluation.perplexity import evaluate_both
from globalopt.models.finding import find_layers
from globalopt.models.identity import model_sha256
from globalopt.models.layers import ModelLayers
from globalopt.models.loading import LoadedModel, load_model
from globalopt.pipeline.session import limits
from globalopt.runs.files import write_json, write_text
from globalopt.runs.folder import Run
from globalopt.text.reading import read_text
from globalopt.text.splits import Split, Splits, make_splits
from globalopt.values.budget import BYTES_PER_VALUE, Target
from globalopt.values.layer import NM
from globalopt.values.metrics import WindowLosses
from globalopt.values.storage import GROUP as STORED_GROUP
from globalopt.values.storage import SCALE_BYTES

PEER = "llm-compressor"
PACKAGES = ("torch", "llmcompressor")
UNEVALUATED = ("--no-evaluate",)
"""Said to globalopt in every row, and part of the key of its cells."""
GROUP = 128
"""Largest number of weights that share a scale in llm-compressor."""


def pruned(title: str, method: str, pattern: str = "unstructured") -> Row:
    """Make a row of both programs that keeps half of the weights."""
    structure = "0:0" if pattern == "unstructured" else pattern
    job = {"method": method, "sparsity": 0.5, "mask_structure": structure}
    return Row(title, job, ("compress", "--budget", "0.5", "--solver", method, "--pattern", pattern))


def rounded(title: str, method: str, bits: int) -> Row:
    """Make a row of both programs that keeps every weight in few bits, in bytes that pay for all of them."""
    budget = math.ceil(100 * (bits + 8 * SCALE_BYTES / STORED_GROUP) / 16) / 100
    stored = ("--accounting", "bytes", "--storage", str(bits), "--budget", f"{budget:g}")
    return Row(title, {"method": method, "bits": bits}, ("compress", "--solver", method, *stored))


ROWS = {
    "sparsegpt": pruned("SparseGPT, 50 %", "sparsegpt"),
    "sparsegpt-2:4": pruned("SparseGPT, 2:4", "sparsegpt", "2:4"),
    "wanda": pruned("Wanda, 50 %", "wanda"),
    "wanda-2:4": pruned("Wanda, 2:4", "wanda", "2:4"),
    "rtn-int8": rounded("round to nearest, 8 bits", "rtn", 8),
    "gptq-int8": rounded("GPTQ, 8 bits", "gptq", 8),
    "rtn-int4": rounded("round to nearest, 4 bits", "rtn", 4),
    "gptq-int4": rounded("GPTQ, 4 bits", "gptq", 4),
    "knapsack": Row("search, 50 %", None, ("search", "--budget", "0.5", "--allocator", "knapsack"), "sparsegpt"),
}
OPTIONAL = ("knapsack",)
"""Rows that run only where they are asked for: they take much longer."""


class Remembered(torch.nn.Module):
    """Stand in for the dense model: compute the logits of every batch once, and hold them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        self._compute = model.forward
        self._known: dict[bytes, torch.Tensor] = {}

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Return an output with the logits of token ids (windows, tokens)."""
        key = input_ids.numpy().tobytes()
        if key not in self._known:
            self._known[key] = self._compute(input_ids=input_ids, use_cache=use_cache).logits
        return SimpleNamespace(logits=self._known[key])


@dataclass(frozen=True, eq=False)
class Bench:
    """Hold the options, the dense model with its layers, and the windows."""

    options: argparse.Namespace
    loaded: LoadedModel
    layers: ModelLayers
    splits: Splits

    @classmethod
    def set_up(cls, options: argparse.Namespace) -> Bench:
        """Load the model, cut the texts, and write the calibration windows for llm-compressor."""
        torch.set_num_threads(options.threads)
        loaded = load_model(options.model, "float32", "cpu")
        texts = read_text(str(options.calibration)), read_text(str(options.eval_text))
        sizes = (options.nsamples, options.seqlen, options.seed, options.eval_windows)
        splits = make_splits(loaded.tokenizer, *texts, *sizes, **limits(loaded), bos="auto")
        options.out.mkdir(parents=True, exist_ok=True)
        bench = cls(options, loaded, find_layers(loaded.model), splits)
        np.save(bench.tokens, splits.calibration.windows.numpy())
        return bench

    @property
    def environments(self) -> Path:
        """Return the folder of llm-compressor's environment."""
        return self.options.out / "environments"

    @property
    def tokens(self) -> Path:
        """Return the file of the calibration windows."""
        return self.options.out / "calibration.npy"

    @cached_property
    def dense(self) -> Any:
        """Return the dense model that remembers its logits."""
        return Remembered(self.loaded.model)

    @cached_property
    def cells(self) -> Cells:
        """Return the finished cells on this model and these windows."""
        common = {
            "model": model_sha256(self.layers, self.loaded.tokenizer),
            "calibration": self.splits.calibration.sha256,
            "threads": self.options.threads,
            "batch_size": self.options.batch_size,
        }
        return Cells(self.options.out / "cells", common)

    def folder(self, name: str, program: str, repeat: int) -> Path:
        """Return the folder of a cell."""
        return self.options.out / "runs" / name.replace(":", "of") / f"{program}-{repeat}"

    def saved(self, name: str, program: str, repeat: int) -> Path:
        """Return the folder of the model that a cell saves."""
        folder = self.folder(name, program, repeat)
        return folder / "run" / "model" if program == HERE else folder / "model"


def group_sizes(layers: ModelLayers) -> dict[str, int]:
    """Choose how many weights of every layer share a scale: a divisor of its width, as llm-compressor asks for."""
    return {spec.name: math.gcd(spec.d_in, GROUP) for spec in layers.specs}


def words_of(row: Row, bench: Bench, folder: Path) -> list[object]:
    """Make the command line of globalopt for a row."""
    options, (command, *choices) = bench.options, row.ours
    return [
        *("-m", "globalopt", command, options.model, *choices, *UNEVALUATED, "--device", "cpu"),
        *("--calibration", options.calibration, "--eval-text", options.eval_text, "--seed", options.seed),
        *("--nsamples", options.nsamples, "--seqlen", options.seqlen, "--batch-size", options.batch_size),
        *("--no-cache", "--quiet", "--out", folder / "run"),
    ]


def job_of(row: Row, bench: Bench, saved: Path) -> dict[str, Any]:
    """Make the job of `peer_programs.py` for a row."""
    rounding = {"group_sizes": group_sizes(bench.layers)} if row.bits else {}
    return {
        **(row.peer or {}),
        **rounding,
        "model": str(bench.options.model),
        "dtype": str(bench.loaded.checkpoint_dtype).removeprefix("torch."),
        "out": str(saved),
        "tokens": str(bench.tokens),
        "batch_size": bench.options.batch_size,
        "layers": {spec.name: spec.d_in for spec in bench.layers.specs},
    }


def make(name: str, program: str, repeat: int, bench: Bench) -> Made:
    """Run one program from the beginning, and measure it."""
    row, folder, saved = ROWS[name], bench.folder(name, program, repeat), bench.saved(name, program, repeat)
    # What an interrupted run left is not gone on with: its costs would be those of the end alone.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if program == HERE:
        words = words_of(row, bench, folder)
    else:
        write_json(folder / "job.json", job_of(row, bench, saved))
        words = [Path(__file__).with_name("peer_programs.py"), folder / "job.json"]
    variables = {"OMP_NUM_THREADS": str(bench.options.threads), "CUDA_VISIBLE_DEVICES": ""}
    done, cost = measure_python(program, bench.environments, words, variables, folder / "cost.json")
    write_text(folder / "log.txt", f"{done.stdout}\n{done.stderr}")
    if done.returncode:
        said = last_line(done.stderr)
        raise UsageError(f"{name} by {program} ended with {done.returncode} ({said}); see {folder / 'log.txt'}.")
    versions = json.loads(last_line(done.stdout)) if program == PEER else checked(folder / "run", bench)
    hashed = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(saved.glob("*.safetensors")))).hexdigest()
    if repeat:
        shutil.rmtree(folder)
    return Made(cost, hashed, versions)


def checked(folder: Path, bench: Bench) -> dict[str, str]:
    """Return the versions of a run, if it read the windows that llm-compressor reads."""
    summary = Run.open(folder).summary()
    found, expected = summary.splits["calibration"]["sha256"], bench.splits.calibration.sha256
    if found != expected:
        raise ArtefactError(
            f"{folder} read the calibration windows {found[:12]}, and llm-compressor {expected[:12]}: they cannot be "
            "compared. Use the globalopt that runs this script for both."
        )
    return dict(summary.versions)


def judge(name: str, program: str, bench: Bench) -> Quality:
    """Evaluate the model that a program saved in the first repeat."""
    saved = bench.saved(name, program, 0)
    if not saved.is_dir():
        raise ArtefactError(f"There is no model {saved}, though its cell is finished. Delete {bench.cells.folder}.")
    loaded = load_model(saved, "float32", "cpu")
    losses: list[WindowLosses] = []
    dense, found = evaluate_both(loaded.model, bench.dense, bench.splits.test, keep=losses.append)
    kept, size = shares(name, program, loaded, bench)
    return Quality(kept, size, found.perplexity, dense.perplexity, losses[0].nll, losses[0].kl)


def shares(name: str, program: str, loaded: LoadedModel, bench: Bench) -> tuple[float, float]:
    """Compute the shares of the parameters and of the bytes of the compressed layers that a result has."""
    row, specs = ROWS[name], bench.layers.specs
    total = sum(spec.numel for spec in specs)
    if program == HERE:
        layers = Run.open(bench.folder(name, program, 0) / "run").summary().layers
        kept = sum(layer.rank * (layer.d_out + layer.d_in) + layer.nnz for layer in layers)
        return kept / total, sum(layer.bytes for layer in layers) / (total * BYTES_PER_VALUE)
    if row.bits:
        sizes = group_sizes(bench.layers)
        found = [spec.numel * row.bits / 8 + spec.numel / sizes[spec.name] * SCALE_BYTES for spec in specs]
        return 1.0, sum(found) / (total * BYTES_PER_VALUE)
    pattern = NM.parse(row.pattern)
    weights = find_layers(loaded.model)
    targets = [Target(0, int(weights.weight(spec.name).count_nonzero()), pattern) for spec in specs]
    size = sum(target.bytes(spec) for target, spec in zip(targets, specs, strict=True))
    return sum(target.nnz for target in targets) / total, size / (total * BYTES_PER_VALUE)


def results_of(name: str, bench: Bench) -> list[Result]:
    """Run and evaluate the cells of a row that are missing, and return its results."""
    row = ROWS[name]
    programs = [program for program, asked in ((PEER, row.peer), (HERE, row.ours)) if asked]
    made: dict[str, list[Made]] = {program: [] for program in programs}
    for repeat in range(bench.options.repeats):
        for program in programs if repeat % 2 == 0 else programs[::-1]:
            label = f"{name}.{program}.{repeat}"
            identity = {"peer": row.peer} if program == PEER else {"ours": [*row.ours, *UNEVALUATED]}
            found = bench.cells.get(Made, label, identity, lambda p=program, r=repeat: make(name, p, r, bench))
            print(f"{label}: {found.cost.cpu:.1f} CPU s", file=sys.stderr)
            made[program].append(found)
    results = []
    for program in programs:
        identity = {"test": bench.splits.test.sha256, "saved": made[program][0].sha256}
        quality = bench.cells.get(
            Quality, f"{name}.{program}.quality", identity, lambda p=program: judge(name, p, bench)
        )
        results.append(Result(name, program, tuple(made[program]), quality))
    return results


def settings(bench: Bench) -> dict[str, Any]:
    """Describe what was measured on."""
    calibration, test = bench.splits.calibration, bench.splits.test

    def windows(split: Split) -> str:
        """Describe the windows of a split."""
        return f"{len(split.windows)} windows of {split.seqlen} tokens of {Path(split.source).name}"

    return {
        "model": Path(bench.options.model).name,
        "layers": len(bench.layers.specs),
        "weights": sum(spec.numel for spec in bench.layers.specs),
        "calibration": windows(calibration),
        "calibration_sha256": calibration.sha256,
        "evaluation": windows(test),
        "evaluation_sha256": test.sha256,
        "threads": bench.options.threads,
        "batch_size": bench.options.batch_size,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the dense model")
    parser.add_argument("--calibration", type=Path, required=True, help="text of the calibration windows")
    parser.add_argument("--eval-text", type=Path, required=True, help="text of which the first windows are predicted")
    parser.add_argument("--out", type=Path, required=True)
    default = [name for name in ROWS if name not in OPTIONAL]
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=default, help="all but knapsack if left out")
    for name, value, what in (
        ("nsamples", 32, "calibration windows"),
        ("seqlen", 512, "tokens of a window"),
        ("eval-windows", 16, "windows that models are evaluated on"),
        ("batch-size", 8, "windows of a calibration batch, in both programs"),
        ("seed", 0, "of the calibration windows"),
        ("repeats", 1, "how often both programs of a row are run"),
        ("threads", 1, "OMP_NUM_THREADS of all programs"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{what} (%(default)s)")
    parser.add_argument("--install", action="store_true", help="make the environment where it is missing, with pip")
    options = parser.parse_args(arguments)
    for name in ("nsamples", "batch_size", "repeats", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; got {getattr(options, name)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows, and write `peers.json` and `peers.md`."""
    options = parse(arguments)
    failed = 0
    try:
        bench = Bench.set_up(options)
        peer = python_of(PEER, bench.environments)
        if not peer.is_file() and any(ROWS[name].peer for name in options.rows):
            if not options.install:
                raise UsageError(f"There is no {peer}, which runs {PEER}. Add --install, and it is made with pip.")
            install(PEER, bench.environments, PACKAGES)
        results: list[Result] = []
        for name in options.rows:
            try:
                results += results_of(name, bench)
            except GlobalOptError as cause:
                # The other rows take hours, and say something without this one.
                print(f"error: {cause}", file=sys.stderr)
                failed = cause.exit_code
                continue
            write_json(options.out / "peers.json", {**settings(bench), "results": [asdict(each) for each in results]})
            write_text(options.out / "peers.md", document(ROWS, settings(bench), results))
    except GlobalOptError as cause:
        print(f"error: {cause}", file=sys.stderr)
        return cause.exit_code
    if results:
        print((options.out / "peers.md").read_text(encoding="utf-8"), end="")
    return failed


if __name__ == "__main__":
    sys.exit(main())
