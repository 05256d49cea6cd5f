"""The sockets: what a solver, an allocator and a progress display must offer.

Adding a solver or an allocator is one file, one row in the table of its folder, and one test of what is special to
it; the contract tests run over the tables by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from enum import IntEnum, StrEnum
from typing import Any, ClassVar, Protocol

from torch import Tensor

from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition, Solution
from globalopt.values.metric import Metric
from globalopt.values.problem import Allocation, Problem
from globalopt.values.span import Mask


class Needs(IntEnum):
    """How much of the input Gram a solver reads: nothing, its diagonal, or all of it."""

    NOTHING = 0
    DIAGONAL = 1
    GRAM = 2


class Outputs(StrEnum):
    """How much of the output Gram `A` a solver weights its error by: nothing, its diagonal (rows), or all of it."""

    NONE = "none"
    ROWS = "rows"
    FULL = "full"


class Solver(Protocol):
    """Fits `S + L` to one weight. A frozen dataclass of hyper-parameters; it keeps no state of its own.

    `prepare` does everything that ignores the target, so that many targets of one layer cost one factorisation;
    `solve` is called with that state, as often as wanted. Solvers know no layer names, files or models.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[Needs]
    sparse: ClassVar[bool]
    low_rank: ClassVar[bool]
    patterns: ClassVar[bool]
    signs: ClassVar[bool]

    @property
    def outputs(self) -> Outputs:
        """What it does with `Metric.outputs`, where there are any."""
        ...

    def prepare(self, weight: Tensor, metric: Metric) -> Any:
        """Return the state shared by all targets of `weight` (d_out, d_in); inputs are not modified."""
        ...

    def solve(self, state: Any, target: Target, start: Decomposition | None = None) -> Solution:
        """Fit `target`; with a feasible `start` the result's error, in the whole metric, is never above the start's."""
        ...

    def solve_site(self, layers: Sequence[tuple[Tensor, Metric, Target]]) -> list[Solution]:
        """Fit layers that share their inputs, `(weight, metric, target)` each; where a solver can, as one problem."""
        ...

    def solve_path(self, state: Any, targets: Sequence[Target]) -> list[Solution]:
        """Fit all `targets`, given in any order; where a solver can, each from its neighbour at a lower cost."""
        ...


Candidate = Mapping[str, Target | Mask]
"""What every layer keeps, by layer name: a target, or single components of its span."""


class Objective(Protocol):
    """The loss of a model whose layers are replaced: all that an allocator may evaluate on the model.

    A loss is the mean over a window of KL(dense || candidate) in nats per token, on text that nothing was fitted to.
    Windows come in `chunks`; candidates that are evaluated on the same chunks can be compared window by window.
    Evaluating the same candidate on the same chunk again costs nothing.

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
        """The number of chunks of windows."""
        ...

    @property
    def chunk_tokens(self) -> int:
        """Tokens of the largest chunk: the most that evaluating one candidate on one chunk costs."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens spent so far, one for each token of a chunk and each candidate."""
        ...

    @property
    def limit(self) -> int:
        """Tokens that may be spent in all; an allocator stops before it would spend more."""
        ...

    def losses(self, candidates: Sequence[Candidate], chunks: Sequence[int]) -> Tensor:
        """Compute the losses: (candidates, windows of the chunks) float64, windows in the order of `chunks`."""
        ...


class Allocator(Protocol):
    """Chooses one target per layer of a problem, within its budget. A frozen dataclass of hyper-parameters.

    >>> from dataclasses import dataclass
    >>> from allocators.example import example_problem
    >>> @dataclass(frozen=True)
    ... class Sparse:
    ...     name = "sparse"
    ...     paper = ""
    ...     uses_objective = False
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
    """As in the table of allocators and in budget files."""

    paper: ClassVar[str]
    """The source, "arXiv:..." or "doi:...", or empty."""

    uses_objective: ClassVar[bool]
    """Whether it evaluates the objective; an allocator that does not is given None."""

    version: ClassVar[int] = 1
    """Raised whenever the allocator's result for the same problem changes: artefacts of an older version are not used
    again."""

    def allocate(self, problem: Problem, objective: Objective | None = None) -> Allocation:
        """Return an allocation within the budget, made by `problem.finish`."""
        ...


class Progress(Protocol):
    """Where a long stage says how far it is; the command line shows it live or as log lines."""

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Callable[[str], None]]:
        """Open a stage of `total` units; calling the returned function with a detail advances it by one."""
        ...

    def note(self, text: str) -> None:
        """Say one line that stays."""
        ...
