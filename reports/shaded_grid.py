"""Show numbers of layers as a grid of coloured cells, block by kind, which fits 80 columns and reads without colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from rich.color import Color
from rich.console import Group as Stack
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text

from globalopt.values.layer_results import LayerPlan
from globalopt.values.storage import BITS, PLAIN
from reports.bits import few_bits, mean_bits
from reports.groups import Grid, by_block

WIDTH = 80
MIN_SPAN = 0.05  # least range of a colour scale, so that small differences do not look large
_LEAST_BITS = math.log(min(BITS))

Shade = Callable[[float, int], Text]
"""Formats a number as a coloured cell of some width."""

# Viridis at 0, 1/4, 1/2, 3/4, 1: ordered in brightness, so also for readers who see no hue.
_VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))

# Red for less, blue for more: a pair that stays apart in the common colour blindnesses; the sign says it too.
_LESS_TO_MORE = ((178, 24, 43), (239, 138, 98), (247, 247, 247), (103, 169, 207), (33, 102, 172))


def kept_grid(layers: Sequence[LayerPlan], width: int = WIDTH) -> Stack:
    """Make the grid of kept fractions, coloured by value, in several tables where one does not fit into `width`.

    >>> from rich.console import Console
    >>> from reports.example import example_layers
    >>> Console(width=80, color_system=None).print(kept_grid(example_layers()))
    Kept fraction, block by kind
     block q_proj  k_proj  v_proj  o_proj  gate_proj  up_proj  down_proj    all
         0  0.332   0.530   1.000   0.343     0.306     0.349     0.307    0.364
         1  0.547   0.717   0.742   0.517     0.520     0.534     0.546    0.551
    <BLANKLINE>
    lowest  0.306    highest  1.000
    """
    grid = Grid.of(layers)
    values = grid.values(lambda layer: layer.kept)
    low, high = span(values)

    def shade(value: float, cell: int) -> Text:
        return _painted(f"{value:^{cell}.3f}", (value - low) / (high - low), _VIRIDIS)

    whole = {group.label: group.kept for group in by_block(layers)}
    title = Text("Kept fraction, block by kind", "bold")
    return Stack(title, shaded_grid(grid, values, whole, shade, ("lowest", "highest"), width))


def bits_grid(layers: Sequence[LayerPlan], width: int = WIDTH) -> Stack | None:
    """Make the grid of the mean bits of the stored numbers, coloured by value; None where all have 16.

    >>> from rich.console import Console
    >>> from reports.example import example_layers
    >>> Console(width=80, color_system=None).print(bits_grid(example_layers(storages=("16", "8", "4/8"))))
    Bits of a stored number, block by kind
     block q_proj  k_proj  v_proj  o_proj  gate_proj  up_proj  down_proj    all
         0   16.0    8.0     4.0     16.0       8.0      4.5       16.0      9.7
         1   8.0     4.6     16.0    8.0        4.0     16.0        8.0      9.3
    <BLANKLINE>
    lowest   4.0     highest   16.0
    """
    if not few_bits(layers) or mean_bits(layers) is None:
        return None
    grid = Grid.of(layers)
    values = grid.values(lambda layer: math.nan if (bits := mean_bits([layer])) is None else bits)

    def shade(value: float, cell: int) -> Text:
        at = (math.log(value) - _LEAST_BITS) / (math.log(PLAIN.values) - _LEAST_BITS)
        return _painted(f"{value:^{cell}.1f}", at, _VIRIDIS)

    whole = {group.label: math.nan if group.bits is None else group.bits for group in by_block(layers)}
    title = Text("Bits of a stored number, block by kind", "bold")
    return Stack(title, shaded_grid(grid, values, whole, shade, ("lowest", "highest"), width, "- nothing stored"))


def change_grid(before: Sequence[LayerPlan], after: Sequence[LayerPlan], width: int = WIDTH) -> Stack:
    """Make the grid of changes of the kept fractions, `after - before`, red below zero and blue above it.

    The colours are equally strong for equal gains and losses, and strongest at the largest change.

    >>> from rich.console import Console
    >>> from reports.example import example_layers
    >>> layers = example_layers()
    >>> Console(width=80, color_system=None).print(change_grid(layers, layers))
    Change of the kept fraction, block by kind
    ...
    lowest    0      highest    0
    """
    grid = Grid.of(before)
    values = Grid.of(after).values(lambda layer: layer.kept) - grid.values(lambda layer: layer.kept)
    most = max(float(np.nanmax(np.abs(values))), MIN_SPAN)

    def shade(value: float, cell: int) -> Text:
        text = f"{value:+.3f}" if value else "0"
        return _painted(f"{text:^{cell}}", (value / most + 1) / 2, _LESS_TO_MORE)

    kept = {group.label: group.kept for group in by_block(before)}
    whole = {group.label: group.kept - kept[group.label] for group in by_block(after)}
    title = Text("Change of the kept fraction, block by kind", "bold")
    return Stack(title, shaded_grid(grid, values, whole, shade, ("lowest", "highest"), width))


def shaded_grid(
    grid: Grid[LayerPlan],
    values: np.ndarray,
    whole: Mapping[str, float],
    shade: Shade,
    ends: tuple[str, str],
    width: int = WIDTH,
    empty: str = "- no such layer",
) -> Stack:
    """Make a grid with a row per block, a cell per kind and one for the whole block, and a legend of the colours.

    Args:
        values: (blocks, kinds), NaN where a block has no such layer.
        whole: values of whole blocks, by their number as text.
        shade: formats a cell.
        ends: names of the lowest and the highest value in the legend.
        width: columns of the terminal; more kinds than fit go into further tables.
        empty: what the legend says of cells without a value.

    >>> from rich.console import Console
    >>> from reports.example import example_layers
    >>> grid = Grid.of(example_layers()[:2])
    >>> ranks = grid.values(lambda layer: layer.rank)
    >>> shown = shaded_grid(grid, ranks, {"0": 9.0}, lambda value, width: Text(f"{value:.0f}"), ("low", "high"))
    >>> Console(width=80, color_system=None).print(shown)
     block q_proj  k_proj    all
         0   6       3        9
    <BLANKLINE>
    low 3  high 6
    """
    tables = []
    for columns in _columns_that_fit(grid.kinds, width):
        table = Table(box=None, padding=0, collapse_padding=True, pad_edge=False, header_style="dim")
        table.add_column("block ", justify="right")
        for kind in (grid.kinds[j] for j in columns):
            table.add_column(kind, justify="center", width=_cell_width(kind), overflow="fold")
        # A gap before the column of whole blocks.
        table.add_column(" ", width=1)
        table.add_column("all", justify="center", width=_cell_width("all"))
        for i, block in enumerate(grid.blocks):
            cells = [_cell(values[i, j], _cell_width(grid.kinds[j]), shade) for j in columns]
            # A block between two others may hold no layer at all.
            block_cell = _cell(whole.get(str(block), math.nan), _cell_width("all"), shade)
            table.add_row(f"{block} ", *cells, "", block_cell)
        tables.append(Padding(table, (1 if tables else 0, 0, 0, 0)))
    lowest, highest = float(np.nanmin(values)), float(np.nanmax(values))
    legend = Text.assemble((f"{ends[0]} ", "dim"), shade(lowest, 8), (f"  {ends[1]} ", "dim"), shade(highest, 8))
    if np.isnan(values).any():
        legend.append(f"  {empty}", "dim")
    return Stack(*tables, Padding(legend, (1, 0, 0, 0)))


def span(values: np.ndarray) -> tuple[float, float]:
    """Choose the ends of a colour scale over fractions: their range, widened to `MIN_SPAN` inside [0, 1].

    >>> [round(end, 3) for end in span(np.array([0.5, 0.51]))]
    [0.48, 0.53]
    """
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if high - low >= MIN_SPAN:
        return low, high
    low = min(max(0.0, (low + high - MIN_SPAN) / 2), max(1.0, high) - MIN_SPAN)
    return low, low + MIN_SPAN


def _cell_width(kind: str) -> int:
    """Choose the width of the cells of a kind."""
    return min(max(len(kind), 5), 24) + 2


def _columns_that_fit(kinds: Sequence[str], width: int) -> Iterator[list[int]]:
    """Split the kinds, by their index, into tables that fit into `width`."""
    free = width - len("block ") - 1 - _cell_width("all")
    chunk: list[int] = []
    used = 0
    for j, kind in enumerate(kinds):
        if chunk and used + _cell_width(kind) > free:
            yield chunk
            chunk, used = [], 0
        chunk.append(j)
        used += _cell_width(kind)
    yield chunk


def _cell(value: float, width: int, shade: Shade) -> Text:
    """Format a cell; a dash where there is no layer."""
    return Text(f"{'-':^{width}}", "dim") if math.isnan(value) else shade(value, width)


def _painted(text: str, at: float, scale: Sequence[tuple[int, int, int]]) -> Text:
    """Colour the background of `text` by the place `at` in [0, 1] of a scale of evenly spaced colours."""
    at *= len(scale) - 1
    left = min(int(at), len(scale) - 2)
    red, green, blue = (a + (at - left) * (b - a) for a, b in zip(scale[left], scale[left + 1], strict=True))
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 128
    # Not the named colours, which differ between terminals.
    ink = Color.from_rgb(0, 0, 0) if bright else Color.from_rgb(255, 255, 255)
    return Text(text, Style(color=ink, bgcolor=Color.from_rgb(red, green, blue)))
