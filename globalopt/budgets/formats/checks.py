"""What the formats share: reading numbers and names, and refusing what a format has no word for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from globalopt.budgets.budget_file import BudgetFile
from globalopt.errors import ArtefactError, UsageError


def whole_number(text: str, where: str) -> int:
    """A count as it is written; `ArtefactError` naming the place where it is none."""
    # Beyond 18 digits it is no count of anything, and Python refuses to read thousands of them.
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise ArtefactError(f"{where}: '{text[:40]}' is no whole number of 0 or more.")
    return int(text)


def parse_json(text: str) -> Any:
    """JSON; `ArtefactError` where the text is none."""
    try:
        return json.loads(text)
    # ValueError: also a whole number of thousands of digits; RecursionError: brackets as deep.
    except (ValueError, RecursionError) as cause:
        raise ArtefactError(f"not valid JSON ({cause}).") from None


def refuse_rank(file: BudgetFile, what: str) -> None:
    """`UsageError` where a layer has rank, which `what` cannot carry."""
    ranked = [entry for entry in file.layers if entry.rank]
    if ranked:
        raise UsageError(
            f"{len(ranked)} layers have a low-rank part (the first {ranked[0].name}, rank {ranked[0].rank}), which "
            f"{what} cannot carry. Add --rank-as-nonzeros to keep their cost as nonzeros, or convert to csv."
        )


def check_names(names: Iterable[str], like: BudgetFile) -> None:
    """`ArtefactError` where the names are not those of the layers of `like`."""
    named, known = set(names), {entry.name for entry in like.layers}
    if missing := known - named:
        raise ArtefactError(f"it does not say anything of {len(missing)} layers, such as {min(missing)}.")
    if unknown := named - known:
        raise ArtefactError(f"it names '{min(unknown)}', which is no layer of the model.")
