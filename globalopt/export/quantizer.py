"""Load, save and dequantize packed models in transformers, as a quantization method with config and quantizer.

Only the hooks before and after the loading of weights are used, as the stored tensors have the names of the modules'
parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from globalopt.errors import ArtefactError, UsageError
from globalopt.export import guard
from globalopt.export.embedding import EmbeddingShape, PackedEmbedding, place_empty, unpack_embedding
from globalopt.export.linear import AUTO, TWO_FOUR, SparseLowRankLinear
from globalopt.export.shape import Shape
from globalopt.values.layer import NM

METHOD = "globalopt"
VERSIONS = (1, 2, 3)
"""Versions of the format that can be read; a model is written in the first one that has all of its layers."""

_FLOATS = ("torch.float32", "torch.float16", "torch.bfloat16", "torch.float64")


class SparseLowRankConfig(QuantizationConfigMixin):
    """Hold the `quantization_config` of a packed model.

    Args:
        layers: `Shape.record()` of every packed layer, by its name.
        format_version: of the format; None: the first that has all of these layers.
        embeddings: `EmbeddingShape.record()` of every packed embedding, by its name.
    Raises:
        ArtefactError: it was written by another version, describes no layers, or ones that its version has not.

    >>> record = {"d_out": 8, "d_in": 16, "form": "2:4", "values": 64, "rank": 2, "signs": False}
    >>> SparseLowRankConfig({"model.layers.0.mlp.up_proj": record}).shapes()["model.layers.0.mlp.up_proj"].rank
    2
    """

    def __init__(
        self,
        layers: Mapping[str, Any],
        format_version: int | None = None,
        embeddings: Mapping[str, Any] | None = None,
        **other: Any,
    ) -> None:
        method = other.pop("quant_method", METHOD)
        known = format_version is None or (format_version in VERSIONS and not isinstance(format_version, bool))
        if method != METHOD or not known or other:
            raise ArtefactError(
                f"The packed model has format version {format_version!r}, this one reads "
                f"{', '.join(map(str, VERSIONS))}. Upgrade globalopt."
            )
        if not isinstance(layers, Mapping) or not isinstance(embeddings, Mapping | None):
            raise ArtefactError("The quantization_config of the packed model has no layers; it is broken.")
        self.quant_method: Any = METHOD
        if embeddings:
            parsed = {str(name): EmbeddingShape.parse(record) for name, record in embeddings.items()}
            self.embeddings = {name: shape.record() for name, shape in parsed.items()}
        shapes = {str(name): Shape.parse(record) for name, record in layers.items()}
        self.describe(shapes)
        if format_version is not None and format_version < self.format_version:
            raise ArtefactError(
                f"The packed model says that its format version is {format_version}, but has layers of version "
                f"{self.format_version}; it is broken."
            )

    def describe(self, shapes: Mapping[str, Shape]) -> None:
        """Set the packed layers, and the version that they need."""
        versions = [shape.version for shape in shapes.values()] + ([3] if self.embedding_shapes() else [])
        self.format_version = max(versions, default=1)
        self.layers = {name: shape.record() for name, shape in shapes.items()}

    def embedding_shapes(self) -> dict[str, EmbeddingShape]:
        """Return the shapes of the packed embeddings, by name."""
        # An attribute of its own only where there are some: transformers writes all attributes.
        found = getattr(self, "embeddings", {})
        return {name: EmbeddingShape.parse(record) for name, record in found.items()}

    def shapes(self) -> dict[str, Shape]:
        """Return the shapes of the packed layers, by name."""
        return {name: Shape.parse(record) for name, record in self.layers.items()}


class SparseLowRankQuantizer(HfQuantizer):
    """Replace linear layers by packed ones before transformers loads the weights of a model.

    >>> from pathlib import Path
    >>> from transformers import AutoModelForCausalLM
    >>> from globalopt.export.example import example_run
    >>> from globalopt.export.packed import export_packed
    >>> export_packed(example_run(), Path("exported"))
    >>> model = AutoModelForCausalLM.from_pretrained("exported")
    >>> type(model.hf_quantizer).__name__, len(list(packed_layers(model)))
    ('SparseLowRankQuantizer', 14)
    """

    requires_calibration = True  # in transformers: a model cannot be packed on loading, only one that is can be loaded

    quantization_config: SparseLowRankConfig

    def update_attn_implementation(self, config: Any) -> Any:
        """Take the notice to other programs out of the config, before transformers looks for the weight files."""
        if getattr(config, guard.FIELD, None) == guard.NOTICE:
            delattr(config, guard.FIELD)
        return config

    # Older versions of transformers show the config to this hook instead.
    update_tp_plan = update_attn_implementation

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Leave room for what the first call unpacks: at most the dense layer and its factors beside the packed one."""
        shapes = self.quantization_config.shapes().values()
        embeddings = self.quantization_config.embedding_shapes().values()
        # At 16 bits a value; at 32 the packed share is larger, so this is on the safe side.
        packed = sum(shape.bytes(2) for shape in shapes) + sum(shape.bytes for shape in embeddings)
        decoded = sum(shape.count(part) for shape in shapes for part in ("U", "V") if shape.coded(part))
        decoded += sum(shape.numel for shape in embeddings)
        dense = 2 * (sum(shape.sparse.numel for shape in shapes) + decoded)
        share = packed / (packed + dense) if packed else 1.0
        return {place: int(size * share) if isinstance(size, int) else size for place, size in max_memory.items()}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Check the files, and replace linear layers by empty packed ones."""
        shapes, embeddings = self.quantization_config.shapes(), self.quantization_config.embedding_shapes()
        files = kwargs.get("checkpoint_files")
        if files:
            from globalopt.export import seal

            seal.check_configs(files)
            _check_shapes(shapes, embeddings, seal.check_tensors(files))
        for name, shape in shapes.items():
            old = _linear(model, name, shape)
            dtype = kwargs.get("dtype") or old.weight.dtype
            made = SparseLowRankLinear(shape, old.bias is not None, _is_conv1d(old), dtype, device="meta")
            model.set_submodule(name, made)
        for name, shape in embeddings.items():
            dtype = kwargs.get("dtype") or model.get_submodule(name).weight.dtype
            place_empty(model, name, shape, dtype)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Check that every packed layer can be unpacked."""
        guard.place(model)
        for name, layer in packed_layers(model):
            layer.requires_grad_(False)
            if layer.weight.device.type == "meta":
                continue
            try:
                layer.value()
            except (ArtefactError, ArithmeticError) as cause:
                raise ArtefactError(f"Layer {name} of the packed model is broken: {cause}") from None
            # They are not cast, so that they are views of the file and would keep all of it mapped.
            for name in layer.shape.tensors():
                stored = getattr(layer, name)
                if not stored.is_floating_point():
                    stored.data = stored.detach().clone()
        for name, embedding in packed_embeddings(model):
            embedding.requires_grad_(False)
            if embedding.weight.device.type == "meta":
                continue
            try:
                embedding.matrix()
            except (ArtefactError, ArithmeticError) as cause:
                raise ArtefactError(f"Embedding {name} of the packed model is broken: {cause}") from None
            for stored in (embedding.weight, embedding.weight_scales):
                stored.data = stored.detach().clone()
        return model

    def dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Replace packed layers by dense ones, of the type that the layers have now.

        transformers takes the type from the config, which a cast of the model leaves as it was, and which saving
        changes into a word.

        Args:
            dtype: that the whole model gets instead.
        """
        chosen: torch.dtype | None = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        model = self._dequantize(model, chosen)
        self.remove_quantization_config(model)
        guard.remove(model)
        if chosen is not None:
            nn.Module.to(model, chosen)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Replace packed layers by dense ones."""
        for name, layer in packed_layers(model):
            model.set_submodule(name, dense_layer(layer, dtype))
        for name, embedding in packed_embeddings(model):
            unpack_embedding(model, name, embedding, dtype)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors to save, and the seal as metadata."""
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        from globalopt.export import seal

        tensors = model.state_dict()
        for ignored in model._keys_to_ignore_on_save or ():
            tensors.pop(ignored, None)
        tensors = remove_tied_weights_from_state_dict(tensors, model)
        # A cast since loading may have rounded values to zero, which changes a shape.
        self.quantization_config.describe({name: layer.shape for name, layer in packed_layers(model)})
        # The seal holds digests of the configs as save_pretrained is about to write them.
        model.config.quantization_config = self.quantization_config
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
        return tensors, seal.seal(model, tensors, revert_weight_conversion(model, dict(tensors)))

    def is_serializable(self) -> bool:
        """Tell transformers that packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Tell transformers that packed models cannot be trained."""
        return False


def packed_layers(model: nn.Module) -> Iterator[tuple[str, SparseLowRankLinear]]:
    """Iterate over the packed layers of a model, with their names.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> list(packed_layers(tiny_llama()))
    []
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, SparseLowRankLinear)]
    return iter(found)


