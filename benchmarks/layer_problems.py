"""Layers to compress alone, the settings they are compressed at, and what the public code reached there."""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from from_tests import layer
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from globalopt.errors import ArtefactError, UsageError
from globalopt.runs.files import read_json, read_tensors
from globalopt.values.budget import Target
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.metric import Gram, Metric

RANK_SHARE = 0.3  # of the parameters kept, in the unstructured settings
LAYER_FILE = "layer_problems.safetensors"
PUBLIC_FILE = "public_code.json"


def unstructured(spec: LayerSpec, kept: float) -> Target:
    """`kept` of the weights' number: `RANK_SHARE` of it as rank, rounded down, and the rest of it as nonzeros."""
    rank = math.floor(RANK_SHARE * kept * spec.numel / (spec.d_out + spec.d_in) + 1e-9)
    return Target(rank, round((1 - RANK_SHARE) * kept * spec.numel))


def patterned(spec: LayerSpec, pattern: NM, rank_share: float) -> Target:
    """`pattern`, and `rank_share` of the largest rank on top of it."""
    return Target(math.floor(rank_share * spec.max_rank), pattern.nnz(spec), pattern)


SETTINGS: dict[str, Callable[[LayerSpec], Target]] = {
    "u50r": partial(unstructured, kept=0.5),
    "u60r": partial(unstructured, kept=0.4),
    "24r": partial(patterned, pattern=NM(2, 4), rank_share=0.06),
}


@dataclass(frozen=True)
class PublicResult:
    """What a public method reached: `tr(E G Eᵀ) / tr(W G Wᵀ)`, and its time in units of one `W @ G` product."""

    rel_error: float
    gemms: float


