"""Open a run with its cache, and say which artefacts of earlier runs it uses."""

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
    GRAM,
    METRIC_CHOICE,
    OUTPUT_GRAM,
    PREDICTION,
    SINGLE_LAYER_LOSSES,
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
        cache: None keeps the artefacts in a folder of the run.
    Yields:
        the run, and a function that puts the artefacts of stages at their addresses.

    >>> from globalopt.pipeline.options import ModelOptions, SearchOptions, TextOptions
    >>> from globalopt.pipeline.plan import resolve
    >>> from globalopt.pipeline.reporter import Reporter
    >>> from globalopt.pipeline.session import set_up
    >>> from reports import QuietProgress
    >>> texts = TextOptions(nsamples=4, seqlen=16, eval_windows=2)
    >>> session = set_up(ModelOptions(), texts, seed=0, reporter=Reporter(QuietProgress()))
    >>> from globalopt.pipeline.addresses import search_addresses
    >>> from globalopt.runs.artefacts import Stage
    >>> with opened(session, Path("half"), {"seed": 0}, "globalopt search", Cache(Path("cache")), False) as (run, at):
    ...     at(search_addresses(session, resolve(SearchOptions(0.5))))
    ...     run.stage_folder(Stage.SPANS).parent
    PosixPath('cache/spans')
    """
    home = cache or Cache(folder / WORK)
    with Run.start(folder, identity, session.metadata(command), fresh) as run, home.used():

        def at(addresses: Addresses) -> None:
            run.folders.update({stage: home.open(address, session.name) for stage, address in addresses.items()})

        yield run, at


def note_reused(session: Session, reporter: Reporter, run: Run, addresses: Addresses) -> None:
    """Say which stages have all their artefacts already, and where these are.

    >>> from globalopt.pipeline.options import ModelOptions, SearchOptions, TextOptions
    >>> from globalopt.pipeline.plan import resolve
    >>> from globalopt.pipeline.reporter import Reporter
    >>> from globalopt.pipeline.session import set_up
    >>> from reports import QuietProgress
    >>> texts = TextOptions(nsamples=4, seqlen=16, eval_windows=2)
    >>> session = set_up(ModelOptions(), texts, seed=0, reporter=Reporter(QuietProgress()))
    >>> from globalopt.runs.artefacts import Stage
    >>> from globalopt.runs.cache import Address
    >>> from globalopt.values.metric import Gram
    >>> class Notes(QuietProgress):
    ...     def note(self, text):
    ...         print(text)
    >>> import torch
    >>> address = Address(Stage.GRAMS, 1, {"windows": "a"})
    >>> with opened(session, Path("half"), {"seed": 0}, "globalopt search", Cache(Path("cache")), False) as (run, at):
    ...     at({Stage.GRAMS: address})
    ...     for spec in session.layers.specs:
    ...         run.put(GRAM, spec.site, Gram(torch.eye(spec.d_in), 64))
    ...     note_reused(session, Reporter(Notes()), run, {Stage.GRAMS: address})
    Used again from cache: grams.
    """
    found = [
        artefact.stage
        for artefact, keys in _complete(session.layers)
        if artefact.stage in addresses and not run.missing(artefact, keys)
    ]
    if found:
        cache = run.stage_folder(found[0]).parent.parent
        reporter.note(f"Used again from {cache}: {', '.join(found)}.")


def _complete(layers: ModelLayers) -> list[tuple[Artefact[Any, Any], Sequence[Any]]]:
    """The artefacts of the stages that take long, with the keys that they have when a stage is complete."""
    specs = layers.specs
    return [
        (GRAM, list(dict.fromkeys(spec.site for spec in specs))),
        (OUTPUT_GRAM, specs),
        (METRIC_CHOICE, specs),
        (SPAN, specs),
        (ANCHORS, specs),
        (SOLVER_GAP, sampled(specs)),
        (SINGLE_LAYER_LOSSES, specs),
        (PREDICTION, specs),
        (ALLOCATED, [None]),
        (SOLVED_LAYER, specs),
    ]
