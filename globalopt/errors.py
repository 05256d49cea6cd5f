"""Define the error family: every message says what was wrong, the value, and what to do.

The command line turns each of these into one line and an exit code (`exit_code`): 1 failed, 2 usage, 3 budget
infeasible. A module that raises anything else on bad input has a defect.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class GlobalOptError(Exception):
    """Mark an error that this program raises on purpose; all others derive from it.

    >>> try:
    ...     raise UsageError("--seqlen must be at least 2; got 1.")
    ... except GlobalOptError as error:
    ...     print(f"{error} Exit code {error.exit_code}.")
    --seqlen must be at least 2; got 1. Exit code 2.
    """

    exit_code: ClassVar[int] = 1


class UsageError(GlobalOptError, ValueError):
    """Report an option or argument out of its range.

    >>> from globalopt.machine.memory import parse_size
    >>> parse_size("8 apples")
    Traceback (most recent call last):
        ...
    globalopt.errors.UsageError: '8 apples' is no amount of memory; write it as 8GiB or 500MB.
    """

    exit_code = 2


class BudgetError(GlobalOptError, ValueError):
    """Report that no allocation fits the budget.

    >>> BudgetError.exit_code, issubclass(BudgetError, ValueError)
    (3, True)
    """

    exit_code = 3


class CalibrationError(GlobalOptError, ValueError):
    """Report that a calibration or evaluation text cannot be used.

    >>> from globalopt.text.reading import Text
    >>> Text.of("  ", "notes.txt")
    Traceback (most recent call last):
        ...
    globalopt.errors.CalibrationError: The text notes.txt is empty.
    """


class NumericalError(GlobalOptError, ArithmeticError):
    """Report a weight, Gram or factorisation that is not finite, or not positive definite at any damping tried.

    >>> import torch
    >>> from globalopt.kernels.rpca import robust_pca
    >>> robust_pca(torch.full((2, 2), torch.nan))
    Traceback (most recent call last):
        ...
    globalopt.errors.NumericalError: Robust PCA was given a matrix that is not finite.
    """


class ArtefactError(GlobalOptError, OSError):
    """Report a file or folder that is missing, broken, of another version, or of another run or model.

    >>> str(ArtefactError("There is no model folder llama."))
    'There is no model folder llama.'
    """

    def __str__(self) -> str:
        """Return the message alone: `OSError` would print its arguments as a tuple."""
        # OSError would print its arguments as a tuple.
        return " ".join(str(a) for a in self.args)


class LostProcessError(GlobalOptError, RuntimeError):
    """Report that another process of a job on several has ended.

    >>> LostProcessError.exit_code
    1
    """


class UnsupportedModelError(GlobalOptError, TypeError):
    """Report a model without decoder blocks that can be walked, or with too few compressible weights.

    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> find_layers(tiny_llama(blocks=0))
    Traceback (most recent call last):
        ...
    globalopt.errors.UnsupportedModelError: LlamaForCausalLM has no list of the 0 entries its config names ...
    """


class UnknownNameError(GlobalOptError, LookupError):
    """Report a solver, allocator, pattern or option name that is not in its table.

    >>> str(UnknownNameError("solver", "3basel", ["3basil", "wanda"]))
    "No solver '3basel'; did you mean '3basil'? Known: 3basil, wanda."
    """

    exit_code = 2

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        """Build the message, with the closest known name.

        Args:
            kind: what the name should have named, e.g. "solver".
            name: the name that was given.
            known: all names of the table.
        """
        names = sorted(known)
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"; did you mean '{close[0]}'?" if close else "."
        super().__init__(f"No {kind} '{name}'{hint} Known: {', '.join(names)}.")


def one_line(error: BaseException, length: int | None = 300) -> str:
    """Write the message of a foreign error on one line, for use within one of ours.

    Args:
        length: most characters; None keeps all.
    Returns:
        The message, or the name of the error's type where the message is empty.

    >>> one_line(ValueError("no such  file:\\n  notes.txt")), one_line(KeyError())
    ('no such file: notes.txt', 'KeyError')
    """
    return " ".join(str(error).split())[:length] or type(error).__name__
