"""Who competes on a layer: our solvers by name and options, and transcriptions of the published algorithms."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from cells import err
from from_tests import alps, hassle_free, layer, oats, randomized, sparsegpt, three_basil
from layer_problems import Problem, Stopwatch
from torch import Tensor

from globalopt.errors import NumericalError, UnknownNameError, UsageError
from globalopt.protocols import Solver
from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition
from globalopt.values.layer import LayerSpec
from globalopt.values.metric import Metric
from reports import formats
from solvers import get_solver

# The numbers of the public code stand beside those of the transcription of the same method.
PUBLIC_METHODS = {
    "3basil": "3basil",
    "hassle-free": "hf_sparsegpt40",
    "hassle-free-alps": "hf_alps10",
    "oats": "oats80",
}
LARGE = 2**22  # weights


@dataclass(frozen=True, eq=False)
class Fit:
    """One answer: what it stands for, `value` (d_out, d_in) float64, its counts, and how long it took.

    A twin has no preparation apart, no status, and does not count its steps.
    """

    value: Tensor
    nnz: int
    rank: int
    seconds: float
    prepare_s: float | None = None
    status: str = "-"
    steps: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What is kept of the median repetition of a fit.

    Args:
        rel_error: `tr(E G Eᵀ) / tr(W G Wᵀ)`, undamped, float64.
        seconds: wall time, the `prepare_s` of the preparation included; a twin prepares within its time.
        gemm_s: median seconds of one float32 product of the weight and the Gram, measured just before.
    """

    rel_error: float
    nnz: int
    rank: int
    seconds: float
    prepare_s: float | None
    gemm_s: float
    status: str
    steps: int | None

    @property
    def gemms(self) -> float:
        return self.seconds / self.gemm_s


