"""Checks that the formats share: of numbers, of names of layers, and of targets that a format cannot express."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from globalopt.budgets.budget_file import BudgetFile
from globalopt.errors import ArtefactError, UsageError


def whole_number(text: str, where: str) -> int:
    """Parse a count; `ArtefactError` naming the place `where` the text is none.

    >>> whole_number("128", "line 2, rank")
    128
    """
    # Beyond 18 digits it is no count of anything, and Python refuses to read thousands of them.
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise ArtefactError(f"{where}: '{text[:40]}' is no whole number of 0 or more.")
    return int(text)


def parse_json(text: str) -> Any:
    """Parse JSON; `ArtefactError` where the text is none.

    >>> parse_json('{"r": 8}')
    {'r': 8}
    """
    try:
        return json.loads(text)
    # ValueError: also a whole number of thousands of digits; RecursionError: brackets as deep.
    except (ValueError, RecursionError) as cause:
        raise ArtefactError(f"not valid JSON ({cause}).") from None


def refuse_rank(file: BudgetFile, what: str) -> None:
    """Check that no layer has rank; `UsageError` otherwise, as the format `what` cannot express it.

    >>> from globalopt.budgets.budget_file import without_rank
    >>> from globalopt.budgets.example import example_budget
    >>> refuse_rank(without_rank(example_budget()), "EvoPress")
    >>> refuse_rank(example_budget(), "EvoPress")
    Traceback (most recent call last):
    globalopt.errors.UsageError: 1 layers have a low-rank part (the first model.layers.0.mlp.up_proj, rank 1), ...
    """
    ranked = [entry for entry in file.layers if entry.rank]
    if ranked:
        raise UsageError(
            f"{len(ranked)} layers have a low-rank part (the first {ranked[0].name}, rank {ranked[0].rank}), which "
            f"{what} cannot carry. Add --rank-as-nonzeros to keep their cost as nonzeros, or convert to csv."
        )


def bits_left_out(file: BudgetFile, what: str) -> tuple[str, ...]:
    """Write the note on the bits of layers, which the format `what` does not hold; none where all have 16.

    >>> from globalopt.budgets.example import example_budget
    >>> bits_left_out(example_budget(), "PEFT")
    ()
    """
    few = sum(not entry.target.storage.plain for entry in file.layers)
    return (f"the bits of {few} layers, fewer than 16, are not in it: {what} knows of none.",) if few else ()


def bits_of_like(like: BudgetFile, what: str) -> tuple[str, ...]:
    """Write the note that bits are taken from the budget `like`; none where all of its layers have 16.

    >>> from globalopt.budgets.example import example_budget
    >>> bits_of_like(example_budget(), "PEFT")
    ()
    """
    few = any(not entry.target.storage.plain for entry in like.layers)
    return (f"the bits of the stored numbers are those of --like: {what} knows of none.",) if few else ()


def embeddings_left_out(file: BudgetFile, what: str) -> tuple[str, ...]:
    """Write the note on the embeddings that a budget counts, which no other format holds; none where it counts none.

    >>> from globalopt.budgets.example import example_budget
    >>> embeddings_left_out(example_budget(), "csv")
    ()
    """
    count = len(file.embeddings)
    return (f"the bits of {count} embeddings are not in it: {what} knows of none.",) if count else ()


def embeddings_of_like(like: BudgetFile, what: str) -> tuple[str, ...]:
    """Write the note that embeddings are taken from the budget `like`; none where it counts none.

    >>> from globalopt.budgets.example import example_budget
    >>> embeddings_of_like(example_budget(), "csv")
    ()
    """
    return (f"the embeddings are those of --like: {what} knows of none.",) if like.embeddings else ()


def check_names(names: Iterable[str], like: BudgetFile) -> None:
    """Check that `names` are the layers of `like`; `ArtefactError` otherwise.

    >>> from globalopt.budgets.example import example_budget
    >>> check_names(["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"], example_budget())
    """
    named, known = set(names), {entry.name for entry in like.layers}
    if missing := known - named:
        raise ArtefactError(f"it does not say anything of {len(missing)} layers, such as {min(missing)}.")
    if unknown := named - known:
        raise ArtefactError(f"it names '{min(unknown)}', which is no layer of the model.")
