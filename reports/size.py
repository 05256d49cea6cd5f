"""Report the size of a compressed model: parameters, and bytes when packed, by part where numbers have few bits."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Group as Stack

from globalopt.values.budget import BYTES_PER_VALUE, Parts
from globalopt.values.embeddings import dense_bytes, stored_bytes
from globalopt.values.layer import Shape
from globalopt.values.results import Summary
from reports import formats
from reports.bits import few_bits
from reports.table_style import add_numbers, footed, report_table

PARTS = Parts("values of S", "index of S", "scales", "factors U, V", "planes of signs")
"""What the parts are called."""

PARTS_NOTE = "counted, not measured: an export adds what packing pads, and the parts of the model not covered"


@dataclass(frozen=True)
class PartSize:
    """Give the size of one part of all covered layers together.

    Args:
        label: what the part is called.
        bytes: of all layers.
        share: of the bytes of the dense layers, and of the embeddings that a budget counts.
        per_weight: bits per weight of the same.

    >>> PartSize("scales", 64, share=0.01, per_weight=0.16).bytes
    64
    """

    label: str
    bytes: int
    share: float
    per_weight: float


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
        counted = "scales and indices counted" if few_bits(layers) else "at 16 bits a value, indices counted"
        sizes = f"{formats.memory(packed)} of {formats.memory(whole)}, {counted}"
        rows.append(("packed layers", _part(packed, whole, sizes)))
    if summary.embeddings:
        stored, dense = stored_bytes(summary.embeddings), dense_bytes(summary.embeddings)
        said = f"{formats.memory(stored)} of {formats.memory(dense)}, scales counted"
        rows.append(("packed embeddings", _part(stored, dense, said)))
    return [
        *rows,
        ("unpacked", "model/ is as large as the dense model: it stores sums"),
        ("speed", "not measured by a run; benchmarks/serving.py measures every export"),
    ]


def part_sizes(summary: Summary) -> list[PartSize]:
    """Compute the sizes of the parts of all covered layers, and of all parts as the last; none where all have 16 bits.

    The sizes add up to the bytes of the layers, `Target.bytes`, and of the embeddings where a budget counts them: codes
    and scales of these are one part. Parts that no layer has are left out.

    >>> from reports.example import example_summary
    >>> sizes = part_sizes(example_summary(storages=("8", "4/8")))
    >>> [size.label for size in sizes]
    ['values of S', 'index of S', 'scales', 'factors U, V', 'all']
    >>> sizes[-1].bytes == sum(layer.bytes for layer in example_summary(storages=("8", "4/8")).layers)
    True
    """
    layers, embeddings = summary.layers, summary.embeddings
    if not few_bits(layers) and not embeddings:
        return []
    weights = sum(layer.d_out * layer.d_in for layer in layers) + sum(each.numel for each in embeddings)
    parts = [layer.target.parts(Shape(layer.d_out, layer.d_in)) for layer in layers]
    sums = Parts(*map(sum, zip(*parts, strict=True)))
    beside = stored_bytes(embeddings)
    found = [(label, size) for label, size in zip((*PARTS, "embeddings"), (*sums, beside), strict=True) if size]
    return [
        PartSize(label, size, size / (BYTES_PER_VALUE * weights), 8 * size / weights)
        for label, size in [*found, ("all", sum(sums) + beside)]
    ]


def size_table(summary: Summary) -> Stack | None:
    """Make the table of `part_sizes`; None where all layers have 16 bits and the budget counts nothing else.

    >>> from rich.console import Console
    >>> from reports.example import example_summary
    >>> Console(width=80, color_system=None).print(size_table(example_summary(storages=("4/8",))))
    Bytes of the layers, by part
                    bytes  of dense  bits per weight
    ────────────────────────────────────────────────
    ...
    """
    sizes = part_sizes(summary)
    if not sizes:
        return None
    table = report_table(size_title(summary))
    table.add_column("")
    add_numbers(table, ("bytes", "of dense", "bits per weight"))
    for size in sizes:
        last = size is sizes[-1]
        if last:
            table.add_section()
        cells = (formats.count(size.bytes), f"{100 * size.share:.2f} %", f"{size.per_weight:.3f}")
        table.add_row(size.label, *cells, style="bold" if last else "")
    return footed(table, PARTS_NOTE)


def size_title(summary: Summary) -> str:
    """Title the table of `part_sizes`.

    >>> from reports.example import example_summary
    >>> size_title(example_summary())
    'Bytes of the layers, by part'
    """
    return f"Bytes of the layers{' and embeddings' if summary.embeddings else ''}, by part"


def _part(part: int, whole: int, said: str) -> str:
    """Format a share with the counts behind it."""
    return f"{formats.percent(part, whole)}: {said}"
