"""The error family: every message says what was wrong, the value, and what to do.

The command line turns each of these into one line and an exit code (`exit_code`): 1 failed, 2 usage, 3 budget
infeasible. A module that raises anything else on bad input has a defect.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class GlobalOptError(Exception):
    """Root of every error this program raises on purpose."""

    exit_code: ClassVar[int] = 1


class UsageError(GlobalOptError, ValueError):
    """An option or argument is out of its range."""

    exit_code = 2


class BudgetError(GlobalOptError, ValueError):
    """No allocation fits the budget."""

    exit_code = 3


class CalibrationError(GlobalOptError, ValueError):
    """The calibration or evaluation text cannot be used."""


class NumericalError(GlobalOptError, ArithmeticError):
    """A weight, Gram or factorisation is not finite or not positive definite at any damping tried."""


class ArtefactError(GlobalOptError, OSError):
    """A file or folder is missing, broken, of another version, or belongs to another run or model."""

    def __str__(self) -> str:
        # OSError would print its arguments as a tuple.
        return " ".join(str(a) for a in self.args)


class UnsupportedModelError(GlobalOptError, TypeError):
    """The model has no decoder blocks we can walk, or too little of it can be compressed."""


class UnknownNameError(GlobalOptError, LookupError):
    """A solver, allocator, pattern or option name is not in its table."""

    exit_code = 2

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        """Build the message with the closest known name.

        Args:
            kind: what the name should have named, e.g. "solver".
            name: what was given.
            known: the names there are.
        """
        names = sorted(known)
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"; did you mean '{close[0]}'?" if close else "."
        super().__init__(f"No {kind} '{name}'{hint} Known: {', '.join(names)}.")
