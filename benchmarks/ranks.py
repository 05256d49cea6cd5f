"""Do several processes find what one finds, how much faster, and what do 8 GPUs send each other?

    python benchmarks/ranks.py --out OUT [--processes 1 2 4] [--kills 3] [--seed 0] [--shape llama-3-8b] [OPTION ...]

Every further option goes to `globalopt search`; one thread per process, each number of processes with a cache of its
own, over gloo on this machine. Three tables:

* results: the layers whose targets differ from those of one process, and the KL on validation and test text; beside
  them one process with two threads, whose sums are rounded otherwise too;
* stages: wall seconds of the first process, CPU seconds of the busiest one (which are the wall seconds of a machine
  with a core for each), and the bytes that a process sent;
* 8 GPUs, computed: how evenly the layers of a shape are divided, and the bytes of every stage.

Then two processes are stopped: one of them, drawn by the seed, gets SIGKILL at a moment drawn by the seed, and the
command goes on with two processes or with one, again and again until it ends; its budget and its KL are compared too.
What is finished is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.markup import escape

from globalopt.machine import shares
from globalopt.machine.memory import size_text
from globalopt.values.layer import LayerSpec
from reports.formats import duration
from reports.table_style import add_numbers, report_table

WORKER = Path(__file__).parent / "rank_worker.py"
STARTING = 10.0
"""Seconds in which a process imports its packages."""

PATIENCE = 60.0
"""Seconds within which all processes must have ended after one was killed."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Llama: what its layers cost and what its Grams weigh.

    Args:
        width, intermediate, keys: of hidden states, of the MLP, and of keys and values.
        blocks: number of decoder blocks.
    """

    width: int
    intermediate: int
    keys: int
    blocks: int

    def layers(self) -> list[LayerSpec]:
        """List the layers of one block."""
        sizes = {
            "q_proj": ("q_proj", self.width, self.width),
            "k_proj": ("q_proj", self.keys, self.width),
            "v_proj": ("q_proj", self.keys, self.width),
            "o_proj": ("o_proj", self.width, self.width),
            "gate_proj": ("gate_proj", self.intermediate, self.width),
            "up_proj": ("gate_proj", self.intermediate, self.width),
            "down_proj": ("down_proj", self.width, self.intermediate),
        }
        return [LayerSpec(name, 0, site, name, d_out, d_in) for name, (site, d_out, d_in) in sizes.items()]

    def gram_bytes(self) -> int:
        """Bytes of the input Grams of all blocks, in float32."""
        sites = {spec.site: spec.d_in for spec in self.layers()}
        return 4 * self.blocks * sum(width**2 for width in sites.values())

    def output_gram_bytes(self) -> int:
        """Bytes of the output Grams of all layers and blocks, in float32."""
        return 4 * self.blocks * (sum(spec.d_out**2 for spec in self.layers()) + self.width**2)

    def step_bytes(self, kept: float) -> int:
        """Bytes of the gradients of one step of block matching, in float32, at a fraction kept of the weights."""
        return int(4 * kept * sum(spec.numel for spec in self.layers()))


SHAPES = {
    "llama-3-8b": ModelShape(4096, 14336, 1024, 32),
    "llama-3-70b": ModelShape(8192, 28672, 1024, 80),
    "reference": ModelShape(256, 704, 128, 8),
}


def start(processes: int, folder: Path, words: Sequence[str], threads: int = 1) -> list[subprocess.Popen[bytes]]:
    """Start so many processes on one search, with what they say in files."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    place["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, str(WORKER), str(folder / f"stages{processes}"), "search", *words, "-q"]
    command += ["--out", str(folder / "run"), "--cache", str(folder / "cache")]
    started = []
    for rank in range(processes):
        with (folder / f"said.{rank}").open("wb") as said:
            started.append(
                subprocess.Popen(
                    command, env={**os.environ, **place, "RANK": str(rank)}, stdout=said, stderr=subprocess.STDOUT
                )
            )
    return started


def finished(processes: int, folder: Path, words: Sequence[str], threads: int = 1) -> None:
    """Search to the end."""
    if (folder / "run" / "summary.json").exists():
        return
    codes = [process.wait() for process in start(processes, folder, words, threads)]
    if any(codes):
        raise SystemExit((folder / "said.0").read_text(errors="replace"))


