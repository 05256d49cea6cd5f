"""Make a solver or an allocator from its table by name, with its hyper-parameters given as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from enum import StrEnum
from typing import Any, TypeVar, get_type_hints

from globalopt.errors import UnknownNameError, UsageError

T = TypeVar("T")

SWITCH = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False, "1": True, "0": False}
"""Words that are read as a boolean option."""


def build(kind: str, table: Mapping[str, type[T]], name: str, options: Mapping[str, str] | None = None) -> T:
    """Make an instance of `table[name]`, a dataclass of hyper-parameters.

    Args:
        kind: what the table holds, for messages: "solver", "allocator".
        table: classes by name.
        name: which one.
        options: values of its fields as text, by name; other fields keep their defaults.
    Raises:
        UnknownNameError: there is no such name or option; names the closest one.
        UsageError: a text cannot be converted to the type of its field, or a value is out of its range.

    >>> from solvers import SOLVERS
    >>> build("solver", SOLVERS, "3basil", {"steps": "300"}).steps
    300
    """
    if name not in table:
        raise UnknownNameError(kind, name, table)
    return table[name](**read_options(table[name], f"{kind} '{name}'", options or {}))


def read_options(cls: type, owner: str, options: Mapping[str, str]) -> dict[str, Any]:
    """Convert texts to the types of the fields of the dataclass `cls`.

    Args:
        cls: a dataclass.
        owner: its name in messages, e.g. "solver 'oats'".
        options: texts by field.
    Raises:
        UnknownNameError: there is no such field.
        UsageError: a text cannot be converted to the type of its field.

    >>> from solvers import SOLVERS
    >>> read_options(SOLVERS["3basil"], "solver '3basil'", {"steps": "many"})
    Traceback (most recent call last):
        ...
    globalopt.errors.UsageError: Option steps of solver '3basil' must be a whole number; got 'many'.
    """
    kinds = get_type_hints(cls)
    known = [field.name for field in fields(cls)]
    values: dict[str, Any] = {}
    for option, text in options.items():
        if not known:
            raise UsageError(f"There are no options of {owner}; got {option}={text}.")
        if option not in known:
            raise UnknownNameError(f"option of {owner}", option, known)
        read, expected = _reader(kinds[option])
        try:
            values[option] = read(text)
        except ValueError:
            raise UsageError(f"Option {option} of {owner} must be {expected}; got '{text}'.") from None
    return values


def at_least(least: float, **values: float) -> None:
    """Check that options are finite and at least `least`.

    Raises:
        UsageError: an option is not; names the first one.

    >>> at_least(1, steps=0)
    Traceback (most recent call last):
        ...
    globalopt.errors.UsageError: Option steps must be finite and at least 1; got 0.
    """
    for option, value in values.items():
        if not (math.isfinite(value) and value >= least):
            raise UsageError(f"Option {option} must be finite and at least {least:g}; got {value:g}.")


def below_one(**values: float) -> None:
    """Check that options are in [0, 1).

    Raises:
        UsageError: an option is not; names the first one.

    >>> below_one(share=1.5)
    Traceback (most recent call last):
        ...
    globalopt.errors.UsageError: Option share must be at least 0 and below 1; got 1.5.
    """
    for option, value in values.items():
        if not 0 <= value < 1:
            raise UsageError(f"Option {option} must be at least 0 and below 1; got {value:g}.")


def _switch(text: str) -> bool:
    """Convert "yes", "off" and the like to a boolean."""
    if text.lower() not in SWITCH:
        raise ValueError(text)
    return SWITCH[text.lower()]


def _reader(kind: type) -> tuple[Callable[[str], Any], str]:
    """Find the function that converts texts to the type `kind`, and a description of the texts that it accepts."""
    if issubclass(kind, StrEnum):
        return kind, "one of " + ", ".join(kind)
    return READERS[kind]


READERS: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (_switch, "true or false"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    str: (str, "a word"),
}
"""For each type of a field, the function that converts text to it, and a description of the texts that it accepts."""
