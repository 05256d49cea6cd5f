"""Answers of the model to questions about targets, kept so that work that was killed asks none of them again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from globalopt.runs.artefacts import Artefact
from globalopt.runs.files import digest
from globalopt.runs.target_codec import encode_target
from globalopt.runs.workspace import Workspace
from globalopt.values.budget import Target

T = TypeVar("T")


def remembered(
    work: Workspace, artefact: Artefact[str, T], ask: Callable[[Mapping[str, Target]], T]
) -> Callable[[Mapping[str, Target]], T]:
    """Make a function that asks about targets once, and reads the answer back from then on.

    Args:
        artefact: kind of the answers; they are told apart by a hash of the targets.
        ask: what to ask about the targets of layers, by name. The answer may depend on nothing else, but for what the
            address of the artefact's stage holds.

    >>> from pathlib import Path
    >>> from globalopt.runs.artefacts import LOSSES_ALONE
    >>> answer = remembered(Workspace(Path("asked")), LOSSES_ALONE, lambda targets: print("asked") or {"up": 0.5})
    >>> answer({"up": Target(0, 2)})
    asked
    {'up': 0.5}
    >>> answer({"up": Target(0, 2)})
    {'up': 0.5}
    """

    def answer(targets: Mapping[str, Target]) -> T:
        question = digest({name: encode_target(target) for name, target in targets.items()})
        known = work.find(artefact, question)
        if known is None:
            known = ask(targets)
            work.put(artefact, question, known)
        return known

    return answer
