"""The run folder: a manifest that says what made it, and the results that a user keeps.

Artefacts of the analysis and of refinement lie in the cache (`runs.cache`) while a run is at work; the solved layers
are linked into the run folder at its end, so that it is whole without the cache.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from globalopt.errors import ArtefactError
from globalopt.runs.artefacts import (
    CURVES,
    EMBEDDING,
    FAMILY,
    MATCHED_BLOCK,
    MATCHED_MODEL,
    SAMPLES,
    SOLVED_LAYER,
    SUMMARY,
    WINDOWS,
    Artefact,
    Stage,
    read_matched_layer,
    validated,
)
from globalopt.runs.files import digest, is_there, link_or_copy, read_json, read_metadata, remove_abandoned, write_json
from globalopt.runs.workspace import Workspace
from globalopt.values.decomposition import Decomposition, Trace
from globalopt.values.family import Family
from globalopt.values.layer import LayerSpec
from globalopt.values.layer_results import MatchResult
from globalopt.values.metrics import WindowLosses
from globalopt.values.results import Details, Summary

SCHEMA = 2
MANIFEST = "manifest.json"
LOCK = "run.lock"
ASKED = "asked.json"
"""What a finished run was asked: see `pipeline.finished`."""
WORK = "work"
"""Folder of the artefacts of a run that shares none."""

PUBLISHED = (Stage.SPECTRA, Stage.REFINEMENT, Stage.MODEL_MATCHING)
"""Stages whose artefacts a finished run holds itself: what reports and exports read."""

FILES = (
    "summary.json",
    "windows.json",
    "eval.json",
    "samples.json",
    "self-text.safetensors",
    "family.json",
    "budget.json",
    ASKED,
    LOCK,
    MANIFEST,
)
FOLDERS = ("report", "budgets", "model", "layers", "embeddings", "matched", "curves", WORK)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Keys whose values differ between two records; of nested records the inner keys, but of methods their place."""
    for key in dict.fromkeys((*old, *new)):
        before, after = old.get(key), new.get(key)
        if isinstance(after, Mapping) and isinstance(before, Mapping) and "class" not in after:
            yield from _differences(before, after)
        elif before != after:
            yield key


