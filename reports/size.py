"""Report the size of a compressed model: parameters, and bytes when packed."""

from __future__ import annotations

from globalopt.values.budget import BYTES_PER_VALUE
from globalopt.values.results import Summary
from reports import formats


def size_facts(summary: Summary) -> list[tuple[str, str]]:
    """List labels and values on size and speed; packed bytes are left out where a run did not count them.

    >>> from reports.example import example_summary
    >>> size_facts(example_summary())[0]
    ('of the layers', '45.73 %: 663,141 of 1,449,984 parameters')
    """
    layers = summary.layers
    dense = sum(layer.d_out * layer.d_in for layer in layers)
    kept = sum(layer.rank_params + layer.nnz for layer in layers)
    rest = sum(summary.skipped.values())
    rows = [
        ("of the layers", _part(kept, dense, f"{formats.count(kept)} of {formats.count(dense)} parameters")),
        ("of the model", _part(kept + rest, dense + rest, f"{formats.count(kept + rest)} parameters")),
    ]
    if all(layer.bytes or not layer.rank + layer.nnz for layer in layers):
        packed, whole = sum(layer.bytes for layer in layers), BYTES_PER_VALUE * dense
        sizes = f"{formats.memory(packed)} of {formats.memory(whole)} at 16 bits a value, indices counted"
        rows.append(("packed layers", _part(packed, whole, sizes)))
    return [
        *rows,
        ("unpacked", "model/ is as large as the dense model: it stores sums"),
        ("speed", "not measured by a run; benchmarks/serving.py measures every export"),
    ]


def _part(part: int, whole: int, said: str) -> str:
    """Format a share with the counts behind it."""
    return f"{formats.percent(part, whole)}: {said}"
