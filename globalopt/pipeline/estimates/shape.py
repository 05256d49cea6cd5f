"""Hold the structure of a model and the sizes of a run on it, as far as an estimate of its cost needs them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from globalopt.evaluation.logits import in_parts
from globalopt.models.decoder import token_embedding
from globalopt.models.device import resolve_device
from globalopt.models.finding import find_layers
from globalopt.models.layers import ModelLayers
from globalopt.models.quantised import find_quantised
from globalopt.models.streaming import dtype_of
from globalopt.models.structure import load_structure
from globalopt.pipeline.options import ModelOptions, TextOptions
from globalopt.pipeline.own_text import at_once
from globalopt.reference import reference_folder
from globalopt.text.mixtures import share_out
from globalopt.text.splits import CUT, NAMES
from globalopt.values.layer import LayerSpec


@dataclass(frozen=True, eq=False)
class Structure:
    """Hold the layers of a model without its weights.

    Args:
        layers: of the model built from its config.
        stored: the floating-point type that the checkpoint's weights are stored in.
        quantised: whether the model is dequantised into the cache first.

    >>> structure = Structure.of(ModelOptions())  # the bundled model
    >>> len(structure.layers.specs), structure.stored
    (56, torch.bfloat16)
    """

    layers: ModelLayers
    stored: torch.dtype
    quantised: bool = False

    @classmethod
    def of(cls, models: ModelOptions) -> Structure:
        """Read the structure of the model that the options name; raises what `load_model` and `find_layers` raise."""
        source = models.model or str(reference_folder())
        found = find_quantised(source, models.gguf_file, models.trust_remote_code)
        if found is None:
            model, stored = load_structure(source, models.dtype, models.trust_remote_code)
        else:
            model, stored = found.structure(models.dtype)
        return cls(find_layers(model, models.allow_low_coverage), stored, quantised=found is not None)


@dataclass(frozen=True)
class Shape:
    """Hold the sizes of a model and its text, in parameters, layers and bytes per value.

    >>> shape = Shape.of(Structure.of(ModelOptions()), ModelOptions(), TextOptions())
    >>> shape.blocks, len(shape.specs), shape.tokens
    (8, 56, 32768)
    """

    specs: tuple[LayerSpec, ...]
    parameters: int
    outside: int
    block: int
    blocks: int
    width: int
    vocabulary: int
    computed: int
    stored: int
    parts: bool
    texts: TextOptions

    @classmethod
    def of(cls, structure: Structure, models: ModelOptions, texts: TextOptions) -> Shape:
        """Count the sizes of a model."""
        layers, model = structure.layers, structure.layers.model
        parameters = sum(p.numel() for p in model.parameters())
        blocks = [sum(p.numel() for p in block.parameters()) for block in layers.blocks]
        on_cpu = resolve_device(models.device).type == "cpu"
        return cls(
            specs=layers.specs,
            parameters=parameters,
            outside=parameters - sum(blocks),
            block=max(blocks),
            blocks=len(blocks),
            width=token_embedding(model).embedding_dim,
            vocabulary=model.config.get_text_config(decoder=True).vocab_size,
            computed=(dtype_of(model) if on_cpu or models.dtype != "auto" else structure.stored).itemsize,
            stored=structure.stored.itemsize,
            parts=in_parts(model),
            texts=texts,
        )

    @property
    def tokens(self) -> int:
        """Count the calibration tokens."""
        return self.texts.nsamples * self.texts.seqlen

    @property
    def written(self) -> int:
        """Count the windows that the model writes itself."""
        parts, names = self.texts.parts, NAMES if self.texts.eval_text is None else CUT
        most = {name: self.texts.nsamples if name == NAMES[0] else self.texts.eval_windows for name in names}
        counts = [share_out(name, count, parts) for name, count in most.items()]
        return sum(count for row in counts for part, count in zip(parts, row, strict=True) if part.own)

    @property
    def written_at_once(self) -> int:
        """Count the windows that the model writes together."""
        return min(self.written, at_once(self.texts.batch_size, self.texts.seqlen))

    @property
    def sites(self) -> dict[str, list[LayerSpec]]:
        """Group the layers by input site."""
        found: dict[str, list[LayerSpec]] = {}
        for spec in self.specs:
            found.setdefault(spec.site, []).append(spec)
        return found
