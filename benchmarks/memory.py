"""How much memory and time does it take to compress a model that is never whole in memory?

    python benchmarks/memory.py --out OUT [--max-memory 4GiB] [--solver wanda] [--nsamples 8] [--seqlen 256] ...

Makes a Llama of random weights (by default 1.1 billion in bfloat16: hidden size 2048, 16 blocks, grouped queries) shard
by shard, gives every layer the same budget, and compresses the folder by the real command in a process of its own. Its
memory is sampled: resident, which counts pages of mapped files too, and anonymous, which is what must be there. Beside
it stands the bound

    the model's files + 3 blocks of them + hidden states in front of the blocks

What is there already is not made again; what a run that was gone on with measures is only its end (--fresh).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import LlamaConfig, PreTrainedModel

from globalopt.budgets import budget_file
from globalopt.machine.memory import size_text
from globalopt.models.checkpoint import INDEX
from globalopt.models.finding import find_layers
from globalopt.models.identity import model_fingerprint
from globalopt.models.layers import ModelLayers
from globalopt.models.structure import load_structure
from globalopt.reference import reference_folder
from globalopt.runs.files import replacing, write_json
from globalopt.values.budget import Budget, Target
from globalopt.values.error_unit import ErrorUnit
from globalopt.values.layer import LayerSpec
from globalopt.values.problem import Problem
from globalopt.values.surface import ErrorSurface
from reports.table_style import add_numbers, report_table

INTERVAL = 0.1  # seconds between samples
STORED = torch.bfloat16
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def make_model(folder: Path, config: LlamaConfig, seed: int) -> None:
    """Write random weights of the shapes of `config`, a file for what lies outside the blocks and one per block."""
    if (folder / INDEX).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(reference_folder() / name, folder)
    shapes = {name: tensor.shape for name, tensor in load_structure(folder)[0].state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    blocks = config.num_hidden_layers
    groups: list[list[str]] = [[] for _ in range(blocks + 1)]
    for name in shapes:
        inside = name.startswith("model.layers.")
        groups[1 + int(name.split(".")[2]) if inside else 0].append(name)
    files = {}
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05}-of-{blocks + 1:05}.safetensors"
        tensors = {name: _random(shapes[name], generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files.update(dict.fromkeys(names, file))
    # Last, so that a folder with an index is whole.
    with replacing(folder / INDEX) as path:
        path.write_text(json.dumps({"metadata": {}, "weight_map": files}), encoding="utf-8")


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Norms of one; columns of rising scale elsewhere, so that inputs are not all alike."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=STORED)
    return (torch.randn(shape, generator=generator) * torch.linspace(0.01, 0.03, shape[1])).to(STORED)


def write_budget(path: Path, model: PreTrainedModel, kept: float, rank_share: float) -> ModelLayers:
    """A budget file that keeps the same fraction of every layer, `rank_share` of it as rank."""
    layers = find_layers(model)
    targets = {spec.name: _target(spec, kept, rank_share) for spec in layers.specs}
    surfaces = tuple(ErrorSurface(spec, (targets[spec.name],), (0.0,)) for spec in layers.specs)
    problem = Problem(surfaces, Budget.fraction(kept, layers.specs))
    allocation = problem.finish(targets, "uniform")
    coverage = layers.coverage
    file = budget_file.make(
        allocation,
        problem,
        model_fingerprint(layers),
        coverage.covered,
        coverage.block_params,
        kept,
        ErrorUnit.NOT_PREDICTED,
    )
    budget_file.write(path, file)
    return layers


def _target(spec: LayerSpec, kept: float, rank_share: float) -> Target:
    rank = int(rank_share * kept * spec.numel / (spec.d_out + spec.d_in))
    return Target(rank, int(kept * spec.numel) - rank * (spec.d_out + spec.d_in))


@dataclass(frozen=True)
class Peak:
    """Of one process: seconds, and the most bytes seen; `anonymous` is None where the system does not tell."""

    seconds: float
    resident: int
    anonymous: int | None


def watch(command: list[str]) -> Peak:
    """Run `command` to its end and sample its memory; raise if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command)
    watched = psutil.Process(process.pid)
    resident, anonymous = 0, None
    while process.poll() is None:
        try:
            resident = max(resident, watched.memory_info().rss)
            anonymous = _most(anonymous, _anonymous(process.pid))
        except (psutil.NoSuchProcess, OSError):
            pass
        time.sleep(INTERVAL)
    if process.returncode:
        raise SystemExit(f"The command ended with {process.returncode}.")
    return Peak(time.perf_counter() - started, resident, anonymous)


