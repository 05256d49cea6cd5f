"""Hyper-parameters: from option strings to fields, and their ranges."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from globalopt.errors import UnknownNameError, UsageError

SWITCH = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False, "1": True, "0": False}


def _switch(text: str) -> bool:
    if text.lower() not in SWITCH:
        raise ValueError(text)
    return SWITCH[text.lower()]


READERS: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (_switch, "true or false"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    str: (str, "a word"),
}


def read_options(cls: type, owner: str, options: Mapping[str, str]) -> dict[str, Any]:
    """Convert option strings by the annotations of the dataclass `cls`.

    Args:
        owner: how messages call it, "solver 'oats'".
    Raises:
        UnknownNameError: no such field. UsageError: a value its field cannot read.
    """
    kinds = get_type_hints(cls)
    known = [field.name for field in fields(cls)]
    values: dict[str, Any] = {}
    for option, text in options.items():
        if option not in known:
            raise UnknownNameError(f"option of {owner}", option, known)
        read, expected = READERS[kinds[option]]
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
