"""Format factors: the parts of every layer as plain tensors, for research.

    layers.json                     shape, rank, nonzeros, pattern and signs of every layer
    layers/NAME.safetensors         values (nnz,), support (d_out, d_in) bool, U (d_out, rank), V (rank, d_in), and
                                    signs (d_out, d_in) int8 of +-1 where there are some
    rest.safetensors                every other tensor of the model, by its name
    config.json, tokenizer files    as in an ordinary checkpoint

`S = zeros(d_out, d_in); S[support] = values`, and the weight is `S + U V`, or `S + (U V) * signs`. GPT-2's `Conv1D`
stores the transpose of the weight.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from globalopt.errors import ArtefactError, NumericalError
from globalopt.export.source import check_out, read_source
from globalopt.models.origin import CONFIG, keep_side_files
from globalopt.runs.files import read_json, read_tensors, replacing, write_json, write_tensors
from globalopt.values.decomposition import Decomposition

LAYERS, REST = "layers.json", "rest.safetensors"


def export_factors(run: Path, folder: Path, trust_remote_code: bool = False) -> None:
    """Export the parts of every layer of a finished run, and the rest of its model, to `folder`.

    Raises:
        ArtefactError: the run is missing, unfinished or broken, or `folder` holds something.

    >>> from globalopt.export.example import example_run
    >>> export_factors(example_run(), Path("exported"))
    >>> len(list(Path("exported/layers").iterdir()))
    14
    """
    check_out(folder)
    source = read_source(run, trust_remote_code)
    model = source.loaded.model
    records: dict[str, dict[str, Any]] = {}
    with replacing(folder) as staging:
        staging.mkdir()
        for spec, value in source.values():
            pattern = source.patterns[spec.name]
            records[spec.name] = {
                "d_out": spec.d_out,
                "d_in": spec.d_in,
                "rank": value.rank,
                "nnz": value.nnz,
                "pattern": str(pattern) if pattern else None,
                "signs": value.signs is not None,
            }
            write_tensors(staging / "layers" / f"{spec.name}.safetensors", _tensors(value))
        write_json(staging / LAYERS, records)
        weights = {f"{spec.name}.weight" for spec in source.layers.specs}
        # Tied tensors are written under each of their names: a reader need not know which are tied.
        rest = {name: source.tensor(name).clone() for name in model.state_dict() if name not in weights}
        write_tensors(staging / REST, rest)
        saved = source.run.saved_model
        shutil.copyfile(saved / CONFIG, staging / CONFIG)
        keep_side_files(staging, saved, None)
        source.write_card(staging, "factors")


def read_factors(folder: Path) -> Iterator[tuple[str, Decomposition]]:
    """Read every layer of an export, with its name.

    Raises:
        ArtefactError: a file is missing or broken, or does not fit the others.

    >>> from globalopt.export.example import example_run
    >>> export_factors(example_run(Path("another run")), Path("read"))
    >>> name, value = next(read_factors(Path("read")))
    >>> name, value.rank, tuple(value.S.shape)
    ('model.layers.0.self_attn.q_proj', 1, (16, 16))
    """
    records = read_json(folder / LAYERS)
    if not isinstance(records, dict):
        raise ArtefactError(f"{folder / LAYERS} describes no layers. Export the run again.")
    for name, record in records.items():
        path = folder / "layers" / f"{name}.safetensors"
        if Path(path.name).name != f"{name}.safetensors":
            raise ArtefactError(f"{folder / LAYERS} names {name}, which is outside the folder; it is not opened.")
        tensors, _ = read_tensors(path)
        try:
            yield name, _value(tensors, (record["d_out"], record["d_in"]), record["rank"])
        except (KeyError, TypeError, RuntimeError, ValueError, IndexError, NumericalError):
            raise ArtefactError(f"{path} does not hold the layer that {folder / LAYERS} describes.") from None


def _tensors(value: Decomposition) -> dict[str, Tensor]:
    """Split a decomposition into the tensors of its file."""
    support = value.S != 0
    found = {"values": value.S[support], "support": support, "U": value.U, "V": value.V}
    return found if value.signs is None else {**found, "signs": value.signs.to(torch.int8)}


def _value(tensors: dict[str, Tensor], shape: tuple[int, int], rank: int) -> Decomposition:
    """Make the decomposition of stored tensors; `ValueError` or what torch raises where they do not fit."""
    support, values = tensors["support"], tensors["values"]
    if support.shape != shape or support.dtype != torch.bool or values.shape != (int(support.sum()),):
        raise ValueError
    S = values.new_zeros(shape)
    S[support] = values
    signs = tensors["signs"].to(S.dtype) if "signs" in tensors else None
    value = Decomposition(S, tensors["U"], tensors["V"], signs)
    if value.rank != rank:
        raise ValueError
    return value
