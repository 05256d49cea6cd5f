"""Format factors: the parts of every layer as plain tensors, for research.

    layers.json                     shape, rank, nonzeros, pattern and signs of every layer; storage and dtype where
                                    numbers are stored as codes
    layers/NAME.safetensors         values (nnz,), support (d_out, d_in) bool, U (d_out, rank), V (rank, d_in), and
                                    signs (d_out, d_in) int8 of +-1 where there are some
    rest.safetensors                every other tensor of the model, by its name
    config.json, tokenizer files    as in an ordinary checkpoint

`S = zeros(d_out, d_in); S[support] = values`, and the weight is `S + U V`, or `S + (U V) * signs`. GPT-2's `Conv1D`
stores the transpose of the weight.

Where the storage of values or factors is `bits` below 16, values, or U and V, are codes in uint8, a byte each, of the
same shapes, and beside each is `PART_scales` in bfloat16: a scale for 64 consecutive numbers of the values, of `Uᵀ`
and of `V`, in row-major order. The numbers are `(code - 2^(bits-1) + 1/2) scale`, rounded to the dtype of the layer.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from globalopt.errors import ArtefactError, GlobalOptError
from globalopt.export.codes import SCALE_BITS, decode_codes, grid_codes
from globalopt.export.shape import SCALES
from globalopt.export.source import check_out, read_source
from globalopt.kernels.grid import SCALE
from globalopt.models.device import DTYPES
from globalopt.models.origin import CONFIG, keep_side_files
from globalopt.runs.files import read_json, read_tensors, replacing, write_json, write_tensors
from globalopt.values.decomposition import Decomposition
from globalopt.values.storage import Scales, Storage

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
            if not value.storage.plain:
                dtype = str(value.S.dtype).removeprefix("torch.")
                records[spec.name] |= {"storage": str(value.storage), "dtype": dtype}
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
            yield name, _value(_decoded(tensors, record), (record["d_out"], record["d_in"]), record["rank"])
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, IndexError, GlobalOptError):
            raise ArtefactError(f"{path} does not hold the layer that {folder / LAYERS} describes.") from None


def _tensors(value: Decomposition) -> dict[str, Tensor]:
    """Split a decomposition into the tensors of its file."""
    support = value.S != 0
    found = {"values": value.S[support], "support": support, "U": value.U, "V": value.V}
    if value.signs is not None:
        found["signs"] = value.signs.to(torch.int8)
    if value.scales is not None:
        for part, scales in (("values", value.scales.S), ("U", value.scales.U), ("V", value.scales.V)):
            bits = value.storage.values if part == "values" else value.storage.factors
            if bits < 16 and scales is not None:
                ordered = _in_groups(part, found[part])
                codes = grid_codes(ordered.flatten(), scales, bits).view(ordered.shape)
                found |= {part: _in_groups(part, codes).contiguous(), part + SCALES: scales.to(SCALE)}
    return found


def _in_groups(part: str, numbers: Tensor) -> Tensor:
    """Arrange the numbers of a part so that its groups follow the rows, or arrange them so back."""
    return numbers.mT if part == "U" else numbers


def _decoded(tensors: dict[str, Tensor], record: dict[str, Any]) -> dict[str, Any]:
    """Replace codes by the numbers that they stand for, and their scales by those of a decomposition."""
    if "storage" not in record:
        return dict(tensors)
    storage, dtype = Storage.parse(record["storage"]), DTYPES[record["dtype"]]
    found: dict[str, Any] = dict(tensors)
    scales: dict[str, Tensor | None] = {"values": None, "U": None, "V": None}
    for part in scales:
        bits = storage.values if part == "values" else storage.factors
        codes = _in_groups(part, tensors[part])
        if bits == 16 or not codes.numel():
            found[part] = tensors[part].to(dtype)
            continue
        if codes.dtype != torch.uint8 or int(codes.max()) >= 2**bits:
            raise ValueError
        each = tensors[part + SCALES]
        numbers = decode_codes(codes.flatten(), each.to(SCALE).view(SCALE_BITS), bits, dtype)
        found[part], scales[part] = _in_groups(part, numbers.view(codes.shape)).contiguous(), each.float()
    return {**found, "scales": Scales(storage, *scales.values())}


def _value(tensors: dict[str, Any], shape: tuple[int, int], rank: int) -> Decomposition:
    """Make the decomposition of stored tensors; `ValueError` or what torch raises where they do not fit."""
    support, values = tensors["support"], tensors["values"]
    if support.shape != shape or support.dtype != torch.bool or values.shape != (int(support.sum()),):
        raise ValueError
    S = values.new_zeros(shape)
    S[support] = values
    signs = tensors["signs"].to(S.dtype) if "signs" in tensors else None
    value = Decomposition(S, tensors["U"], tensors["V"], signs, tensors.get("scales"))
    if value.rank != rank:
        raise ValueError
    return value
