"""Define the interfaces of solvers, allocators, objectives and progress displays.

Adding a solver or an allocator is one file, one row in the table of its folder, and one test of what is special to
it; the contract tests run over the tables by themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from enum import Flag, IntEnum, StrEnum, auto
from typing import ClassVar, Generic, Protocol, TypeVar

from torch import Tensor

from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Solution
from globalopt.values.metric import Metric
from globalopt.values.problem import Allocation, Problem
from globalopt.values.span import Mask


class Reads(Flag):
    """Say what an allocator reads of a problem; a search computes nothing else.

    `NOTHING`: the layers and the budget. `PROFILES`: statistics of the layers (`Problem.profiles`). `SURFACES`:
    predicted losses (`Problem.surfaces`). `SPANS`: directions and entries of the layers (`Problem.span`), beside
    predicted losses. `OBJECTIVE`: losses of the model, of the allocations it asks for.

    >>> Reads.PROFILES in Reads.PROFILES | Reads.SURFACES
    True
    """

    NOTHING = 0
    PROFILES = auto()
    SURFACES = auto()
    OBJECTIVE = auto()
    SPANS = auto()


State = TypeVar("State")
"""The type that a solver's `prepare` returns and its `solve` takes."""


class Needs(IntEnum):
    """Say how much of the input Gram a solver reads: nothing, its diagonal, or all of it.

    >>> Needs.DIAGONAL < Needs.GRAM
    True
    """

    NOTHING = 0
    DIAGONAL = 1
    GRAM = 2


class Outputs(StrEnum):
    """Say how much of the output Gram `A` weights a solver's error: nothing, its diagonal (rows), or all of it.

    >>> Outputs("rows")
    <Outputs.ROWS: 'rows'>
    """

    NONE = "none"
    ROWS = "rows"
    FULL = "full"


class Rounding(StrEnum):
    """Say how a solver's solution is put on the grids of a target in few bits.

    `FITTED`: by a sweep, coordinate descent, and refits of the factors (`rounding.stored`). `SWEEP`: by one sweep over
    the columns. `NEAREST`: every number to its nearest level. The last two are methods as published, without factors.

    >>> Rounding("sweep")
    <Rounding.SWEEP: 'sweep'>
    """

    FITTED = "fitted"
    SWEEP = "sweep"
    NEAREST = "nearest"


