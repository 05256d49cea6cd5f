"""Record methods and limits as JSON, for the identity of a run and the addresses of its artefacts."""

from __future__ import annotations

import inspect
import math
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from globalopt.errors import UsageError
from globalopt.protocols import Allocator, Solver
from globalopt.runs.files import digest
from globalopt.values.budget import NO_LIMITS, Limits

NOT_OWN = ("solvers", "allocators", "globalopt", "abc", "builtins", "typing")
"""Packages whose classes are covered by a version; the source of all other base classes is hashed."""


def method_record(method: Solver | Allocator) -> dict[str, Any]:
    """Record a solver or an allocator as JSON: its class, its version and its hyper-parameters.

    The version of a user's class need not change with its code, so its source, and that of its bases outside of this
    project, is hashed too. A method that is no dataclass is refused: its hyper-parameters could not be recorded, and
    two different ones would look alike.

    Raises:
        UsageError: the method is no dataclass, or a field is no finite number, text or truth value.

    >>> from allocators import get_allocator
    >>> method_record(get_allocator("uniform"))["options"]
    {'rank_share': 0.1}
    """
    kind = type(method)
    if not is_dataclass(method):
        raise UsageError(
            f"{kind.__name__} is no dataclass, so that two of them could not be told apart. Make it a frozen dataclass "
            "whose fields are its hyper-parameters."
        )
    options = {field.name: getattr(method, field.name) for field in fields(method)}
    for name, value in options.items():
        if not isinstance(value, str | int | float | bool | None):
            raise UsageError(
                f"{kind.__name__}.{name} is a {type(value).__name__}; hyper-parameters are numbers, texts or truth "
                "values, so that a run can record them."
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{kind.__name__}.{name} is {value}; hyper-parameters are finite.")
    found = {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "options": options,
        "version": getattr(kind, "version", None),
    }
    own = [base for base in kind.__mro__ if base.__module__.split(".")[0] not in NOT_OWN]
    if not own:
        return found
    try:
        return {**found, "source": digest([inspect.getsource(base) for base in own])}
    except (OSError, TypeError):
        # Typed into an interpreter, which keeps no source.
        return found


def limits_record(limits: Limits) -> dict[str, Any] | None:
    """Record limits as JSON; None where there are none.

    >>> limits_record(Limits(rank_multiple=8))["rank_multiple"]
    8
    """
    return None if limits == NO_LIMITS else asdict(limits)
