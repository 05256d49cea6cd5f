"""Make solvers and allocators: by name, from options given as text, and as variants of each other."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, make_dataclass
from enum import StrEnum
from typing import Any, TypeVar, get_type_hints

from globalopt.errors import UnknownNameError, UsageError

T = TypeVar("T")

SWITCH = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False, "1": True, "0": False}
"""Words that are read as a boolean option."""


def build(kind: str, table: Mapping[str, type[T]], name: str, options: Mapping[str, str] | None = None) -> T:
    """Make an instance of `table[name]` with options given as text.

    Args:
        kind: what the table holds, for messages: "solver", "allocator".
        table: classes by name.
        name: which one.
        options: values of its fields as text, by name; other fields keep their defaults.
    Raises:
        UnknownNameError: no such name or option, with the closest one.
        UsageError: a text its field cannot read, or a value out of its range.

    >>> from solvers import SOLVERS
    >>> build("solver", SOLVERS, "oats", {"steps": "40", "per_row": "no"})
    OATS(steps=40, per_row=False, momentum=0.9, tolerance=1e-05, outputs=<Outputs.NONE: 'none'>)
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
        UnknownNameError: no such field.
        UsageError: a text its field cannot read.

    >>> from solvers.sparsegpt import SparseGPT
    >>> read_options(SparseGPT, "solver 'sparsegpt'", {"damping": "0.1"})
    {'damping': 0.1}
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


def variant(cls: type[T], title: str, doc: str, **changes: Any) -> type[T]:
    """Derive a method from the dataclass `cls` by changing defaults of its options, and its class variables.

    It has the same options in the same order, and computes the same. The explanations of the options are taken over
    from the docstring of `cls`.

    Args:
        title: the name of the new class.
        doc: its docstring, without options.
        changes: new defaults of fields, and new values of class variables.
    Raises:
        TypeError: a change of what `cls` does not have.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Sweep:
    ...     name = "sweep"
    ...     steps: int = 20
    ...     damping: float = 0.01
    >>> Short = variant(Sweep, "Short", "Sweep a few times.", name="short", steps=5)
    >>> Short.name, Short()
    ('short', Short(steps=5, damping=0.01))
    """
    base: type[Any] = cls
    options = [(field.name, field.type, changes.pop(field.name)) for field in fields(base) if field.name in changes]
    if unknown := [name for name in changes if not hasattr(cls, name)]:
        raise TypeError(f"There is no {', '.join(unknown)} of {cls.__name__} to change.")
    _, args, explained = inspect.cleandoc(cls.__doc__ or "").partition("\n\nArgs:\n")
    text = inspect.cleandoc(doc) + args + explained.partition("\n\n")[0]
    # It belongs to the module of `cls`, where the types of its options are looked up.
    namespace = {**changes, "__doc__": text, "__module__": cls.__module__}
    return make_dataclass(title, options, bases=(cls,), namespace=namespace, frozen=True)


def at_least(least: float, **values: float) -> None:
    """Raise `UsageError` for the first option that is below `least` or not finite.

    >>> at_least(1, steps=80)
    >>> at_least(1, steps=0)
    Traceback (most recent call last):
    globalopt.errors.UsageError: Option steps must be finite and at least 1; got 0.
    """
    for option, value in values.items():
        if not (math.isfinite(value) and value >= least):
            raise UsageError(f"Option {option} must be finite and at least {least:g}; got {value:g}.")


def below_one(**values: float) -> None:
    """Raise `UsageError` for the first option that is not in [0, 1).

    >>> below_one(momentum=0.9)
    >>> below_one(momentum=1)
    Traceback (most recent call last):
    globalopt.errors.UsageError: Option momentum must be at least 0 and below 1; got 1.
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
