"""Open a run with its artefact cache, and report which artefacts of earlier runs it uses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from globalopt.analysis.solver_gap import sampled
from globalopt.models.layers import ModelLayers
from globalopt.pipeline.addresses import Addresses
from globalopt.pipeline.reporter import Reporter
from globalopt.pipeline.session import Session
from globalopt.runs.artefacts import (
    ALLOCATED,
    ANCHORS,
    CORRECTIONS,
    GRAM,
    METRIC_CHOICE,
    OUTPUT_GRAM,
    OWN_TEXT,
    PREDICTION,
    SOLVED_LAYER,
    SOLVER_GAP,
    SPAN,
    Artefact,
)
from globalopt.runs.cache import Cache
from globalopt.runs.folder import WORK, Run


@contextlib.contextmanager
def opened(
    session: Session, folder: Path, identity: Mapping[str, Any], command: str, cache: Cache | None, fresh: bool
) -> Iterator[tuple[Run, Callable[[Addresses], None]]]:
    """Open a run for writing; no other process can write it or prune its cache while the body runs.

    Args:
        folder: of the run.
        identity: all that decides the run's results; a run in `folder` with another identity is refused.
        command: command line, for the record.
        cache: shared artefacts of runs; None keeps them in a folder of the run.
        fresh: delete an earlier run in `folder`.
    Yields:
        The run, and a function that opens the cache folders of stages at their addresses.
    Raises:
        ArtefactError: the folder cannot be written, or holds another run.

    >>> from globalopt.pipeline.example import example_plan, example_session
    >>> session = example_session()
    >>> from globalopt.pipeline.addresses import search_addresses
    >>> from globalopt.runs.artefacts import Stage
    >>> with opened(session, Path("half"), {"seed": 0}, "globalopt search", Cache(Path("cache")), False) as (run, at):
    ...     at(search_addresses(session, example_plan()))
    ...     run.stage_folder(Stage.SPANS).parent
    PosixPath('cache/spans')
    """
    home = cache or Cache(folder / WORK)
    with Run.start(folder, identity, session.metadata(command), fresh) as run, home.used():

        def at(addresses: Addresses) -> None:
            run.folders.update({stage: home.open(address, session.name) for stage, address in addresses.items()})

        if session.own_text is not None and not run.has(OWN_TEXT, None):
            # An evaluation of the run reads it: the model that is evaluated would write another.
            run.put(OWN_TEXT, None, session.own_text)
        yield run, at


def note_reused(session: Session, reporter: Reporter, run: Run, addresses: Addresses) -> tuple[str, ...]:
    """Report which stages have all their artefacts already, and in which cache.

    Returns:
        the note, for the summary; none where nothing is used again.

    >>> import torch
    >>> from globalopt.pipeline.example import example_session
    >>> from reports import QuietProgress
    >>> session = example_session()
    >>> from globalopt.runs.artefacts import Stage
    >>> from globalopt.runs.cache import Address
    >>> from globalopt.values.metric import Gram
    >>> class Notes(QuietProgress):
    ...     def note(self, text):
    ...         print(text)
    >>> address = Address(Stage.GRAMS, 1, {"windows": "a"})
    >>> with opened(session, Path("half"), {"seed": 0}, "globalopt search", Cache(Path("cache")), False) as (run, at):
    ...     at({Stage.GRAMS: address})
    ...     for spec in session.layers.specs:
    ...         run.put(GRAM, spec.site, Gram(torch.eye(spec.d_in), 64))
    ...     notes = note_reused(session, Reporter(Notes()), run, {Stage.GRAMS: address})
    Used again from cache: grams.
    >>> notes
    ('Used again from cache: grams.',)
    """
    found = [
        artefact.stage
        for artefact, keys in _complete(session.layers)
        if artefact.stage in addresses and not run.missing(artefact, keys)
    ]
    if not found:
        return ()
    note = f"Used again from {run.stage_folder(found[0]).parent.parent}: {', '.join(found)}."
    reporter.note(note)
    return (note,)


def _complete(layers: ModelLayers) -> list[tuple[Artefact[Any, Any], Sequence[Any]]]:
    """List the artefacts of long stages, each with the keys of a complete stage."""
    specs = layers.specs
    return [
        (GRAM, list(dict.fromkeys(spec.site for spec in specs))),
        (OUTPUT_GRAM, specs),
        (SPAN, specs),
        (ANCHORS, specs),
        (METRIC_CHOICE, specs),
        (SOLVER_GAP, sampled(specs)),
        (PREDICTION, specs),
        (CORRECTIONS, [None]),
        (ALLOCATED, [None]),
        (SOLVED_LAYER, specs),
    ]
