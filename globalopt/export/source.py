"""Read the layers of a finished run and the model it saved, for exports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from globalopt.embeddings.coding import decode_matrix
from globalopt.errors import ArtefactError
from globalopt.export.card import write_card
from globalopt.models.device import DTYPES
from globalopt.models.finding import find_layers
from globalopt.models.layers import ModelLayers
from globalopt.models.loading import LoadedModel, load_model
from globalopt.runs.artefacts import EMBEDDING, SOLVED_LAYER, SUMMARY
from globalopt.runs.files import is_there, read_json, remove_abandoned_beside
from globalopt.runs.folder import Run
from globalopt.values.decomposition import Decomposition
from globalopt.values.embeddings import CodedMatrix, Embedding
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.results import Summary

# The saved weight is the sum rounded once, or twice where the model computed in another type.
_ROUNDINGS = 4


@dataclass(frozen=True, eq=False)
class Source:
    """Hold a finished run, with its saved model on the CPU in its stored dtype; loaded lazily if it does not fit.

    Args:
        patterns: of `S`, by layer name; None for unstructured.
        summary: of the run.

    >>> from globalopt.export.example import example_run
    >>> source = read_source(example_run())
    >>> spec, value = next(source.values())
    >>> spec.name, value.rank, source.dtype
    ('model.layers.0.self_attn.q_proj', 1, torch.float32)
    """

    run: Run
    loaded: LoadedModel
    layers: ModelLayers
    patterns: Mapping[str, NM | None]
    summary: Summary

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model is stored in."""
        return self.loaded.checkpoint_dtype

    def values(self) -> Iterator[tuple[LayerSpec, Decomposition]]:
        """Iterate over the layers with their decompositions in the stored dtype, in model order.

        Raises:
            ArtefactError: a layer's artefact is missing, broken, or does not sum to the weight of the saved model.
        """
        for spec in self.layers.specs:
            value = self.run.layer(spec)
            shape = (spec.d_out, spec.d_in)
            weight = self.layers.weight(spec.name)
            scale = float(weight.abs().max())
            if value.S.shape != shape or float((value.dense() - weight).abs().max()) > scale * self._precision:
                path = self.run.path(SOLVED_LAYER, spec)
                raise ArtefactError(
                    f"{path} does not make up the weight in {self.run.model_folder}: they are of different runs. "
                    "Delete both folders and run the command again."
                )
            S, U, V = (part.to(self.dtype) for part in (value.S, value.U, value.V))
            yield spec, Decomposition(S, U, V, value.signs, value.scales)

    def embeddings(self) -> Iterator[tuple[Embedding, CodedMatrix]]:
        """Iterate over the embeddings that the run stores in few bits, with their codes.

        Raises:
            ArtefactError: the codes are missing or broken, or are not those of the saved model.
        """
        for each in self.summary.embeddings:
            if each.bits == 16:
                continue
            coded, weight = self.run.get(EMBEDDING, each.name), self.tensor(f"{each.name}.weight")
            decoded = decode_matrix(coded, self.dtype) if (coded.rows, coded.width) == tuple(weight.shape) else None
            scale = float(weight.abs().max())
            if decoded is None or float((decoded.float() - weight.float()).abs().max()) > scale * self._precision:
                raise ArtefactError(
                    f"{self.run.path(EMBEDDING, each.name)} does not make up the weight in {self.run.model_folder}: "
                    "they are of different runs. Delete both folders and run the command again."
                )
            yield each, coded

    def tensor(self, name: str) -> Tensor:
        """Read a parameter or buffer of the saved model, also of a block that is not in memory."""
        lazy = self.layers.lazy
        if lazy is not None and lazy.has(name):
            return lazy.read(name)
        path, _, leaf = name.rpartition(".")
        return getattr(self.loaded.model.get_submodule(path), leaf).detach()

    def write_card(self, folder: Path, form: str) -> None:
        """Write the model card and the budget file of the run to an export (`globalopt.export.card.write_card`)."""
        write_card(folder, self.run, self.summary, self.run.saved_model, form)

    @property
    def _precision(self) -> float:
        """Largest difference between a saved weight and the sum of its parts, relative to the largest weight."""
        return _ROUNDINGS * torch.finfo(self.dtype).eps


def read_source(folder: Path, trust_remote_code: bool = False) -> Source:
    """Open a finished run for export.

    Raises:
        ArtefactError: the folder holds no run, an unfinished one or a family of budgets, or its model is broken.

    >>> from globalopt.export.example import example_run
    >>> len(read_source(example_run(Path("another run"))).patterns)
    14
    """
    run = Run.open(folder)
    summary = run.summary()
    # The dtype "auto" would mean float32 on a CPU.
    stored = read_json(run.saved_model / "config.json").get("dtype")
    dtype = stored if stored in DTYPES else "auto"
    loaded = load_model(run.saved_model, dtype, "cpu", trust_remote_code)
    # `load_model` turns the cache off; an exported model is to be served.
    loaded.model.config.use_cache = True
    layers = find_layers(loaded.model, allow_low_coverage=True)
    patterns = {layer.name: NM.parse(layer.pattern) if layer.pattern else None for layer in summary.layers}
    if patterns.keys() != {spec.name for spec in layers.specs}:
        raise ArtefactError(
            f"{run.path(SUMMARY, None)} and {run.model_folder} are of different models. Run the command again."
        )
    return Source(run, loaded, layers, patterns, summary)


def check_out(folder: Path) -> None:
    """Check that an export can be written to `folder`; `ArtefactError` if it exists and is not empty.

    What an export to the same folder left behind when it was killed is removed.

    >>> check_out(Path("exported"))
    """
    try:
        full = is_there(folder) and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as cause:
        raise ArtefactError(f"Cannot read {folder}: {cause.strerror or cause}. Choose another --out.") from None
    if full:
        raise ArtefactError(f"{folder} exists and is not empty; choose another --out.")
    remove_abandoned_beside(folder)