def _anonymous(pid: int) -> int | None:
    rollup = Path(f"/proc/{pid}/smaps_rollup")
    if not rollup.exists():
        return None
    for line in rollup.read_text(encoding="ascii").splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    return None


def _most(one: int | None, other: int | None) -> int | None:
    return max((size for size in (one, other) if size is not None), default=None)


def bound(layers: ModelLayers, folder: Path, tokens: int, rows: int) -> dict[str, int]:
    """Parts of the bound in bytes: files, three blocks in the stored type, `rows` rows of float32 hidden states."""
    block = max(sum(p.numel() for p in block.parameters()) for block in layers.blocks)
    return {
        "model files": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "three blocks": 3 * block * STORED.itemsize,
        "hidden states": rows * tokens * layers.model.config.hidden_size * torch.float32.itemsize,
    }


def main() -> None:
    options = _options()
    console = Console()
    folder, run = options.out / "model", options.out / f"run-{options.solver}"
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.blocks,
        num_attention_heads=options.heads,
        num_key_value_heads=options.key_value_heads,
        max_position_embeddings=2048,
        dtype=STORED,
    )
    make_model(folder, config, options.seed)
    structure, _ = load_structure(folder)
    layers = write_budget(options.out / "budget.json", structure, options.kept, options.rank_share)
    command = [
        *(sys.executable, "-m", "globalopt", "compress", str(folder)),
        *("--budget-file", str(options.out / "budget.json"), "--solver", options.solver, "--out", str(run)),
        *("--calibration", "reference", "--nsamples", str(options.nsamples), "--seqlen", str(options.seqlen)),
        *("--eval-windows", str(options.eval_windows), "--batch-size", str(options.batch_size)),
        *(
            "--sensitivity",
            options.sensitivity,
            "--match",
            options.match,
            "--max-memory",
            options.max_memory,
            "--device",
            "cpu",
            # Otherwise artefacts of an earlier run would be used again, also with --fresh.
            "--no-cache",
            "--quiet",
        ),
        *(("--set", options.set) if options.set else ()),
        *(("--fresh",) if options.fresh else ()),
    ]
    imports = watch([sys.executable, "-c", "import globalopt.pipeline.search"])
    peak = watch(command)
    # Without a backward sweep only the states before and behind one block are there at a time.
    rows = 2 if options.sensitivity == "none" else options.blocks + 1
    parts = bound(layers, folder, options.nsamples * options.seqlen, rows)
    parameters = sum(p.numel() for p in structure.parameters())
    record = {
        "command": ["globalopt", *command[3:]],
        "parameters": parameters,
        "bound": {**parts, "all": sum(parts.values())},
        "imports": imports.resident,
        "resident": peak.resident,
        "anonymous": peak.anonymous,
        "seconds": peak.seconds,
        "stages": json.loads((run / "summary.json").read_text())["stages"],
    }
    write_json(options.out / f"memory-{options.solver}.json", record)
    table = report_table(f"{parameters:,} parameters, {options.solver}, {peak.seconds:.0f} s")
    table.add_column("")
    add_numbers(table, ("bytes", ""))
    for name, size in parts.items():
        table.add_row(name, f"{size:,}", size_text(size))
    table.add_section()
    table.add_row("bound", f"{sum(parts.values()):,}", size_text(sum(parts.values())))
    table.add_row("peak, resident", f"{peak.resident:,}", size_text(peak.resident))
    if peak.anonymous is not None:
        table.add_row("peak, anonymous", f"{peak.anonymous:,}", size_text(peak.anonymous))
    table.add_row("of which imports", f"{imports.resident:,}", size_text(imports.resident))
    console.print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-memory", default="4GiB")
    parser.add_argument("--solver", default="wanda")
    parser.add_argument("--set", default="")
    parser.add_argument("--sensitivity", default="none", choices=("none", "fisher"))
    parser.add_argument("--match", default="none", choices=("none", "block"))
    parser.add_argument("--kept", type=float, default=0.5)
    parser.add_argument("--rank-share", type=float, default=0.0)
    for name, default in (
        ("hidden", 2048),
        ("intermediate", 8192),
        ("blocks", 16),
        ("heads", 32),
        ("key-value-heads", 8),
        ("vocabulary", 32000),
        ("nsamples", 8),
        ("seqlen", 256),
        ("eval-windows", 2),
        ("batch-size", 8),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--fresh", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
