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


def build(kind: str, table: Mapping[str, type[T]], name: str, options: Mapping[str, str] | None = None) -> T:
    """An instance of `table[name]`, e.g. `build("solver", SOLVERS, "3basil", {"steps": "300"})`.

    Args:
        kind: what the table holds, for messages: "solver", "allocator".
        table: dataclasses of hyper-parameters by name.
        options: field name to text; other fields keep their defaults.
    Raises:
        UnknownNameError: no such name or option, with the closest one.
        UsageError: a text its field cannot read, or a value out of its range.
    """
    if name not in table:
        raise UnknownNameError(kind, name, table)
    return table[name](**read_options(table[name], f"{kind} '{name}'", options or {}))


def read_options(cls: type, owner: str, options: Mapping[str, str]) -> dict[str, Any]:
    """Convert texts to the types of the fields of the dataclass `cls`.

    Args:
        owner: how messages call it, "solver 'oats'".
    Raises:
        UnknownNameError: no such field.
        UsageError: a text its field cannot read.
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
    """`UsageError` for the first option that is below `least` or not finite."""
    for option, value in values.items():
        if not (math.isfinite(value) and value >= least):
            raise UsageError(f"Option {option} must be finite and at least {least:g}; got {value:g}.")


def below_one(**values: float) -> None:
    """`UsageError` for the first option that is not in [0, 1)."""
    for option, value in values.items():
        if not 0 <= value < 1:
            raise UsageError(f"Option {option} must be at least 0 and below 1; got {value:g}.")


def _switch(text: str) -> bool:
    if text.lower() not in SWITCH:
        raise ValueError(text)
    return SWITCH[text.lower()]


def _reader(kind: type) -> tuple[Callable[[str], Any], str]:
    if issubclass(kind, StrEnum):
        return kind, "one of " + ", ".join(kind)
    return READERS[kind]


READERS: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (_switch, "true or false"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    str: (str, "a word"),
}
