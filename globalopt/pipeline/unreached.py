"""Say which linear layers the loss does not reach, and which ones no token of the calibration text reached."""

from __future__ import annotations

from globalopt.models.coverage import UNREACHED
from globalopt.models.layers import ModelLayers
from globalopt.models.refusals import shown
from globalopt.runs.artefacts import SOLVED_LAYER
from globalopt.runs.files import read_metadata
from globalopt.runs.folder import Run
from globalopt.values.layer import LayerSpec


def left_dense(layers: ModelLayers) -> list[str]:
    """Say which linear layers of the blocks stay dense, as the loss does not reach them: one line, or none.

    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> left_dense(find_layers(tiny_llama()))
    []
    """
    if not layers.apart:
        return []
    share = layers.coverage.skipped[UNREACHED] / layers.coverage.block_params
    return [
        f"{len(layers.apart)} linear layers, {share:.1%} of the block parameters, stay dense, as no gradient of the "
        f"loss goes through their output: {shown(layers.apart)}."
    ]


def without_tokens(run: Run, layers: ModelLayers) -> list[str]:
    """Say which layers no calibration token reached, in a run that was refined, and what was done: one line, or none.

    >>> from pathlib import Path
    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.reference.tiny import tiny_llama
    >>> with Run.start(Path("run"), {}, {}) as run:
    ...     without_tokens(run, find_layers(tiny_llama()))
    []
    """
    names = [spec.name for spec in layers.specs if not _tokens(run, spec)]
    if not names:
        return []
    return [
        f"No calibration token reached {len(names)} layers ({shown(names)}): inputs and losses of like layers of the "
        "same block stood in for theirs. More text (--nsamples), or text more like that of use, would tell more."
    ]


def _tokens(run: Run, spec: LayerSpec) -> int:
    """Return the number of tokens that the Grams of a solved layer are from; 1 for a layer that does not say."""
    path = run.path(SOLVED_LAYER, spec)
    return read_metadata(path).get("tokens", 1) if path.exists() else 1
