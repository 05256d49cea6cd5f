"""Set how much time a whole search takes, by one word: `quick`, `default` or `best`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from globalopt.errors import UnknownNameError
from globalopt.pipeline.options import PROBE_STEPS
from solvers import SOLVERS


@dataclass(frozen=True)
class Effort:
    """Hold the settings of a search that trade time for quality; each is the default of an option of that name.

    Args:
        nsamples: calibration windows.
        eval_windows: windows of the selection text, of validation and of test.
        allocator: divides the budget.
        search_tokens: tokens of forward passes on which an allocator may evaluate the objective.
        preset: of solvers that have presets.
        probe_steps: steps of the probe solver.
        epochs: passes of block matching over the calibration windows at most.

    >>> EFFORTS["quick"].nsamples < EFFORTS["default"].nsamples < EFFORTS["best"].nsamples
    True
    """

    nsamples: int
    eval_windows: int
    allocator: str
    search_tokens: int
    preset: str
    probe_steps: int
    epochs: int

    def solver_options(self, solver: str, given: Mapping[str, str]) -> dict[str, str]:
        """Complete the options of a solver: the preset where it has one and none is `given`.

        >>> EFFORTS["best"].solver_options("3basil", {"damping": "0.01"})
        {'preset': 'best', 'damping': '0.01'}
        >>> EFFORTS["best"].solver_options("wanda", {})
        {}
        """
        has_presets = solver in SOLVERS and hasattr(SOLVERS[solver], "preset")
        return {"preset": self.preset, **given} if has_presets else {**given}

    def match_options(self, match: str, given: Mapping[str, str]) -> dict[str, str]:
        """Complete the options of block matching: its epochs, where blocks are matched and none are `given`.

        >>> EFFORTS["quick"].match_options("none", {})
        {}
        """
        return {**given} if match == "none" else {"epochs": str(self.epochs), **given}


EFFORTS = {
    "quick": Effort(
        nsamples=64,
        eval_windows=64,
        allocator="knapsack",
        search_tokens=100_000,
        preset="fast",
        probe_steps=20,
        epochs=2,
    ),
    "default": Effort(
        nsamples=128,
        eval_windows=128,
        allocator="knapsack",
        search_tokens=500_000,
        preset="default",
        probe_steps=PROBE_STEPS,
        epochs=4,
    ),
    "best": Effort(
        nsamples=256,
        eval_windows=128,
        allocator="auto",
        search_tokens=500_000,
        preset="best",
        probe_steps=80,
        epochs=8,
    ),
}
"""The levels by name. What `quick` and `default` take and give is in docs/results.md (`benchmarks/effort.py`)."""


def get_effort(name: str) -> Effort:
    """Return the level `name`; `UnknownNameError` if there is none.

    >>> get_effort("default").epochs
    4
    """
    if name not in EFFORTS:
        raise UnknownNameError("effort", name, EFFORTS)
    return EFFORTS[name]
