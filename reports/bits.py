"""Tell in how many bits the numbers of layers are stored, where that differs from 16."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from globalopt.values.results import LayerPlan
from globalopt.values.storage import PLAIN, Storage

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
