"""Compress a trained causal language model into sparse plus low-rank layers under one global parameter budget."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from globalopt.export.registration import register

if TYPE_CHECKING:
    from globalopt.api import Compressed, compress, search
    from globalopt.budgets.budget_file import BudgetFile
    from globalopt.errors import GlobalOptError
    from globalopt.pipeline.options import RefineOptions
    from globalopt.values.budget import Budget, Target
    from globalopt.values.decomposition import Decomposition, Solution
    from globalopt.values.metric import Gram, Metric
    from globalopt.values.problem import Allocation

__all__ = [
    "Allocation",
    "Budget",
    "BudgetFile",
    "Compressed",
    "Decomposition",
    "GlobalOptError",
    "Gram",
    "Metric",
    "RefineOptions",
    "Solution",
    "Target",
    "compress",
    "search",
]

_HOMES = {
    **dict.fromkeys(("Compressed", "compress", "search"), "api"),
    **dict.fromkeys(("Budget", "Target"), "values.budget"),
    **dict.fromkeys(("Decomposition", "Solution"), "values.decomposition"),
    **dict.fromkeys(("Gram", "Metric"), "values.metric"),
    "Allocation": "values.problem",
    "BudgetFile": "budgets.budget_file",
    "GlobalOptError": "errors",
    "RefineOptions": "pipeline.options",
}

register()


def __getattr__(name: str) -> Any:
    # Looked up when asked for: nobody who imports a submodule should pay for torch, or for a search through installed
    # packages.
    if name == "__version__":
        from importlib.metadata import version

        return version("globalopt")
    if name in _HOMES:
        return getattr(import_module(f"globalopt.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