class Contender(Protocol):
    """Anything that fits a target.

    `method` names the published algorithm it is or improves on; `low_rank` whether it has a low-rank part, `signs`
    whether that is multiplied by a sign plane.
    """

    @property
    def label(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def low_rank(self) -> bool: ...
    @property
    def signs(self) -> bool: ...
    def fit(self, problem: Problem, target: Target) -> Fit: ...


@dataclass(frozen=True)
class Ours:
    """A solver of the table, as `label` asks for it."""

    label: str
    method: str
    solver: Solver

    @classmethod
    def parse(cls, text: str) -> Ours:
        """Read NAME or NAME:KEY=VALUE,KEY=VALUE; the registry's errors for what it does not know."""
        name, _, rest = text.partition(":")
        options = {}
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            if not (key and equals and value):
                raise UsageError(f"A solver is NAME or NAME:KEY=VALUE,KEY=VALUE; got '{text}'.")
            options[key.replace("-", "_")] = value
        return cls(text, published_method(name, options), get_solver(name, options))

    @property
    def low_rank(self) -> bool:
        return self.solver.low_rank

    @property
    def signs(self) -> bool:
        return self.solver.signs

    def fit(self, problem: Problem, target: Target) -> Fit:
        with Stopwatch(problem.weight.device) as preparing:
            state = self.solver.prepare(problem.weight, problem.metric)
        with Stopwatch(problem.weight.device) as solving:
            solution = self.solver.solve(state, target)
        value, steps = solution.value, solution.stats.get("steps")
        return Fit(
            dense(value),
            value.nnz,
            value.rank,
            preparing.seconds + solving.seconds,
            preparing.seconds,
            solution.status.value,
            None if steps is None else int(steps),
        )


def dense(value: Decomposition) -> Tensor:
    """(d_out, d_in) float64: the matrix a decomposition stands for."""
    L = value.U.double() @ value.V.double()
    return value.S.double() + (L if value.signs is None else L * value.signs)


def published_method(name: str, options: Mapping[str, str]) -> str:
    """The published algorithm a solver improves on: its own, and another where HASSLE-free prunes by ALPS."""
    return "hassle-free-alps" if name == "hassle-free" and "alps" in options.values() else name


TwinFit = Callable[[Tensor, Tensor, Target], tuple[Tensor, Tensor | None]]


def _three_basil(W: Tensor, G: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    return three_basil.fit(W, G, target.rank, target.nnz, target.pattern, dtype=torch.float32, svd=randomized)


def _hassle_free(W: Tensor, G: Tensor, target: Target, sparse_step: str, rounds: int) -> tuple[Tensor, Tensor]:
    return hassle_free.fit(
        W,
        G,
        target.rank,
        target.nnz,
        target.pattern,
        sparse_step=sparse_step,
        rounds=rounds,
        dtype=torch.float32,
        svd=randomized,
    )


def _oats(W: Tensor, G: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    # The public code rounds the zeros of a row down.
    per_row = math.ceil(target.nnz / W.shape[0])
    return oats.fit(W, G, target.rank, per_row, pattern=target.pattern, dtype=torch.float32)


def _sparsegpt(W: Tensor, G: Tensor, target: Target) -> tuple[Tensor, None]:
    return sparsegpt.fit(W, G, target.nnz, target.pattern, dtype=torch.float32), None


def _alps(W: Tensor, G: Tensor, target: Target) -> tuple[Tensor, None]:
    return alps.fit(W, G, target.nnz, target.pattern, dtype=torch.float32), None


TWINS: dict[str, TwinFit] = {
    "3basil": _three_basil,
    "hassle-free": functools.partial(_hassle_free, sparse_step="sparsegpt", rounds=40),
    "hassle-free-alps": functools.partial(_hassle_free, sparse_step="alps", rounds=10),
    "oats": _oats,
    "sparsegpt": _sparsegpt,
    "alps": _alps,
}


@dataclass(frozen=True)
class Twin:
    """A transcription of the published algorithm `method`, in float32, with all the work of the public code."""

    method: str

    def __post_init__(self) -> None:
        if self.method not in TWINS:
            raise UnknownNameError("twin", self.method, TWINS)

    @property
    def label(self) -> str:
        return f"twin {self.method}"

    @property
    def low_rank(self) -> bool:
        return self.method not in ("sparsegpt", "alps")

    @property
    def signs(self) -> bool:
        return False

    def fit(self, problem: Problem, target: Target) -> Fit:
        device = problem.weight.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), Stopwatch(device) as watch:
            torch.manual_seed(0)
            try:
                S, L = TWINS[self.method](problem.weight, problem.G, target)
            except torch.linalg.LinAlgError as cause:  # pyright: ignore[reportPrivateImportUsage]
                raise NumericalError(f"The {self.label} broke down on {problem.name}: {cause}") from cause
        value = S.double() if L is None else S.double() + L.double()
        rank = 0 if L is None else target.rank
        return Fit(value, int(torch.count_nonzero(S)), rank, watch.seconds)


def aimed(contender: Contender, target: Target, spec: LayerSpec) -> Target:
    """`target` as the contender can meet it: without low rank its parameters become nonzeros; a pattern drops them."""
    if contender.low_rank or not target.rank:
        return target
    if target.pattern is not None:
        return Target(0, target.nnz, target.pattern)
    return Target(0, target.nnz + target.rank * (spec.d_out + spec.d_in))


def repetitions(problem: Problem, asked: int) -> int:
    """How often a fit is timed: as asked, and large layers once."""
    return 1 if problem.spec.numel >= LARGE else asked


def measure(problem: Problem, target: Target, contender: Contender, repeats: int) -> Outcome:
    """Fit `repeats` times and keep the repetition of median time.

    Raises:
        NumericalError: the contender's answer is not finite, or it broke down.
        UsageError: the contender cannot meet the target.
    """
    warm_up(contender, problem.weight.device)
    gemm_s = problem.gemm_seconds()
    fits = sorted((contender.fit(problem, target) for _ in range(repeats)), key=lambda fit: fit.seconds)
    fit = fits[(len(fits) - 1) // 2]
    rel_error = problem.relative_error(fit.value)
    if not math.isfinite(rel_error):
        raise NumericalError(f"The error of {contender.label} on {problem.name} came out as {rel_error}.")
    return Outcome(rel_error, fit.nnz, fit.rank, fit.seconds, fit.prepare_s, gemm_s, status=fit.status, steps=fit.steps)


@functools.cache
def warm_up(contender: Contender, device: torch.device) -> None:
    """Load the libraries a contender calls, by one fit of a small layer that nobody times."""
    W, gram = layer(32, 32, tokens=64)
    spec = LayerSpec(name="warm-up", block=0, site="", kind="", d_out=32, d_in=32)
    problem = Problem(spec, W.to(device), Metric(gram.to(device)))
    contender.fit(problem, Target(int(contender.low_rank), spec.numel // 2, signs=contender.signs))


def elapsed(seconds: float) -> str:
    """Three digits below a second: 4.21 ms, 0.421 s; above it as everywhere."""
    if seconds < 0.0995:
        return f"{1e3 * seconds:.3g} ms"
    return f"{seconds:.3f} s" if seconds < 0.9995 else formats.duration(seconds)


def say(done: int, total: int, what: str, outcome: Outcome) -> None:
    """One line for a finished cell."""
    err.print(
        f"{done}/{total}  {what}  error {formats.scientific(outcome.rel_error)}  "
        f"{elapsed(outcome.seconds)}, {outcome.gemms:,.0f} gemms",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
