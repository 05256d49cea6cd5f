"""The cache of artefacts: every stage's folder is addressed by a hash of what made it, and shared by all runs.

A stage reads some inputs: the model, a text, options, artefacts of earlier stages. Its address is the hash of all of
them and of the version of its algorithm; artefacts of earlier stages enter by their own addresses. So a run that asks
for the same finds it, whichever run made it, and a changed input or version changes the address of the stage and of
every stage after it, and of none before.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from globalopt.errors import ArtefactError
from globalopt.runs.artefacts import Stage
from globalopt.runs.files import digest, read_json, remove_abandoned, write_json

FOLDER = "globalopt-cache"
"""Name of the cache beside the run folders."""

VARIABLE = "GLOBALOPT_CACHE"
"""Environment variable that names another folder for it."""

RECORD = "stage.json"
RUNNING = "running"
GATE = "gate"


@dataclass(frozen=True)
class Address:
    """Name what makes the artefacts of a stage.

    Args:
        stage: the computation; artefacts of one stage with other inputs lie elsewhere.
        version: of the algorithm, raised whenever its result changes.
        inputs: JSON-able; everything that decides the result. Earlier stages enter as their `digest`.

    >>> one, other = (Address(Stage.GRAMS, 1, {"windows": text}) for text in ("a", "b"))
    >>> one.digest == other.digest
    False
    """

    stage: Stage
    version: int
    inputs: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        """Hash of the stage, its version and its inputs."""
        return digest({"stage": self.stage, "version": self.version, **self.inputs})


@dataclass(frozen=True)
class Entry:
    """Describe one folder of the cache: the artefacts of a stage under one address.

    Args:
        model: what the model was called when the folder was made.
        bytes: of all files.
        used: when a run last opened it, seconds since 1970.

    >>> Entry(Path("cache/spans/0123"), Stage.SPANS, "my-model", 2**20, 0.0).stage.value
    'spans'
    """

    folder: Path
    stage: Stage
    model: str
    bytes: int
    used: float


class Cache:
    """Keep the artefacts of stages in folders by address.

    >>> cache = Cache(Path("globalopt-cache"))
    >>> folder = cache.open(Address(Stage.GRAMS, 1, {"windows": "a"}), model="my-model")
    >>> [(entry.stage.value, entry.model) for entry in cache.entries()]
    [('grams', 'my-model')]
    >>> cache.prune(cache.entries())
    >>> cache.entries()
    []
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def beside(cls, run: Path) -> Cache:
        """Return the cache for a run folder: where `GLOBALOPT_CACHE` says, else beside it."""
        return cls(Path(os.environ.get(VARIABLE) or run.absolute().parent / FOLDER))

    def path(self, address: Address) -> Path:
        """Return the folder of an address, whether it is there or not."""
        return self.folder / address.stage / address.digest[:24]

    def open(self, address: Address, model: str) -> Path:
        """Make the folder of an address if it is not there, and note that it is used; `ArtefactError` if it cannot be.

        Args:
            model: for people who look through the cache.
        """
        folder = self.path(address)
        record = folder / RECORD
        if not record.exists():
            inputs = {"version": address.version, "inputs": dict(address.inputs)}
            write_json(record, {"stage": address.stage, "digest": address.digest, "model": model, **inputs})
        with contextlib.suppress(OSError):
            os.utime(record)
        remove_abandoned(folder)
        return folder

    def entries(self) -> list[Entry]:
        """List all folders, by stage and then by time of last use; files that are not ours are passed over."""
        found = []
        for stage in Stage:
            for record in (self.folder / stage).glob(f"*/{RECORD}"):
                # Another process may delete entries meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    folder = record.parent
                    sizes = (path.stat().st_size for path in folder.rglob("*") if path.is_file())
                    found.append(Entry(folder, stage, _model(record), sum(sizes), record.stat().st_mtime))
        return sorted(found, key=lambda entry: (list(Stage).index(entry.stage), entry.used))

    def prune(self, entries: Iterable[Entry]) -> None:
        """Delete entries; `ArtefactError` while a run is using the cache, or if they cannot be deleted."""
        if not self.folder.is_dir():
            return
        with self._alone():
            if self._in_use():
                raise ArtefactError(
                    f"A run is using the cache {self.folder}. Wait until it has ended, or stop it first."
                )
            for entry in entries:
                try:
                    if entry.folder.is_dir():
                        # The record first: a folder without one is no entry, and what is left of it is made again.
                        (entry.folder / RECORD).unlink(missing_ok=True)
                        shutil.rmtree(entry.folder)
                except OSError as cause:
                    raise ArtefactError(f"Cannot delete {entry.folder}: {cause.strerror or cause}.") from None

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Keep others from pruning the cache while the body runs; a process that is killed no longer does."""
        path = self.folder / RUNNING / f"{os.getpid()}-{secrets.token_hex(4)}.lock"
        with self._alone():
            lock = FileLock(path)
            lock.acquire()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            lock.release()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Let no run begin and no one prune while the body runs: a run that begins meanwhile waits."""
        path = self.folder / RUNNING / GATE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path)
            lock.acquire()
        except OSError as cause:
            raise ArtefactError(
                f"Cannot write the cache {self.folder}: {cause.strerror or cause}. Choose another with --cache."
            ) from None
        try:
            yield
        finally:
            # While it is held: whoever waits for it sees that the file is gone, and takes a new one.
            path.unlink(missing_ok=True)
            lock.release()

    def _in_use(self) -> bool:
        for path in (self.folder / RUNNING).glob("*.lock"):
            try:
                with FileLock(path, timeout=0):
                    pass
            except Timeout:
                return True
            path.unlink(missing_ok=True)
        return False


def _model(record: Path) -> str:
    """The name of the model in a record; empty where the record is broken, so that its folder can be pruned still."""
    try:
        return str(read_json(record)["model"])
    except (ArtefactError, KeyError, TypeError):
        return ""


def older_than(entries: Iterable[Entry], seconds: float) -> list[Entry]:
    """Select the entries that no run has opened for so many seconds.

    >>> older_than([Entry(Path("x"), Stage.SPANS, "m", 1, used=0.0)], seconds=60) != []
    True
    """
    return [entry for entry in entries if time.time() - entry.used > seconds]
