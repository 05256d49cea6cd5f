"""Format packed: a checkpoint of the kept values alone, which transformers loads once `globalopt` is imported.

For a packed layer NAME the checkpoint holds, in place of its weight (see `packing`, `codes` and `linear`):

    NAME.weight    (values,)    the values of S; 1-D, so that a loader that does not know the format stops at the shape
    NAME.support   uint8        their positions
    NAME.U, NAME.V              the factors, where there is rank
    NAME.signs     uint8        SLaB's plane, one bit per weight

All values are in the dtype of the run's model. Where the run stores numbers in less than 16 bits, the format is
version 2, and such a part consists of

    NAME.weight, NAME.U or NAME.V   uint8, 1-D   codes, ceil(n bits / 8) bytes for n numbers
    the same with `_scales`         int16        the bits of a bfloat16 for every 64 numbers

with `x = (code - 2^(bits-1) + 1/2) scale`: of `S` its nonzeros in row-major order, of `U` its columns one after the
other, of `V` its rows. An empty `S` has no value in version 2.

Where the run stores the token embedding in few bits, the format is version 3, and `embedding` says what it consists of;
a head with a matrix of its own is then a packed layer too.

A layer that packing does not make smaller stays dense. `config.json` describes the layers under `quantization_config`,
and stops loaders that do not know the format (`guard`); the header of every weight file holds digests of tensors and
configs (`seal`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from globalopt.embeddings.coding import decode_matrix
from globalopt.errors import ArtefactError, GlobalOptError, UnknownNameError, one_line
from globalopt.export import guard, seal
from globalopt.export.embedding import EmbeddingShape, pack_embedding
from globalopt.export.linear import AUTO, COMPUTES, SparseLowRankLinear
from globalopt.export.quantizer import METHOD, SparseLowRankConfig, SparseLowRankQuantizer, set_compute
from globalopt.export.registration import register
from globalopt.export.shape import shape_of
from globalopt.export.source import Source, check_out, read_source
from globalopt.models.device import DTYPES, resolve_device
from globalopt.models.origin import GENERATION_CONFIG, keep_side_files
from globalopt.models.quiet import quiet
from globalopt.runs.files import read_json, replacing
from globalopt.values.decomposition import Decomposition
from globalopt.values.storage import Scales, Storage

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"


def export_packed(run: Path, folder: Path, trust_remote_code: bool = False) -> None:
    """Export the model of a finished run packed to `folder`, with its tokenizer.

    Raises:
        ArtefactError: the run is missing, unfinished or broken, or `folder` holds something.

    >>> from globalopt.export.example import example_run
    >>> export_packed(example_run(), Path("exported"))
    >>> len(read_json(Path("exported/config.json"))["quantization_config"]["layers"])
    14
    """
    check_out(folder)
    source = read_source(run, trust_remote_code)
    model = packed_model(source)
    with replacing(folder) as staging, quiet():
        model.save_pretrained(staging)
        # The seal is of the generation config as transformers writes it.
        keep_side_files(staging, source.run.saved_model, None, skip=GENERATION_CONFIG)
        source.write_card(staging, "packed")


def packed_model(source: Source) -> PreTrainedModel:
    """Pack the layers of the model of `source`, which is changed in place and returned.

    >>> from globalopt.export.example import example_run
    >>> model = packed_model(read_source(example_run(Path("a run"))))
    >>> type(model.get_submodule("model.layers.0.mlp.up_proj")).__name__
    'SparseLowRankLinear'
    """
    model = source.loaded.model
    made: dict[str, SparseLowRankLinear] = {}
    for spec, value in source.values():
        old: Any = source.layers.module(spec.name)
        shape = shape_of(value, source.patterns[spec.name])
        if shape.bytes(value.S.element_size()) >= spec.numel * value.S.element_size():
            continue
        bias = None if old.bias is None else source.tensor(f"{spec.name}.bias")
        try:
            layer = SparseLowRankLinear.of(value, bias, isinstance(old, Conv1D), source.patterns[spec.name])
        except ArtefactError as cause:
            raise ArtefactError(f"Layer {spec.name} cannot be packed. {cause}") from None
        model.set_submodule(spec.name, layer)
        made[spec.name] = layer
    embeddings = _pack_embeddings(source, model, made)
    if embeddings or any(layer.shape.version > 1 for layer in made.values()):
        for layer in made.values():
            layer.drop_zero()
    # Of a lazily loaded model only the packed layers are in memory by now.
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, nn.Parameter(source.tensor(name), requires_grad=False))
    records = {name: layer.shape.record() for name, layer in made.items()}
    config = SparseLowRankConfig(records, embeddings={name: shape.record() for name, shape in embeddings.items()})
    held: Any = model
    held.hf_quantizer = SparseLowRankQuantizer(config)
    held.is_quantized, held.quantization_method = True, METHOD
    model.config.quantization_config = config
    guard.place(model)
    return model


def _pack_embeddings(
    source: Source, model: PreTrainedModel, made: dict[str, SparseLowRankLinear]
) -> dict[str, EmbeddingShape]:
    """Pack the embeddings that the run stores in few bits; a head with a matrix of its own is added to `made`."""
    found: dict[str, EmbeddingShape] = {}
    for each, coded in source.embeddings():
        old: Any = model.get_submodule(each.name)
        if isinstance(old, nn.Linear):
            S, storage = decode_matrix(coded, source.dtype), Storage(coded.bits, coded.bits)
            value = Decomposition(S, S[:, :0], S[:0], scales=Scales(storage, coded.scales.float(), None, None))
            made[each.name] = SparseLowRankLinear.of(value, old.bias)
            model.set_submodule(each.name, made[each.name])
        elif (shape := pack_embedding(model, each, coded, source.dtype)) is not None:
            found[each.name] = shape
    return found


def load_packed(folder: str | Path, dtype: str = "auto", device: str = "auto", compute: str = AUTO) -> PreTrainedModel:
    """Load a packed model from a folder, after checking its files; code that comes with it is not run.

    `AutoModelForCausalLM.from_pretrained` after `import globalopt` loads the same, also from the hub and over several
    devices. This function checks the configs before it makes a model from them, and raises one kind of error for
    everything that is wrong with the files.

    Args:
        dtype: "float32", "bfloat16", "float16", or "auto": as stored.
        compute: the way of computing, see `SparseLowRankLinear`.
    Raises:
        ArtefactError: the folder is missing, incomplete or broken, no packed model, or changed since it was saved.
        UsageError, UnknownNameError: there is no such dtype, device or way of computing.

    >>> from globalopt.export.example import example_run
    >>> export_packed(example_run(Path("another run")), Path("packed"))
    >>> model = load_packed(Path("packed"), device="cpu", compute="split")
    >>> model(torch.arange(8)[None]).logits.shape
    torch.Size([1, 8, 64])
    """
    folder = Path(folder)
    place = resolve_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, ("auto", *DTYPES))
    if compute not in COMPUTES:
        raise UnknownNameError("compute", compute, COMPUTES)
    files = _weight_files(folder)
    register()
    try:
        with seal.checked(files), quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=DTYPES.get(dtype, "auto"),
                device_map={"": place},
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (GlobalOptError, MemoryError, torch.OutOfMemoryError):
        raise
    # Configs can hold anything, as anybody can write a new seal, and transformers raises errors of any kind for them.
    except Exception as cause:
        reason = one_line(cause)
        raise ArtefactError(f"{folder} cannot be loaded ({reason}). Fetch or export the model again.") from cause
    model, report = loaded
    for key, words in (("missing_keys", "lack"), ("unexpected_keys", "have no place for")):
        if names := sorted(report[key]):
            raise ArtefactError(f"The weights in {folder} {words} {names[0]}; fetch or export the model again.")
    if compute != AUTO:
        set_compute(model, compute)
    return cast("PreTrainedModel", model).eval()


def _weight_files(folder: Path) -> list[Path]:
    """List the weight files of a packed model; `ArtefactError` if there is no packed model in the folder."""
    if not folder.is_dir():
        raise ArtefactError(f"There is no folder {folder}. Give the one that `globalopt export --format packed` wrote.")
    config = read_json(folder / seal.CONFIG)
    packing = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(packing, dict) or packing.get("quant_method") != METHOD:
        raise ArtefactError(f"{folder} holds no packed model; load it with AutoModelForCausalLM.from_pretrained.")
    if not (folder / INDEX).is_file():
        return [folder / WEIGHTS]
    if (folder / WEIGHTS).is_file():
        raise ArtefactError(f"{folder} holds both {WEIGHTS} and {INDEX}; one of them is not the model's.")
    return _shards(folder)


def _shards(folder: Path) -> list[Path]:
    """List the weight files that the index names; `ArtefactError` if it is broken or names others than the folder's."""
    index = read_json(folder / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ArtefactError(f"{folder / INDEX} does not say which file holds which tensor. Fetch the model again.")
    for name in set(names.values()):
        if Path(name).name != name or "\\" in name:
            raise ArtefactError(f"{folder / INDEX} names {name}, which is outside the folder; it is not opened.")
    return [folder / name for name in sorted(set(names.values()))]