class Run(Workspace):
    """Hold the results of one run, under a manifest whose fingerprint covers everything that decides them.

    A folder with the same fingerprint is gone on with; one with another is refused.

    >>> with Run.start(Path("half"), {"seed": 0}, {"command": "globalopt search"}) as run:
    ...     run.budget_path.name
    'budget.json'
    >>> Run.open(Path("half")).manifest["identity"]
    {'seed': 0}
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        super().__init__(folder, dict.fromkeys((Stage.RESULT, *PUBLISHED), folder))
        self.manifest = dict(manifest)
        self._lock: FileLock | None = None

    @classmethod
    def start(cls, folder: Path, identity: Mapping[str, Any], facts: Mapping[str, Any], fresh: bool = False) -> Run:
        """Open `folder` to write a run, making or resuming it. No other process can until `close`, or this one ends.

        Args:
            identity: JSON-able; decides results (model, text, options, seed, algorithms). Its hash is the fingerprint.
            facts: JSON-able; recorded, but may differ on resume (versions, command line).
            fresh: delete an earlier run in the folder first.
        Raises:
            ArtefactError: the folder holds another run, or files that are no run at all, or another process writes it.
        """
        fingerprint = digest(identity)
        path = folder / MANIFEST
        cls.check_folder(folder)
        lock = cls._locked(folder)
        try:
            if fresh and path.exists():
                cls(folder, {}).delete()
            if path.exists():
                manifest = cls.read_manifest(folder)
                if manifest["fingerprint"] != fingerprint:
                    raise ArtefactError(_another(folder, manifest, identity))
            else:
                manifest = {
                    "schema": SCHEMA,
                    "fingerprint": fingerprint,
                    "identity": dict(identity),
                    "facts": dict(facts),
                }
                write_json(path, manifest)
            remove_abandoned(folder)
        except BaseException:
            _unlock(folder, lock)
            raise
        run = cls(folder, manifest)
        run._lock = lock
        return run

    @staticmethod
    def _locked(folder: Path) -> FileLock:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / LOCK, timeout=0)
            lock.acquire()
        except Timeout:
            raise ArtefactError(
                f"Another process is writing the run in {folder}. Wait until it has ended, or choose another --out."
            ) from None
        except OSError as cause:
            raise ArtefactError(f"Cannot write {folder}: {cause.strerror or cause}. Choose a writable --out.") from None
        return lock

    def close(self) -> None:
        """Let other processes write the run."""
        if self._lock is not None:
            _unlock(self.folder, self._lock)
            self._lock = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @classmethod
    def check_folder(cls, folder: Path) -> None:
        """Raise `ArtefactError` if no run can be in `folder`: it is a file, or holds files that are not a run's."""
        if not is_there(folder):
            return
        if not folder.is_dir():
            raise ArtefactError(f"--out {folder} is a file. Choose a folder.")
        if is_there(folder / MANIFEST):
            cls.read_manifest(folder)
            return
        try:
            names = [path.name for path in folder.iterdir()]
        except OSError as cause:
            raise ArtefactError(f"Cannot read {folder}: {cause.strerror or cause}. Choose another --out.") from None
        if any(not name.startswith(".") and name != LOCK for name in names):
            raise ArtefactError(f"{folder} is not empty and holds no run. Choose another --out.")

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Open an existing run for reading."""
        if not is_there(folder / MANIFEST):
            raise ArtefactError(
                f"{folder} holds no run (no {MANIFEST}). Give the folder that `globalopt search` wrote."
            )
        return cls(folder, cls.read_manifest(folder))

    @staticmethod
    def read_manifest(folder: Path) -> dict[str, Any]:
        """Read and check the manifest of a run folder."""
        manifest = read_json(folder / MANIFEST)
        kinds = {"schema": int, "fingerprint": str, "identity": dict}
        if not isinstance(manifest, dict) or any(not isinstance(manifest.get(k), kind) for k, kind in kinds.items()):
            raise ArtefactError(f"{folder / MANIFEST} is no manifest of a run. Choose another folder.")
        if manifest["schema"] > SCHEMA:
            raise ArtefactError(
                f"{folder} was written by a newer version (schema {manifest['schema']}, this one reads {SCHEMA}). "
                "Upgrade globalopt."
            )
        return manifest

    def delete(self) -> None:
        """Remove the run's files, the manifest last; files that are not ours stay, and so does the cache."""
        try:
            for name in (*FOLDERS, *(name for name in FILES if name != LOCK)):
                path = self.folder / name
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        except OSError as cause:
            raise ArtefactError(f"Cannot delete the run in {self.folder}: {cause.strerror or cause}.") from cause

    def publish(self, layers: Iterable[LayerSpec], blocks: int, embeddings: Iterable[str] = ()) -> None:
        """Link the artefacts of refinement from the cache into the run folder, which holds all of them from here on.

        Args:
            layers: of the model. blocks: how many there are. embeddings: names of those in few bits.
        """
        own = Workspace(self.folder, dict.fromkeys(PUBLISHED, self.folder))
        names = [*layers]
        found: list[tuple[Artefact[Any, Any], Any]] = [(SOLVED_LAYER, spec) for spec in names] + [
            (CURVES, spec.name) for spec in names
        ]
        found += [(MATCHED_BLOCK, block) for block in range(blocks)] + [(MATCHED_MODEL, None)]
        found += [(EMBEDDING, name) for name in embeddings]
        for artefact, key in found:
            if self.has(artefact, key) and not own.has(artefact, key):
                link_or_copy(self.path(artefact, key), own.path(artefact, key))
        self.folders.update(own.folders)

    # ------------------------------------------------------------------------------------------- paths

    @property
    def budget_path(self) -> Path:
        """The budget file."""
        return self.folder / "budget.json"

    def family_budget_path(self, kept: float) -> Path:
        """Return the budget file of one member of a family."""
        return self.folder / "budgets" / f"{kept:g}.json"

    @property
    def model_folder(self) -> Path:
        """The compressed model, whether it was saved or not."""
        return self.folder / "model"

    @property
    def saved_model(self) -> Path:
        """The compressed model; `ArtefactError` if the run has not come that far."""
        self._refuse_family()
        if not self.model_folder.is_dir():
            raise ArtefactError(f"{self.folder} has no model yet: the run did not finish. Run its command again.")
        return self.model_folder

    @property
    def report_folder(self) -> Path:
        """The tables and pictures."""
        return self.folder / "report"

    @property
    def journal_path(self) -> Path:
        """The evaluations of the objective."""
        return self.stage_folder(Stage.OBJECTIVE) / "journal.log"

    @property
    def training_path(self) -> Path:
        """The state of model matching, epoch by epoch."""
        return self.stage_folder(Stage.MODEL_MATCHING) / "matched" / "training.safetensors"

    # ------------------------------------------------------------------------------------------- reading

    def layer(self, spec: LayerSpec) -> Decomposition:
        """Return a layer as the model is saved with it: matched where that was done."""
        for path in (self.path(MATCHED_MODEL, None), self.path(MATCHED_BLOCK, spec.block)):
            if path.exists():
                return read_matched_layer(path, spec.name)
        return self.get(SOLVED_LAYER, spec).value

    def matches(self, blocks: int) -> tuple[MatchResult, ...]:
        """Return what matching did, of `blocks` blocks and of the model, where it was done."""
        keys = ("loss", "before", "after", "epochs", "kept_epoch", "seconds")
        places: list[tuple[int | None, Artefact[Any, Any], Any]] = [(None, MATCHED_MODEL, None)]
        places[:0] = [(block, MATCHED_BLOCK, block) for block in range(blocks)]
        found = []
        for block, artefact, key in places:
            if self.has(artefact, key):
                facts = read_metadata(self.path(artefact, key))
                found.append(MatchResult(block, **{name: facts[name] for name in keys}))
        return tuple(found)

    def summary(self) -> Summary:
        """Return the finished run's summary; `ArtefactError` if the run has not finished or the file is broken."""
        self._refuse_family()
        if not self.has(SUMMARY, None):
            raise ArtefactError(
                f"{self.folder} has no summary: the run did not finish. Run its command again to go on."
            )
        return self.get(SUMMARY, None)

    def window_losses(self) -> tuple[WindowLosses, ...]:
        """Return the losses of every window of the evaluation, one record per split; empty for a run that has none."""
        return self.find(WINDOWS, None) or ()

    def details(self, layers: Iterable[str]) -> Details:
        """Return what a report of the run shows beside its summary, of the `layers` by their names."""
        names = list(layers)
        curves = {name: found for name in names if (found := self.find(CURVES, name)) is not None}
        traces = {name: found for name in names if (found := self._trace(name))}
        return Details(curves, traces, self.find(SAMPLES, None))

    def _trace(self, layer: str) -> Trace:
        """Return how the solver's objective fell, of a layer by its name; empty where that was not written down."""
        path = self.stage_folder(Stage.REFINEMENT) / SOLVED_LAYER.folder / f"{layer}{SOLVED_LAYER.form.suffix}"
        return validated(path, Trace, read_metadata(path).get("trace", ())) if path.exists() else ()

    def family(self) -> Family:
        """Return the finished family; `ArtefactError` if there is none or the file is broken."""
        return self.get(FAMILY, None)

    def _refuse_family(self) -> None:
        if self.has(FAMILY, None):
            raise ArtefactError(
                f"{self.folder} holds a family of budgets, no single run: report it alone, or refine one of its "
                "budgets with globalopt compress --budget-file."
            )


def _unlock(folder: Path, lock: FileLock) -> None:
    """Release a lock and remove its file."""
    # While it is held: whoever waits for it sees that the file is gone, and takes a new one.
    with contextlib.suppress(OSError):
        (folder / LOCK).unlink()
    lock.release()


def _another(folder: Path, manifest: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """Say in what a run that is there differs from the one asked for."""
    changed = set(_differences(manifest["identity"], identity))
    algorithms = set(_differences(manifest["identity"].get("algorithms", {}), identity.get("algorithms", {})))
    again = "Choose another --out, or --fresh to delete it and start over; what is in the cache is used again."
    if changed == algorithms and changed:
        return f"{folder} holds a run of an earlier version (of {', '.join(sorted(changed))}). {again}"
    return f"{folder} holds another run (different {', '.join(sorted(changed)) or 'options'}). {again}"