@dataclass(frozen=True, eq=False)
class Problem:
    """One weight and the metric of its inputs; `public` holds results by setting, then by public method."""

    spec: LayerSpec
    weight: Tensor
    metric: Metric
    public: Mapping[str, Mapping[str, PublicResult]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def G(self) -> Tensor:
        """(d_in, d_in) undamped."""
        return self.metric.inputs.matrix

    @cached_property
    def sha256(self) -> str:
        """Of the weight and the Gram."""
        both = hashlib.sha256(self.weight.cpu().numpy().tobytes())
        both.update(self.G.cpu().numpy().tobytes())
        return both.hexdigest()

    @cached_property
    def energy(self) -> float:
        """`tr(W G Wᵀ)`, undamped, in float64."""
        return self._square(self.weight.double())

    def relative_error(self, value: Tensor) -> float:
        """`tr(E G Eᵀ) / tr(W G Wᵀ)`, `E = W - value` (d_out, d_in), undamped, in float64."""
        return max(0.0, self._square(self.weight.double() - value.double())) / self.energy

    def _square(self, E: Tensor) -> float:
        return float(((E @ self.G.double()) * E).sum())

    def gemm_seconds(self) -> float:
        """Median seconds of one float32 `W @ G`, after a first one that is not counted."""
        spent, times = 0.0, []
        torch.matmul(self.weight, self.G)
        while len(times) < 5 or (spent < 0.2 and len(times) < 200):
            with Stopwatch(self.weight.device) as watch:
                torch.matmul(self.weight, self.G)
            times.append(watch.seconds)
            spent += watch.seconds
        return statistics.median(times)


class Stopwatch:
    """Wall time of a block in `seconds`, waiting for an accelerator at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self._begin = device, 0.0, 0.0

    def __enter__(self) -> Stopwatch:
        self._wait()
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self._begin

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def read_problems(folder: Path, device: torch.device) -> list[Problem]:
    """Every problem of `folder`, in the order of their names, with the public results where the file is there.

    Raises:
        ArtefactError: a file is missing, broken, or made from other layers or settings.
    """
    tensors, _ = read_tensors(folder / LAYER_FILE)
    names = sorted({name.rpartition("/")[0] for name in tensors})
    if not names or set(tensors) != {f"{name}/{part}" for name in names for part in "WG"}:
        raise ArtefactError(f"{folder / LAYER_FILE} must hold NAME/W and NAME/G for every problem, and at least one.")
    problems = [_problem(name, tensors[f"{name}/W"], Gram(tensors[f"{name}/G"], 1), device) for name in names]
    path = folder / PUBLIC_FILE
    if not path.exists():
        return problems
    records = read_json(path)
    if not isinstance(records, dict):
        raise ArtefactError(f"{path} must hold one record for every NAME/SETTING.")
    return [replace(problem, public=_public(path, records, problem)) for problem in problems]


def _problem(name: str, W: Tensor, gram: Gram, device: torch.device) -> Problem:
    if W.ndim != 2 or W.shape[1] != len(gram.matrix):
        raise ArtefactError(
            f"Problem {name}: a weight of shape {tuple(W.shape)} does not fit {len(gram.matrix)} inputs."
        )
    spec = LayerSpec(name=name, block=0, site="", kind="", d_out=W.shape[0], d_in=W.shape[1])
    problem = Problem(spec, W.float().to(device), Metric(Gram(gram.matrix.float(), gram.tokens).to(device)))
    if not 0 < problem.energy < math.inf:
        raise ArtefactError(f"Problem {name} has tr(W G Wᵀ) = {problem.energy:g}; it must be finite and above 0.")
    return problem


def _public(path: Path, records: Mapping[str, object], problem: Problem) -> dict[str, dict[str, PublicResult]]:
    """The results on one problem; they must be of our targets, or a ratio to them would mean nothing."""
    found = {}
    for setting, target_of in SETTINGS.items():
        key = f"{problem.name}/{setting}"
        if key not in records:
            continue
        try:
            record = TypeAdapter(dict[str, float | list[int] | dict[str, float]]).validate_python(records[key])
            methods = {name: part for name, part in record.items() if isinstance(part, dict)}
            results = {name: PublicResult(part["rel_error"], part["gemms"]) for name, part in methods.items()}
            rank, nm, energy = record["rank"], record["nm"], float(str(record["energy"]))
            nnz = round((1 - float(str(record["sparsity"]))) * problem.spec.numel)
        except (ValidationError, KeyError, ValueError) as cause:
            raise ArtefactError(f"{path}: the record {key} is not as documented ({cause!r}).") from None
        target = target_of(problem.spec)
        same_sparsity = nm == [target.pattern.keep, target.pattern.of] if target.pattern else nnz == target.nnz
        if rank != target.rank or not same_sparsity:
            raise ArtefactError(f"{path}: {key} was made at another rank or sparsity than {target}.")
        if not math.isclose(energy, problem.energy, rel_tol=1e-3):
            raise ArtefactError(
                f"{path}: {key} has energy {energy:g}, the layer {problem.energy:g}; not the same layer."
            )
        found[setting] = results
    return found


def geometric_mean(values: Sequence[float]) -> float:
    """`exp(mean(log v))` of values >= 0; 0 if one of them is."""
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if all(values) else 0.0


def shapes(text: str) -> list[tuple[int, int]]:
    """Read "4096x4096,1024x4096"."""
    found = []
    for part in text.split(","):
        d_out, x, d_in = part.partition("x")
        if not (x and d_out.isdecimal() and d_in.isdecimal() and int(d_out) and int(d_in)):
            raise argparse.ArgumentTypeError(f"takes D_OUTxD_IN[,...] such as 4096x4096; got '{text}'")
        found.append((int(d_out), int(d_in)))
    return found


def synthetic_problem(d_out: int, d_in: int, device: torch.device) -> Problem:
    """A layer made from a seed: correlated inputs with outliers, a quarter more tokens than inputs."""
    W, gram = layer(d_out, d_in, tokens=d_in + d_in // 4)
    return _problem(f"synthetic.{d_out}x{d_in}", W, gram, device)


def chosen(problems: Sequence[Problem], only: Sequence[str]) -> list[Problem]:
    """The problems named, or all of them; `UsageError` for a name that is not there or is there twice."""
    names = [problem.name for problem in problems]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"Two problems are called {', '.join(sorted(twice))}; give each shape once.")
    if unknown := set(only) - set(names):
        raise UsageError(f"No problem {', '.join(sorted(unknown))}. Known: {', '.join(names)}.")
    return [problem for problem in problems if not only or problem.name in only]
