"""Open a run with its artefact cache, and report which artefacts of earlier runs it uses."""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from globalopt.analysis.solver_gap import sampled
from globalopt.errors import ArtefactError
from globalopt.machine import ranks
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
from globalopt.runs.files import digest, write_json
from globalopt.runs.folder import WORK, Run

PATIENCE = 10.0
"""Seconds within which a disk of the network shows a file to all machines."""


@contextlib.contextmanager
def opened(
    session: Session, folder: Path, identity: Mapping[str, Any], command: str, cache: Cache | None, fresh: bool
) -> Iterator[tuple[Run, Callable[[Addresses], None]]]:
    """Open a run for writing; no other job can write it or prune its cache while the body runs.

    The processes of one job write it together: the writer makes its folders and holds their locks.

    Args:
        folder: of the run.
        identity: all that decides the run's results; a run in `folder` with another identity is refused.
        command: command line, for the record.
        cache: shared artefacts of runs; None keeps them in a folder of the run, as long as it reads them.
        fresh: delete an earlier run in `folder`.
    Yields:
        The run, and a function that opens the cache folders of stages at their addresses.
    Raises:
        ArtefactError: the folder cannot be written, or holds another run; or the processes of the job have different
            models or texts, or do not share the disk.

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
    ranks.check_alike(digest(identity), "model, text or version of a package")
    with contextlib.ExitStack() as stack:
        if ranks.writer():
            run = stack.enter_context(Run.start(folder, identity, session.metadata(command), fresh))
            stack.enter_context(home.used())
        check_shared([folder, home.folder])
        if not ranks.writer():
            run = Run.open(folder)
        run.shared = cache is not None

        def at(addresses: Addresses) -> None:
            if ranks.writer():
                for address in addresses.values():
                    home.open(address, session.name)
            run.folders.update({stage: home.path(address) for stage, address in addresses.items()})
            ranks.written(run)

        if session.own_text is not None and ranks.writer() and not run.has(OWN_TEXT, None):
            # An evaluation of the run reads it: the model that is evaluated would write another.
            run.put(OWN_TEXT, None, session.own_text)
        yield run, at


def check_shared(folders: Sequence[Path], patience: float = PATIENCE) -> None:
    """Raise `ArtefactError` where the processes of the job do not all see what the writer writes into some folders.

    Args:
        folders: that the writer can make.
        patience: seconds that a file of another machine may take to be seen.

    >>> check_shared([Path("run"), Path("cache")])
    """
    if not ranks.several():
        return
    token = ranks.told(f".shared-{secrets.token_hex(8)}.json")
    for folder in folders if ranks.writer() else ():
        write_json(folder / token, {})
    ranks.barrier()
    unseen = next((folder for folder in folders if not _seen(folder, token, patience)), None)
    found = ranks.gathered((unseen, socket.gethostname()))
    for folder in folders if ranks.writer() else ():
        (folder / token).unlink(missing_ok=True)
    for number, (lacking, host) in enumerate(found):
        if lacking is not None:
            raise ArtefactError(
                f"Process {number} (on {host}) does not see what process 0 (on {found[0][1]}) writes into {lacking}. "
                "All processes need the run folder and the cache on one disk: choose --out and --cache on one that all "
                "machines share."
            )


def _seen(folder: Path, name: str, patience: float) -> bool:
    """Tell whether a folder holds a file, or does within some seconds."""
    end = time.monotonic() + patience
    while True:
        with contextlib.suppress(OSError):
            if any(path.name == name for path in folder.iterdir()):
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.2)


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