def killed(folder: Path, words: Sequence[str], kills: int, seconds: float, draw: random.Random) -> list[dict[str, Any]]:
    """Kill one of two processes again and again, go on with two or one, and say how the others ended."""
    found = folder / "kills.json"
    if found.exists():
        return json.loads(found.read_text())
    ends = []
    for turn in range(kills):
        # Every turn goes on where the one before ended, so that all of them together see the whole of a search.
        moment, victim = STARTING + draw.uniform(0.2, 1.8) * seconds / kills, draw.randrange(2)
        processes = start(2, folder, words)
        time.sleep(moment)
        if processes[victim].poll() is not None:
            break
        processes[victim].send_signal(signal.SIGKILL)
        killed_at = time.monotonic()
        other = processes[1 - victim]
        try:
            code = other.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            # As the launcher does: the other one is at work, and finds out when it next talks.
            other.send_signal(signal.SIGTERM)
            code = other.wait(timeout=PATIENCE)
        said = (folder / f"said.{1 - victim}").read_text(errors="replace").strip().splitlines()
        ends.append(
            {
                "moment": moment,
                "victim": victim,
                "code": code,
                "seconds": time.monotonic() - killed_at,
                "last": said[-1] if said else "",
                "errors": sum(line.startswith("error:") for line in said),
            }
        )
        if turn % 2:
            # With one process fewer, for a while.
            (alone,) = start(1, folder, words)
            try:
                alone.wait(timeout=STARTING)
            except subprocess.TimeoutExpired:
                alone.kill()
                alone.wait()
    finished(1 if kills % 2 else 2, folder, words)
    found.write_text(json.dumps(ends, indent=1))
    return ends


def read(path: Path) -> Any:
    """Read JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Kept:
    """What a layer keeps: parameters, and those of them in factors, as fractions of its weights."""

    params: float
    rank: float

    @classmethod
    def of(cls, layer: dict[str, Any]) -> Kept:
        """Read it from a line of a budget file."""
        numel = layer["d_out"] * layer["d_in"]
        rank = layer["rank"] * (layer["d_out"] + layer["d_in"])
        return cls((rank + layer["nnz"]) / numel, rank / numel)


def targets(folder: Path) -> dict[str, Kept]:
    """Read what every layer of a run's budget keeps."""
    return {layer["name"]: Kept.of(layer) for layer in read(folder / "run" / "budget.json")["layers"]}


def results(folders: dict[str, Path], first: str) -> None:
    """Print how far every run's budget and loss are from those of the first."""
    table = report_table("Results")
    heads = ("layers that differ", "mean change of kept", "largest", "of it rank")
    for name in ("run", *heads, "KL validation", "KL test", "of one process"):
        table.add_column(name, justify="left" if name == "run" else "right")
    reference = targets(folders[first])
    least = read(folders[first] / "run" / "summary.json")["compressed"][1]["kl"]
    for name, folder in folders.items():
        own, summary = targets(folder), read(folder / "run" / "summary.json")
        differ = [layer for layer in reference if own[layer] != reference[layer]]
        changes = [abs(own[one].params - reference[one].params) for one in own]
        ranks = max(abs(own[one].rank - reference[one].rank) for one in own)
        kl = [f"{one['kl']:.6f} ±{one['kl_stderr']:.6f}" for one in summary["compressed"]]
        table.add_row(
            name,
            f"{len(differ)} of {len(own)}",
            f"{fmean(changes):.2g}",
            f"{max(changes):.2g}",
            f"{ranks:.2g}",
            *kl,
            f"{summary['compressed'][1]['kl'] / least:.4f}",
        )
    Console().print(table)


def stage_rows(folder: Path, processes: int) -> dict[str, dict[str, float]]:
    """Return by stage: wall seconds of the first process, CPU seconds of the busiest one, and bytes sent."""
    every = [read(folder / f"stages{processes}" / f"{rank}.json") for rank in range(processes)]
    return {
        name: {
            "wall": first["wall"],
            "cpu": max(one[name]["cpu"] for one in every if name in one),
            "bytes": sum(first[kind] for kind in ("summed", "gathered", "told")),
        }
        for name, first in every[0].items()
    }


