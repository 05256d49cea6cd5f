"""Finished cells of a benchmark as one file each, found again by what they were measured on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from globalopt.errors import ArtefactError
from globalopt.runs.files import digest, read_json, write_json

T = TypeVar("T")


@dataclass(frozen=True)
class Cells:
    """A folder of cells; `common` is part of the identity of all of them."""

    folder: Path
    common: Mapping[str, Any]

    def get(self, kind: type[T], name: str, identity: Mapping[str, Any], compute: Callable[[], T]) -> T:
        """The dataclass of type `kind` that a cell of this identity holds; computed and written where there is none.

        Args:
            name: of the cell, for people who look into the folder.
        Raises:
            ArtefactError: the file is broken.
        """
        whole = {**self.common, **identity, "cell": name}
        readable = re.sub(r"[^\w.=-]+", "-", name)
        path = self.folder / f"{readable}.{digest(whole)[:12]}.json"
        if path.exists():
            record = read_json(path)
            try:
                if digest(record["identity"]) == digest(whole):
                    return TypeAdapter(kind).validate_python(record["outcome"])
            except (ValidationError, KeyError, TypeError) as cause:
                raise ArtefactError(f"{path} is no finished cell ({cause!r}). Delete it and run again.") from None
        outcome = compute()
        write_json(path, {"identity": whole, "outcome": TypeAdapter(kind).dump_python(outcome)})
        return outcome
