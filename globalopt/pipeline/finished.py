"""Recognise a finished run that is asked for again, without loading its model or its text.

A run is known by its identity, of which the hashes of weights and windows are part, and these need the model and the
text. Where the same was asked for with the same files before, as their names, sizes and times tell, the identity is the
same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from globalopt.pipeline.addresses import algorithms
from globalopt.pipeline.options import REFERENCE, ModelOptions, TextOptions
from globalopt.reference import reference_folder
from globalopt.runs.artefacts import SUMMARY
from globalopt.runs.files import digest, read_json, write_json
from globalopt.runs.folder import ASKED, Run
from globalopt.values.results import Summary


def question(
    record: Mapping[str, Any], models: ModelOptions, texts: TextOptions, files: Iterable[Path] = ()
) -> str | None:
    """Hash what a command is asked for: its options, and the names, sizes and times of the files that it reads.

    Args:
        record: of the plan.
        files: read beside model and text.
    Returns:
        None where something is not on this disk: what a hub has may have changed.

    >>> asked = question({"budget": 0.5}, ModelOptions(), TextOptions())
    >>> asked == question({"budget": 0.5}, ModelOptions(), TextOptions())
    True
    >>> question({"budget": 0.5}, ModelOptions("meta-llama/Llama-3.2-1B"), TextOptions()) is None
    True
    """
    named = [models.model, *(part.spec for part in texts.parts if not part.own), texts.eval_text, texts.prompts]
    places = [reference_folder() if name in (None, REFERENCE) else Path(str(name)).expanduser() for name in named]
    found: dict[str, Any] = {}
    for place in (*places, *files):
        if not place.exists():
            return None
        found[str(place.resolve())] = list(_states(place))
    return digest(
        {
            "record": record,
            "algorithms": algorithms(),
            "model": asdict(models),
            "text": asdict(texts),
            "files": found,
        }
    )


def finished(folder: Path, asked: str | None) -> tuple[Summary, Run] | None:
    """Read the results of a run that is finished and was asked the same; None if there is no such run.

    >>> finished(Path("nothing"), "0123") is None
    True
    """
    place = folder / ASKED
    if asked is None or not place.exists() or read_json(place) != asked:
        return None
    run = Run.open(folder)
    if not (run.has(SUMMARY, None) and run.model_folder.exists()):
        return None
    return run.summary(), run


def remember(folder: Path, asked: str | None) -> None:
    """Note in the folder of a finished run what it was asked.

    >>> remember(Path("."), None)
    """
    if asked is not None:
        write_json(folder / ASKED, asked)


def _states(place: Path) -> Iterator[tuple[str, int, int]]:
    """List name, size and time of change of a file, or of all files in a folder."""
    files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    for path in files:
        state = path.stat()
        yield str(path.relative_to(place)), state.st_size, state.st_mtime_ns