def stages(folders: dict[int, Path]) -> None:
    """Print what every stage took, by the number of processes."""
    rows = {processes: stage_rows(folder, processes) for processes, folder in folders.items()}
    table = report_table("Stages: wall seconds of the first process, CPU seconds of the busiest, bytes sent")
    table.add_column("stage")
    for processes in rows:
        add_numbers(table, (f"wall {processes}", f"CPU {processes}", f"sent {processes}"))
    names = list(next(iter(rows.values())))
    for name in (*names, "all"):
        cells = []
        for found in rows.values():
            some = [found[name]] if name in found else list(found.values()) if name == "all" else []
            cells += [f"{sum(one['wall'] for one in some):.1f}", f"{sum(one['cpu'] for one in some):.1f}"]
            cells.append(size_text(sum(one["bytes"] for one in some)))
        table.add_row(name, *cells)
    Console().print(table)


def gpus(shape: ModelShape, name: str, kept: float, steps: int, bandwidth: float) -> None:
    """Print, computed and not measured, what 8 processes would send, and how evenly layers are divided."""
    table = report_table(f"Computed for {name}, {kept:g} kept, {steps} steps of matching per block")
    table.add_column("stage")
    counts = (2, 4, 8)
    for count in counts:
        add_numbers(table, (f"sent by {count}", f"at {size_text(bandwidth)}/s"))
    step = shape.step_bytes(kept)
    summed = {
        "labels": shape.gram_bytes() + shape.output_gram_bytes(),
        "refine: Grams": shape.gram_bytes(),
        "refine: matching": shape.blocks * steps * step,
    }
    for stage, size in summed.items():
        cells = []
        for count in counts:
            sent = 2 * size * (count - 1) / count
            cells += [size_text(sent), duration(sent / bandwidth)]
        table.add_row(stage, *cells)
    Console().print(table)
    block = [spec.solve_cost() for spec in shape.layers()]
    whole = block * shape.blocks
    table = report_table("Times faster that layers are solved, by how evenly they are divided")
    table.add_column("stage")
    add_numbers(table, [f"{count} processes" for count in counts])
    for stage, costs in {"span, anchors, predict: all layers": whole, "refine: a block at a time": block}.items():
        cells = []
        for count in counts:
            owners = shares.bins(costs, count)
            loads = [
                sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == one) for one in range(count)
            ]
            cells.append(f"{sum(costs) / max(loads):.2f}")
        table.add_row(stage, *cells)
    Console().print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--threads", type=int, default=2, help="of one more run by one process; 1: none (%(default)s)")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--kept", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=4 * 56, help="steps of block matching per block")
    parser.add_argument("--bandwidth", type=float, default=2.0**33, help="bytes per second between two processes")
    options, words = parser.parse_known_args()
    folders = {count: options.out / f"{count}" for count in options.processes}
    for count, folder in folders.items():
        finished(count, folder, words)
    named = {f"{count} processes" if count > 1 else "1 process": folder for count, folder in folders.items()}
    if options.threads > 1:
        named[f"1 process, {options.threads} threads"] = folder = options.out / f"1x{options.threads}"
        finished(1, folder, words, options.threads)
    if options.kills:
        folder = options.out / "killed"
        several = min(count for count in folders if count > 1)
        seconds = sum(row["wall"] for row in stage_rows(folders[several], several).values())
        ends = killed(folder, words, options.kills, seconds, random.Random(options.seed))
        table = report_table("Two processes, one of them killed")
        table.add_column("killed")
        add_numbers(table, ("after seconds", "the other ended after", "its code", "errors"))
        table.add_column("its last line", overflow="fold")
        for end in ends:
            cells = (f"{end['moment']:.0f}", f"{end['seconds']:.1f}", str(end["code"]), str(end["errors"]))
            table.add_row(f"process {end['victim']}", *cells, escape(end["last"]))
        Console().print(table)
        named["killed, gone on with"] = folder
    results(named, next(iter(named)))
    stages(folders)
    gpus(SHAPES[options.shape], options.shape, options.kept, options.steps, options.bandwidth)


if __name__ == "__main__":
    main()