def packed_embeddings(model: nn.Module) -> Iterator[tuple[str, PackedEmbedding]]:
    """Iterate over the packed embeddings of a model, with their names.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> list(packed_embeddings(tiny_llama()))
    []
    """
    return iter([(name, module) for name, module in model.named_modules() if isinstance(module, PackedEmbedding)])


def set_compute(model: nn.Module, compute: str) -> None:
    """Set the way of computing (`SparseLowRankLinear`) of all packed layers; "two-four" only of those with a 2:4 `S`.

    Raises:
        UnknownNameError: there is no way called `compute`.
        UsageError: this device does not support it, or the model has no packed layer.

    >>> from globalopt.export.linear import MERGED
    >>> from globalopt.values.decomposition import Decomposition
    >>> S = torch.eye(4)
    >>> layer = SparseLowRankLinear.of(Decomposition(S, S[:, :1], S[:1]), bias=None)
    >>> set_compute(nn.Sequential(layer), MERGED)
    >>> layer.compute
    'merged'
    """
    layers = [layer for _, layer in packed_layers(model)]
    if not layers:
        raise UsageError("The model has no packed layer; load one that `globalopt export --format packed` wrote.")
    for layer in layers:
        fits = compute != TWO_FOUR or layer.shape.sparse.form == str(NM(2, 4))
        layer.use(compute if fits else AUTO)
    for _, embedding in packed_embeddings(model):
        embedding.use(compute)