class Solver(ABC, Generic[State]):
    """Fit `S + L` to one weight `W` (d_out, d_in) at a target rank and number of nonzeros.

    A solver is a frozen dataclass whose fields are its options. It subclasses `Solver[State]`, sets `name`, and writes
    two methods: `prepare` computes everything that does not depend on the target (factorisations, scalings), `solve`
    fits one target with the state that `prepare` returned. One `prepare` serves any number of targets, so a state is
    never modified. A solver knows no layer names, files or models, and keeps nothing between calls.

    Everything else has a default. The class variables describe the solver:

        name      the name by which it is chosen; the only one without a default
        paper     its source: "arXiv:...", "doi:..." or ""
        version   raised whenever results change for the same inputs: artefacts computed by an older version
                  are not reused
        needs     how much of the input Gram it reads
        sparse    whether it fits an `S`; if not, a target keeps no nonzeros or all of them
        low_rank  whether it fits an `L`; if not, a target has rank 0
        patterns  whether its `S` keeps to N:M patterns
        signs     whether it fits a sign plane, as SLaB does; if so, every target has one
        rounding  how its solutions are put on the grids of targets in few bits

    A solver with neither `sparse` nor `low_rank` keeps every layer whole, and saves by the bits of its numbers alone.

    >>> from dataclasses import dataclass
    >>> import torch
    >>> from globalopt import Gram
    >>> @dataclass(frozen=True)
    ... class Truncated(Solver[tuple[Tensor, Metric]]):
    ...     name: ClassVar[str] = "truncated"
    ...     sparse: ClassVar[bool] = False
    ...
    ...     def prepare(self, weight, metric):
    ...         return weight, metric
    ...
    ...     def solve(self, state, target, start=None):
    ...         weight, metric = state
    ...         U, s, Vh = torch.linalg.svd(weight, full_matrices=False)
    ...         U, V = U[:, : target.rank] * s[: target.rank], Vh[: target.rank]
    ...         value = Decomposition(torch.zeros_like(weight), U, V)
    ...         return Solution(value, metric.error(weight - value.dense()))
    >>> solver = Truncated()
    >>> state = solver.prepare(torch.diag(torch.tensor([3.0, 2.0, 1.0])), Metric(Gram(torch.eye(3), tokens=100)))
    >>> [round(found.error, 3) for found in solver.solve_path(state, [Target(1, 0), Target(2, 0)])]
    [5.0, 1.0]
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    version: ClassVar[int] = 1
    needs: ClassVar[Needs] = Needs.GRAM
    sparse: ClassVar[bool] = True
    low_rank: ClassVar[bool] = True
    patterns: ClassVar[bool] = True
    signs: ClassVar[bool] = False
    rounding: ClassVar[Rounding] = Rounding.FITTED

    outputs: Outputs = Outputs.NONE
    """How much of `Metric.outputs` weights the error. A dataclass field of the same name makes it an option."""

    @abstractmethod
    def prepare(self, weight: Tensor, metric: Metric) -> State:
        """Compute the state that all targets of `weight` (d_out, d_in) share; neither argument is modified."""

    @abstractmethod
    def solve(self, state: State, target: Target, start: Decomposition | None = None) -> Solution:
        """Fit `target`; with a feasible `start` the result's error, in the whole metric, is never above the start's."""

    def solve_site(self, layers: Sequence[tuple[Tensor, Metric, Target]]) -> list[Solution]:
        """Fit layers that share one input site, `(weight, metric, target)` each.

        By default one after the other. A solver that can share work between layers on the same inputs overrides this.
        """
        return [self.solve(self.prepare(weight, metric), target) for weight, metric, target in layers]

    def shorter(self) -> Solver[State]:
        """Return a version that takes less time, whose errors are higher by much the same factor in all layers.

        Predicted losses are compared with each other, so that such a factor does not change an allocation. By default
        the solver itself.
        """
        return self

    def solve_path(self, state: State, targets: Sequence[Target]) -> list[Solution]:
        """Fit all `targets` of one layer, given in any order.

        By default each from nothing. A solver that can start from the solution of a neighbouring target, at a lower
        cost, overrides this.
        """
        return [self.solve(state, target) for target in targets]


Candidate = Mapping[str, Target | Mask]
"""What every layer keeps, by layer name: a target, or single components of its span."""


class Objective(Protocol):
    """Evaluate the loss of a model whose layers are replaced by candidates; the only access of allocators to the model.

    A loss is the mean over a window of KL(dense || candidate) in nats per token, on the selection text, which is not
    the text of calibration. Windows are grouped in chunks; candidates that are evaluated on the same chunks can be
    compared window by window. Evaluating the same candidate on the same chunk again costs nothing.

    >>> from allocators.example import ExampleObjective, example_problem  # an objective that needs no model
    >>> problem = example_problem()
    >>> objective = ExampleObjective(problem)
    >>> dense = {spec.name: Target.dense(spec) for spec in problem.specs}
    >>> objective.losses([dense], chunks=[0]).tolist()
    [[0.0, 0.0, 0.0, 0.0]]
    >>> objective.tokens, objective.chunk_tokens
    (40, 40)
    """

    @property
    def chunks(self) -> int:
        """Return the number of chunks."""
        ...

    @property
    def chunk_tokens(self) -> int:
        """Return the tokens of the largest chunk, the most that evaluating one candidate on one chunk costs."""
        ...

    @property
    def tokens(self) -> int:
        """Return the tokens spent so far, one per token of a chunk and per candidate."""
        ...

    @property
    def limit(self) -> int:
        """Return the tokens that may be spent in all; an allocator stops before it would spend more."""
        ...

    def losses(self, candidates: Sequence[Candidate], chunks: Sequence[int]) -> Tensor:
        """Compute the losses of candidates on chunks, in nats per token.

        Returns:
            (candidates, windows of the chunks) float64, windows in the order of `chunks`.
        """
        ...


class Allocator(Protocol):
    """Choose one target per layer of a problem, within its budget.

    An allocator is a frozen dataclass whose fields are its hyper-parameters.

    >>> from dataclasses import dataclass
    >>> from allocators.example import example_problem
    >>> @dataclass(frozen=True)
    ... class Sparse:
    ...     name = "sparse"
    ...     paper = ""
    ...     reads = Reads.NOTHING
    ...     version = 1
    ...
    ...     def allocate(self, problem, objective=None):
    ...         kept = problem.budget.kept
    ...         targets = {spec.name: Target(0, int(kept * spec.numel)) for spec in problem.specs}
    ...         return problem.finish(targets, by=self.name)
    >>> Sparse().allocate(example_problem(kept=0.5)).used
    192
    """

    name: ClassVar[str]
    """The name by which it is chosen, and which budget files record."""

    paper: ClassVar[str]
    """The source, "arXiv:..." or "doi:...", or empty."""

    reads: ClassVar[Reads]
    """What it reads of the problem, which is all that is computed before it is asked; the objective is None to an
    allocator that does not read it."""

    version: ClassVar[int] = 1
    """Raised whenever the allocator's result for the same problem changes: artefacts of an older version are not used
    again."""

    def allocate(self, problem: Problem, objective: Objective | None = None) -> Allocation:
        """Return an allocation within the budget, made by `problem.finish`."""
        ...


class Progress(Protocol):
    """Display the progress of long stages; the command line shows it live or as log lines.

    >>> import contextlib
    >>> class Printed:
    ...     @contextlib.contextmanager
    ...     def stage(self, name, total, unit):
    ...         yield lambda detail: print(f"{name}: {detail}, one of {total} {unit}")
    ...
    ...     def note(self, text):
    ...         print(text)
    >>> display: Progress = Printed()
    >>> with display.stage("refine", 2, "layers") as advance:
    ...     advance("q_proj")
    refine: q_proj, one of 2 layers
    """

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Callable[[str], None]]:
        """Open a stage of `total` units; calling the returned function with a detail advances it by one."""
        ...

    def note(self, text: str) -> None:
        """Show one line that stays on the display."""
        ...
