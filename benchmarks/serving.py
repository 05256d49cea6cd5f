"""What does an export cost to keep and to run? Bytes, memory and tokens per second of every format, beside dense.

    python benchmarks/serving.py RUN --out OUT [--dtype float32 bfloat16] [--prompt 256] [--tokens 32] [--rounds 7]

On the CPU, with the threads that OMP_NUM_THREADS gives. Bytes are those of the exported folder. Memory is of a process
of its own: what it holds more after a prompt and some tokens than before loading, and its peak. Speed is measured in a
process that holds all of them, in interleaved rounds, prefill (a prompt at once) and greedy decoding (token by token,
with the cache) apart; a ratio is the median over rounds of the ratio to dense in the same round, with the least and the
largest. Where that range holds 1 no difference was measured. The factors are for research and are only weighed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.console import Group as Stack
from transformers import AutoModelForCausalLM

from globalopt.errors import GlobalOptError
from globalopt.export.formats import FORMATS, export
from globalopt.export.packed import load_packed
from globalopt.export.quantizer import packed_layers
from globalopt.machine.clock import StageClock
from globalopt.models.quiet import quiet
from globalopt.runs.files import digest, write_json
from reports.table_style import add_numbers, footed, report_table

CONTENDERS = ("dense", "adapter", "packed auto", "packed split", "packed merged", "packed unpack")
WARM_TOKENS = 4


@dataclass(frozen=True)
class Size:
    """Bytes of a contender: on disk, held in memory after a first call, and the peak of its process."""

    disk: int
    held: int
    peak: int


@dataclass(frozen=True)
class Speed:
    """Tokens per second, one figure per round."""

    prefill: tuple[float, ...]
    decode: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """One contender in one type; `paths` counts how its layers compute."""

    name: str
    dtype: str
    size: Size
    speed: Speed
    paths: dict[str, int]


def load(name: str, folder: Path, dtype: str) -> Any:
    """A contender, ready to be called."""
    form, _, compute = name.partition(" ")
    with quiet():
        if form == "packed":
            return load_packed(folder / form, dtype, "cpu", compute)
        options: Any = {"dtype": getattr(torch, dtype)}
        if form == "adapter":
            from peft import PeftModel

            base = AutoModelForCausalLM.from_pretrained(folder / form / "base", **options)
            with warnings.catch_warnings(action="ignore"):
                return PeftModel.from_pretrained(base, str(folder / form / "adapter")).eval()
        return AutoModelForCausalLM.from_pretrained(folder / form, **options)


def run(model: Any, prompt: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Tokens per second of one prefill and of `tokens` decoded ones."""
    # The name of the cache's argument is changing.
    with torch.inference_mode(), quiet(), warnings.catch_warnings(action="ignore"):
        started = time.perf_counter()
        made = model(input_ids=prompt, use_cache=True)
        prefilled = time.perf_counter()
        for _ in range(tokens):
            chosen = made.logits[:, -1:].argmax(-1)
            made = model(input_ids=chosen, past_key_values=made.past_key_values, use_cache=True)
        ended = time.perf_counter()
    return prompt.numel() / (prefilled - started), tokens / (ended - prefilled)


def prompt_of(model: Any, length: int) -> torch.Tensor:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))


def weigh(name: str, folder: Path, dtype: str, length: int) -> tuple[int, int]:
    """Memory held after a first call, and the peak, both above what this process had before."""
    process, clock = psutil.Process(), StageClock()
    before = process.memory_info().rss
    with clock.stage("all"):
        model = load(name, folder, dtype)
        run(model, prompt_of(model, length), WARM_TOKENS)
    gc.collect()
    # What the allocator only keeps for later is not held.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return process.memory_info().rss - before, clock.costs[0].peak_bytes - before


def apart(*arguments: Any) -> tuple[int, int]:
    """`weigh` in a fresh process; memory that malloc was told to keep would count as held there."""
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        del os.environ[name]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(weigh, *arguments).result()


