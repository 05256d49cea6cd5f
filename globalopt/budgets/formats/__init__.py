"""Budgets in the formats of other programs: one file per format, one row each in `FORMATS`.

A format writes a budget file as text and reads text back into targets. What it has no word for it refuses, or says in
a note; what a text does not say about the model, its layers and shapes, comes from another budget of that model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from globalopt.budgets.budget_file import BudgetFile
from globalopt.budgets.formats.evopress import EvoPress
from globalopt.budgets.formats.peft import Peft
from globalopt.budgets.formats.sparsities import Sparsities
from globalopt.budgets.formats.table import Csv
from globalopt.values.budget import Target


class Format(Protocol):
    """One format; both methods raise `ArtefactError` or `UsageError` on what it cannot carry or read."""

    def write(self, file: BudgetFile) -> tuple[str, tuple[str, ...]]:
        """The text, and notes on what is not in it."""
        ...

    def read(self, text: str, like: BudgetFile) -> tuple[Mapping[str, Target], tuple[str, ...]]:
        """A target for every layer of `like`, by name, and notes on what the text left open."""
        ...


FORMATS: Mapping[str, type[Format]] = {
    "csv": Csv,
    "sparsities": Sparsities,
    "peft": Peft,
    "evopress": EvoPress,
}
