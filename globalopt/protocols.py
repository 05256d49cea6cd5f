"""The sockets: what a solver, an allocator and a progress display must offer.

Adding a solver or an allocator is one file, one row in the table of its folder, and one test of what is special to
it; the contract tests run over the tables by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from enum import IntEnum
from typing import Any, ClassVar, Protocol

from torch import Tensor

from globalopt.types import Allocation, Decomposition, Metric, Problem, Solution, Target


class Needs(IntEnum):
    """How much of the input Gram a solver reads: nothing, its diagonal, or all of it."""

    NOTHING = 0
    DIAGONAL = 1
    GRAM = 2


class Solver(Protocol):
    """Fits `S + L` to one weight. A frozen dataclass of hyper-parameters; it keeps no state of its own.

    `prepare` does everything that ignores the target, so that many targets of one layer cost one factorisation;
    `solve` is called with that state, as often as wanted. Solvers know no layer names, files or models.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[Needs]
    low_rank: ClassVar[bool]
    patterns: ClassVar[bool]

    def prepare(self, weight: Tensor, metric: Metric) -> Any:
        """Return the state shared by all targets of `weight` (d_out, d_in); inputs are not modified."""
        ...

    def solve(self, state: Any, target: Target, start: Decomposition | None = None) -> Solution:
        """Fit `target`; with a feasible `start` the result's error is never above the start's."""
        ...


Objective = Callable[[Mapping[str, Target]], float]
"""How bad a choice of targets is; lower is better. The only way a searcher may ask about the model."""


class Allocator(Protocol):
    """Chooses one option per layer of a problem, within its budget. A frozen dataclass of hyper-parameters."""

    name: ClassVar[str]
    paper: ClassVar[str]

    def allocate(self, problem: Problem, objective: Objective) -> Allocation:
        """Return a feasible allocation, made by `problem.finish`."""
        ...


class Progress(Protocol):
    """Where a long stage says how far it is; the command line shows it live or as log lines."""

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Callable[[str], None]]:
        """Open a stage of `total` units; calling the returned function with a detail advances it by one."""
        ...

    def note(self, text: str) -> None:
        """Say one line that stays."""
        ...