def measure(options: argparse.Namespace, dtype: str) -> list[Row]:
    """All contenders in one type."""
    folder: Path = options.out / "exports"
    sizes: dict[str, Size] = {}
    for name in options.contenders:
        disk = bytes_of(folder / name.partition(" ")[0])
        sizes[name] = Size(disk, *apart(name, folder, dtype, options.prompt))
        print(f"{dtype}  {name}: weighed", file=sys.stderr)
    models = {name: load(name, folder, dtype) for name in options.contenders}
    prompt = prompt_of(models["dense"], options.prompt)
    for model in models.values():
        run(model, prompt, WARM_TOKENS)
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for number in range(options.rounds):
        for name, model in models.items():
            speeds[name].append(run(model, prompt, options.tokens))
        print(f"{dtype}  round {number + 1} of {options.rounds}", file=sys.stderr)
    rows = []
    for name, model in models.items():
        paths: dict[str, int] = {}
        for _, layer in packed_layers(model):
            paths[str(layer.path)] = paths.get(str(layer.path), 0) + 1
        prefill, decode = zip(*speeds[name], strict=True)
        rows.append(Row(name, dtype, sizes[name], Speed(prefill, decode), paths))
    return rows


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def ratios(found: Sequence[float], dense: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and largest ratio to dense of the same round."""
    each = [a / b for a, b in zip(found, dense, strict=True)]
    return median(each), min(each), max(each)


def shown(found: Sequence[float], dense: Sequence[float]) -> str:
    middle, least, most = ratios(found, dense)
    return f"{middle:.2f} ({least:.2f}-{most:.2f})"


def _ratio(size: int, dense: int) -> str:
    """A size over that of dense; of a model so small that nothing was seen of it in the process, nothing is said."""
    return f"{size / dense:.2f}" if dense > 0 else "-"


def table(rows: Sequence[Row], factors: int) -> Stack:
    """One type: absolute figures of dense, ratios to it of the others."""
    dense = next(row for row in rows if row.name == "dense")
    grid = report_table(f"Serving on the CPU, {dense.dtype}, {torch.get_num_threads()} threads")
    grid.add_column("contender")
    add_numbers(grid, ("disk", "held", "peak", "prefill", "decode"))
    grid.add_row(
        "dense",
        *(f"{size / 1e6:.1f} MB" for size in (dense.size.disk, dense.size.held, dense.size.peak)),
        *(f"{median(each):,.0f} tok/s" for each in (dense.speed.prefill, dense.speed.decode)),
    )
    for row in rows:
        if row is not dense:
            grid.add_row(
                row.name,
                _ratio(row.size.disk, dense.size.disk),
                _ratio(row.size.held, dense.size.held),
                _ratio(row.size.peak, dense.size.peak),
                shown(row.speed.prefill, dense.speed.prefill),
                shown(row.speed.decode, dense.speed.decode),
            )
    chose = next((row.paths for row in rows if row.name == "packed auto"), {})
    notes = [
        "Below dense, ratios to it: of speed above 1 is faster; where the range holds 1 no difference was measured."
    ]
    if chose:
        notes.append(
            "auto chose " + ", ".join(f"{path} for {count}" for path, count in sorted(chose.items())) + " layers."
        )
    if factors:
        notes.append(f"factors on disk: {factors / dense.size.disk:.2f}.")
    return footed(grid, " ".join(notes))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    if "dense" not in options.contenders:
        options.contenders.insert(0, "dense")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    asked = {name: value for name, value in vars(options).items() if name not in ("out", "run", "dtype")}
    asked |= {"run": str(options.run), "threads": torch.get_num_threads()}
    try:
        needed = {name.partition(" ")[0] for name in options.contenders} | {"factors"}
        for name in FORMATS:
            if name in needed and not (options.out / "exports" / name).is_dir():
                export(options.run, name, options.out / "exports" / name)
        for dtype in options.dtype:
            path = options.out / f"{dtype}-{digest(asked)[:12]}.json"
            if not path.exists():
                write_json(path, {**asked, "rows": [asdict(row) for row in measure(options, dtype)]})
            rows = [read_row(record) for record in json.loads(path.read_text(encoding="utf-8"))["rows"]]
            Console().print(table(rows, bytes_of(options.out / "exports" / "factors")))
    except GlobalOptError as cause:
        print(f"error: {cause}", file=sys.stderr)
        return cause.exit_code
    return 0


def read_row(record: dict[str, Any]) -> Row:
    speed = Speed(**{name: tuple(values) for name, values in record.pop("speed").items()})
    return Row(**{**record, "size": Size(**record["size"]), "speed": speed})


if __name__ == "__main__":
    sys.exit(main())
