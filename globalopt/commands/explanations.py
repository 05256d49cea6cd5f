"""Read what the docstring of a method says: what it does, and what each of its options means."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, get_type_hints

from globalopt.registry import READERS

_ITEM = re.compile(r"^ {4}(\w[\w, ]*): (.*)$")
_SENTENCE = re.compile(r"(?<=[.])\s+(?=[A-Z`\"])|\n\n")
_CITED = re.compile(r" \([^()]*(?:arXiv|doi):[^()]*\)|,? \(?arXiv:[\d.]+\)?")


@dataclass(frozen=True)
class Explained:
    """Hold one option of a method, for a table.

    Args:
        takes: the words that it takes, or the kind of value.
        default: as it would be typed.
        meaning: a phrase; empty where the docstring has none.

    >>> from solvers import SOLVERS
    >>> options(SOLVERS["wanda"])[1].takes
    'none, rows, full'
    """

    name: str
    takes: str
    default: str
    meaning: str


def sentence(method: type[Any]) -> str:
    """Return the first sentence of a docstring, without the papers that it names and the marks of code.

    >>> from solvers import SOLVERS
    >>> sentence(SOLVERS["eora"])
    'Prune the weight to S, then compute the optimal L for that S.'
    """
    first = _SENTENCE.split(inspect.cleandoc(method.__doc__ or ""), maxsplit=1)[0]
    return _CITED.sub("", " ".join(first.split())).replace("`", "")


def options(method: type[Any]) -> list[Explained]:
    """List the options of a method, a dataclass, in the order of its fields.

    What a docstring does not explain is looked up in those of the classes that it is derived from.

    >>> from solvers import SOLVERS
    >>> [(option.name, option.default) for option in options(SOLVERS["wanda"])]
    [('per_row', 'true'), ('outputs', 'none')]
    """
    said = meanings(method)
    kinds = get_type_hints(method)
    return [Explained(f.name, _takes(kinds[f.name]), _typed(f.default), said.get(f.name, "")) for f in fields(method)]


def meanings(method: type[Any]) -> dict[str, str]:
    """Map the options that the docstrings of a class and its bases explain to the explanations.

    >>> from solvers import SOLVERS
    >>> sorted(meanings(SOLVERS["wanda"]))
    ['outputs', 'per_row']
    """
    found: dict[str, str] = {}
    for cls in reversed(method.__mro__):
        text = inspect.cleandoc(cls.__doc__ or "")
        found |= dict(_arguments(text.partition("\nArgs:\n")[2]))
    return found


def _arguments(text: str) -> Iterator[tuple[str, str]]:
    """Yield every option of an `Args:` section with its explanation; lines that are indented further go on."""
    names: list[str] = []
    words: list[str] = []
    for line in text.split("\n"):
        if found := _ITEM.match(line):
            yield from ((name, " ".join(words)) for name in names)
            names, words = re.split(r",\s*", found[1]), [found[2]]
        elif line.startswith(" " * 8):
            words.append(line.strip())
        elif line.strip():
            # The section ends: what follows are errors and examples.
            break
    yield from ((name, " ".join(words)) for name in names)


def _takes(kind: type) -> str:
    """Describe the values that an option takes."""
    return ", ".join(kind) if issubclass(kind, StrEnum) else READERS[kind][1]


def _typed(value: object) -> str:
    """Write a default as a user types it."""
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
