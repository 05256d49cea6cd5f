"""Numbers of layers, block by kind, as a grid of coloured cells; it fits 80 columns and needs no colour to be read."""

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

from globalopt.values.results import LayerPlan
from reports.groups import Grid, by_block

WIDTH = 80
MIN_SPAN = 0.05  # of a colour scale: below it, differences would look larger than they are

Shade = Callable[[float, int], Text]
"""A number as a coloured cell of some width."""

# Viridis at 0, 1/4, 1/2, 3/4, 1: ordered in brightness, so also for readers who see no hue.
_VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))

# Red for less, blue for more: a pair that stays apart in the common colour blindnesses; the sign says it too.
_LESS_TO_MORE = ((178, 24, 43), (239, 138, 98), (247, 247, 247), (103, 169, 207), (33, 102, 172))


def kept_grid(layers: Sequence[LayerPlan], width: int = WIDTH) -> Stack:
    """Kept fraction of every layer, coloured by value; as many tables as `width` asks for."""
    grid = Grid.of(layers)
    values = grid.values(lambda layer: layer.kept)
    low, high = span(values)

    def shade(value: float, cell: int) -> Text:
        return _painted(f"{value:^{cell}.3f}", (value - low) / (high - low), _VIRIDIS)

    whole = {group.label: group.kept for group in by_block(layers)}
    title = Text("Kept fraction, block by kind", "bold")
    return Stack(title, shaded_grid(grid, values, whole, shade, ("lowest", "highest"), width))


def change_grid(before: Sequence[LayerPlan], after: Sequence[LayerPlan], width: int = WIDTH) -> Stack:
    """Change of the kept fraction of every layer, `after - before`, red where it lost and blue where it gained.

    The colours are as strong for the same gain and loss, and full at the largest change.
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
) -> Stack:
    """One row per block, one cell per kind, then the block as a whole; below them what the colours mean.

    Args:
        values: (blocks, kinds), NaN where a block has no such layer.
        whole: the same for whole blocks, by their number as text.
        ends: what the lowest and the highest value are called.
        width: columns of the terminal; more kinds than fit go into further tables.
    """
    tables = []
    for columns in _columns_that_fit(grid.kinds, width):
        table = Table(box=None, padding=0, collapse_padding=True, pad_edge=False, header_style="dim")
        table.add_column("block ", justify="right")
        for kind in (grid.kinds[j] for j in columns):
            table.add_column(kind, justify="center", width=_cell_width(kind), overflow="fold")
        # A gap sets the block as a whole apart.
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
        legend.append("  - no such layer", "dim")
    return Stack(*tables, Padding(legend, (1, 0, 0, 0)))


def span(values: np.ndarray) -> tuple[float, float]:
    """Ends of a colour scale over fractions: their range, widened to `MIN_SPAN` inside [0, 1] where it is narrower."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if high - low >= MIN_SPAN:
        return low, high
    low = min(max(0.0, (low + high - MIN_SPAN) / 2), max(1.0, high) - MIN_SPAN)
    return low, low + MIN_SPAN


def _cell_width(kind: str) -> int:
    return min(max(len(kind), 5), 24) + 2


def _columns_that_fit(kinds: Sequence[str], width: int) -> Iterator[list[int]]:
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
    return Text(f"{'-':^{width}}", "dim") if math.isnan(value) else shade(value, width)


def _painted(text: str, at: float, scale: Sequence[tuple[int, int, int]]) -> Text:
    """`text` on the colour at `at` in [0, 1] of a scale of evenly spaced colours."""
    at *= len(scale) - 1
    left = min(int(at), len(scale) - 2)
    red, green, blue = (a + (at - left) * (b - a) for a, b in zip(scale[left], scale[left + 1], strict=True))
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 128
    # Not the named colours: terminals paint those as they please.
    ink = Color.from_rgb(0, 0, 0) if bright else Color.from_rgb(255, 255, 255)
    return Text(text, Style(color=ink, bgcolor=Color.from_rgb(red, green, blue)))
