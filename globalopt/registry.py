"""Make a solver or allocator from its table by name, with its options given as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from globalopt.errors import UnknownNameError, UsageError

T = TypeVar("T")

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def build(kind: str, table: Mapping[str, type[T]], name: str, options: Mapping[str, str]) -> T:
    """An instance of `table[name]` with `options` converted by the types of its fields.

    Args:
        kind: "solver" or "allocator", for messages.
        options: field name to text.
    Raises:
        UnknownNameError: no such name, or no such field.
        UsageError: a text does not convert, or the value is refused.
    """
    if name not in table:
        raise UnknownNameError(kind, name, table)
    known: dict[str, Any] = {f.name: f.type for f in fields(table[name])}  # pyright: ignore[reportArgumentType]
    values: dict[str, Any] = {}
    for option, text in options.items():
        if option not in known:
            raise UnknownNameError(f"option of {kind} {name} called", option, known or ("(none)",))
        values[option] = _convert(text, known[option], f"{kind} {name} option {option}")
    return table[name](**values)


def _convert(text: str, annotation: Any, what: str) -> Any:
    # Fields are annotated with plain names; postponed evaluation leaves these as strings.
    kinds = {part.strip() for part in str(getattr(annotation, "__name__", annotation)).split("|")}
    if "None" in kinds and text.lower() == "none":
        return None
    for convert in (int, float):
        if convert.__name__ in kinds:
            try:
                return convert(text)
            except ValueError:
                continue
    if "bool" in kinds and text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    if "str" in kinds:
        return text
    raise UsageError(f"{what} must be {' or '.join(sorted(kinds))}; got '{text}'.")
