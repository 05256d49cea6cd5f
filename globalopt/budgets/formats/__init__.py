"""Convert budgets to and from the formats of other programs: one module per format, one row each in `FORMATS`.

A format writes a budget file as text and parses text into targets. It refuses targets that it cannot express, or names
in a note the parts that it leaves out. Names and shapes of layers that a text does not hold come from another budget of
the same model.
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
    """Write and parse one format.

    Both methods raise `UsageError` for targets that the format cannot express, `ArtefactError` for text that is not in
    the format.

    >>> from globalopt.budgets.budget_file import without_rank
    >>> from globalopt.budgets.example import example_budget
    >>> file = without_rank(example_budget())
    >>> text, notes = FORMATS["sparsities"]().write(file)
    >>> targets, notes = FORMATS["sparsities"]().read(text, like=file)
    >>> [target.nnz for target in targets.values()]
    [16, 16]
    """

    def write(self, file: BudgetFile) -> tuple[str, tuple[str, ...]]:
        """Return the text, and notes on the parts of the targets that it does not hold."""
        ...

    def read(self, text: str, like: BudgetFile) -> tuple[Mapping[str, Target], tuple[str, ...]]:
        """Parse a target for every layer of `like`, by name; notes name the parts that are taken from `like`."""
        ...


FORMATS: Mapping[str, type[Format]] = {
    "csv": Csv,
    "sparsities": Sparsities,
    "peft": Peft,
    "evopress": EvoPress,
}
