"""Tell in how many bits the numbers of layers are stored, where that differs from 16."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from globalopt.values.embeddings import Embedding, dense_bytes, stored_bytes
from globalopt.values.layer_results import LayerPlan
from globalopt.values.storage import PLAIN, Storage
from reports import formats

NOTE = "bits: mean of the stored numbers, without their scales"


def few_bits(layers: Sequence[LayerPlan]) -> bool:
    """Tell whether a layer is stored in fewer than 16 bits.

    >>> from reports.example import example_layers
    >>> few_bits(example_layers()), few_bits(example_layers(storages=("16", "4/8")))
    (False, True)
    """
    return any(layer.storage != str(PLAIN) for layer in layers)


def mean_bits(layers: Sequence[LayerPlan]) -> float | None:
    """Compute the mean bits of the values of `S` and the entries of `U` and `V`; None where nothing is kept.

    >>> from reports.example import example_layers
    >>> mean_bits(example_layers(storages=("4",)))
    4.0
    """
    numbers = sum(layer.rank_params + layer.nnz for layer in layers)
    return sum(layer.number_bits for layer in layers) / numbers if numbers else None


def bits_text(bits: float | None) -> str:
    """Format mean bits.

    >>> bits_text(4.04), bits_text(None)
    ('4.0', '-')
    """
    return "-" if bits is None else f"{bits:.1f}"


def stored_facts(layers: Sequence[LayerPlan]) -> list[tuple[str, str]]:
    """Count the layers of every storage, most bits first, as a label and its value; nothing where all have 16 bits.

    >>> from reports.example import example_layers
    >>> stored_facts(example_layers(storages=("16", "8", "4/8")))
    [('stored', '5 layers in 16 bits, 5 in 8, 4 in 4/8 (values/factors)')]
    """
    if not few_bits(layers):
        return []
    counts = Counter(layer.storage for layer in layers)
    first, *others = sorted(counts, key=Storage.parse, reverse=True)
    noun = "layer" if counts[first] == 1 else "layers"
    said = ", ".join([f"{counts[first]} {noun} in {first} bits", *(f"{counts[each]} in {each}" for each in others)])
    return [("stored", said + (" (values/factors)" if any("/" in storage for storage in counts) else ""))]


def embedding_facts(embeddings: Sequence[Embedding]) -> list[tuple[str, str]]:
    """Say in how many bits embeddings are stored, and in how many bytes; nothing where a budget counts none.

    >>> embedding_facts([Embedding("model.embed_tokens", 100, 64, bits=8), Embedding("lm_head", 100, 64, bits=6)])
    [('embeddings', 'model.embed_tokens in 8 bits, lm_head in 6: 11,600 of 25,600 bytes')]
    """
    if not embeddings:
        return []
    first, *others = embeddings
    said = ", ".join([f"{first.name} in {first.bits} bits", *(f"{each.name} in {each.bits}" for each in others)])
    sizes = f"{formats.count(stored_bytes(embeddings))} of {formats.count(dense_bytes(embeddings))} bytes"
    return [("embeddings", f"{said}: {sizes}")]


def compressible(accounting: str, embeddings: Sequence[Embedding]) -> str:
    """Name what a budget is a fraction of.

    >>> compressible("parameters", ()), compressible("bytes", [Embedding("lm_head", 100, 64, bits=8)])
    ('the compressible parameters', 'the bytes of compressible layers and embeddings')
    """
    return f"the {accounting} of compressible layers and embeddings" if embeddings else f"the compressible {accounting}"


def summed_over(embeddings: Sequence[Embedding]) -> str:
    """Say what a predicted loss is summed over.

    >>> summed_over(()), summed_over([Embedding("lm_head", 100, 64, bits=8, loss=0.1)])
    ('summed over layers', 'summed over layers and embeddings')
    """
    return f"summed over layers{' and embeddings' if any(each.loss is not None for each in embeddings) else ''}"
