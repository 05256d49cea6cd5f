"""Compress a trained causal language model into sparse plus low-rank layers under one global parameter budget."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from globalopt.export.registration import register

if TYPE_CHECKING:
    from globalopt.api import Compressed, compress, search
    from globalopt.budget_file import BudgetFile
    from globalopt.errors import GlobalOptError
    from globalopt.refining import RefineOptions
    from globalopt.types import Allocation, Budget, Decomposition, Gram, Metric, Solution, Target

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
    **dict.fromkeys(("Allocation", "Budget", "Decomposition", "Gram", "Metric", "Solution", "Target"), "types"),
    "BudgetFile": "budget_file",
    "GlobalOptError": "errors",
    "RefineOptions": "refining",
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
