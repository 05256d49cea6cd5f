"""The artefacts of a run by stage: read, written, and looked for by their rows of the table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from globalopt.runs.artefacts import Artefact, Stage
from globalopt.runs.files import read_metadata, write_tensors

K = TypeVar("K")
T = TypeVar("T")


class Workspace:
    """Read and write the artefacts of a run.

    Args:
        folder: stages that are not among `folders` have one of their own in it.
        folders: folder of a stage.
        shared: whether other runs may read the artefacts too.

    >>> from globalopt.runs.artefacts import SOLVER_GAP
    >>> from globalopt.values.budget import Target
    >>> from globalopt.values.layer import LayerSpec
    >>> spec, work = LayerSpec("up", 0, "in", "up", 2, 2), Workspace(Path("work"))
    >>> work.missing(SOLVER_GAP, [spec]) == [spec]
    True
    >>> work.put(SOLVER_GAP, spec, {Target(0, 2): 0.8})
    >>> work.get(SOLVER_GAP, spec)
    {Target(rank=0, nnz=2): 0.8}
    """

    def __init__(self, folder: Path, folders: Mapping[Stage, Path] | None = None, shared: bool = True) -> None:
        self.folder = folder
        self.folders = dict(folders or {})
        self.shared = shared

    def stage_folder(self, stage: Stage) -> Path:
        """Return the folder in which the artefacts of a stage lie."""
        return self.folders.get(stage, self.folder / stage)

    def path(self, artefact: Artefact[K, T], key: K) -> Path:
        """Return the file of an artefact, whether it is there or not."""
        name = artefact.key.name(key) + artefact.form.suffix
        return self.stage_folder(artefact.stage) / artefact.folder / name

    def has(self, artefact: Artefact[K, T], key: K) -> bool:
        """Tell whether the artefact was written."""
        return self.path(artefact, key).exists()

    def missing(self, artefact: Artefact[K, T], keys: Iterable[K]) -> list[K]:
        """Return the keys of which there is no artefact yet."""
        return [key for key in keys if not self.has(artefact, key)]

    def put(self, artefact: Artefact[K, T], key: K, value: T) -> None:
        """Write an artefact, whole or not at all."""
        artefact.form.write(self.path(artefact, key), key, artefact.key.record(key), value)

    def get(self, artefact: Artefact[K, T], key: K) -> T:
        """Read an artefact; `ArtefactError` if it is missing, broken, or of another key."""
        return artefact.form.read(self.path(artefact, key), key, artefact.key.record(key))

    def find(self, artefact: Artefact[K, T], key: K) -> T | None:
        """Read an artefact; None if it was not written."""
        return self.get(artefact, key) if self.has(artefact, key) else None

    def discard(self, artefact: Artefact[K, Any], keys: Iterable[K]) -> None:
        """Delete artefacts that this run reads no more, unless they are shared; those that are missing are passed over.

        >>> from globalopt.runs.artefacts import SOLVER_GAP
        >>> from globalopt.values.layer import LayerSpec
        >>> spec, work = LayerSpec("up", 0, "in", "up", 2, 2), Workspace(Path("alone"), shared=False)
        >>> work.put(SOLVER_GAP, spec, {})
        >>> work.discard(SOLVER_GAP, [spec])
        >>> work.has(SOLVER_GAP, spec)
        False
        """
        if not self.shared:
            for key in keys:
                self.path(artefact, key).unlink(missing_ok=True)

    def discard_tensors(self, artefact: Artefact[K, Any], keys: Iterable[K]) -> None:
        """Delete the tensors of artefacts whose metadata alone this run reads from now on, unless they are shared.

        >>> import torch
        >>> from globalopt.runs.artefacts import SOLVED_LAYER
        >>> from globalopt.runs.records import SolvedLayer
        >>> from globalopt.values.decomposition import Decomposition
        >>> from globalopt.values.layer import LayerSpec
        >>> spec, work = LayerSpec("up", 0, "in", "up", 2, 2), Workspace(Path("alone"), shared=False)
        >>> value = Decomposition(torch.eye(2), torch.zeros(2, 0), torch.zeros(0, 2))
        >>> work.put(SOLVED_LAYER, spec, SolvedLayer(value, {"status": "converged"}))
        >>> work.discard_tensors(SOLVED_LAYER, [spec])
        >>> read_metadata(work.path(SOLVED_LAYER, spec))["status"]
        'converged'
        """
        if not self.shared:
            for key in keys:
                path = self.path(artefact, key)
                write_tensors(path, {}, read_metadata(path))

    def refresh(self) -> None:
        """List the folders of all stages, so that a disk of the network shows what other machines have written."""
        for folder in {self.folder, *self.folders.values()}:
            for _ in folder.rglob("*"):
                pass