def dense_layer(layer: SparseLowRankLinear, dtype: torch.dtype | None = None) -> nn.Module:
    """Unpack a layer into an `nn.Linear`, or into a `Conv1D` where it replaces one.

    >>> from globalopt.values.decomposition import Decomposition
    >>> S = torch.eye(4)
    >>> layer = SparseLowRankLinear.of(Decomposition(S, S[:, :0], S[:0]), bias=None)
    >>> torch.equal(dense_layer(layer).weight, S)
    True
    """
    from transformers.pytorch_utils import Conv1D

    W = layer.value().dense().to(dtype or layer.dtype)
    with torch.device("meta"):
        made: Any = Conv1D(*W.shape) if layer.transposed else nn.Linear(*reversed(W.shape), bias=layer.bias is not None)
    made.weight = nn.Parameter(W.mT.contiguous() if layer.transposed else W, requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().to(W.dtype), requires_grad=False)
    return made


def _is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is GPT-2's `Conv1D`."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _linear(model: nn.Module, name: str, shape: Shape) -> Any:
    """Find the linear layer `name` of an unpacked model; `ArtefactError` if there is none, or one of another shape."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ArtefactError(f"The packed model has a layer {name} that its architecture has not.") from None
    if not (isinstance(module, nn.Linear) or _is_conv1d(module)):
        raise ArtefactError(f"{name} is no linear layer of this architecture; the packed model is broken.")
    weight: Any = module.weight
    d_out, d_in = reversed(weight.shape) if _is_conv1d(module) else weight.shape
    if (d_out, d_in) != (shape.sparse.d_out, shape.sparse.d_in):
        raise ArtefactError(
            f"Layer {name} is {d_out} x {d_in} in this architecture and {shape.sparse.d_out} x {shape.sparse.d_in} in "
            "the packed model."
        )
    return module


def _check_shapes(
    shapes: Mapping[str, Shape],
    embeddings: Mapping[str, EmbeddingShape],
    stored: Mapping[str, tuple[str, tuple[int, ...]]],
) -> None:
    """Check the dtypes and shapes of the stored tensors; `ArtefactError` naming the first that does not fit."""
    every: dict[str, Shape | EmbeddingShape] = {**shapes, **embeddings}
    for name, shape in every.items():
        for part, size in shape.tensors().items():
            dtype, found = stored.get(f"{name}.{part}", ("nothing", ()))
            expected = shape.dtype(part)
            if found != size or (dtype not in _FLOATS if expected is None else dtype != str(expected)):
                raise ArtefactError(
                    f"{name}.{part} of the packed model is {dtype} of shape {found}; expected {size} of "
                    f"{'a floating-point type' if expected is None else expected}."
                )
