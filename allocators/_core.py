"""The core of a multiple-choice knapsack: the options that can still be in a better allocation, solved by HiGHS."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, hstack

from globalopt.values.option_table import OptionTable, first_least
from globalopt.values.sizes import Floats, Ints, Sizes

log = logging.getLogger(__name__)

TOLERANCE = 1e-6
"""Of HiGHS, for variables that are integers."""


@dataclass(frozen=True)
class Pieces:
    """Describe parts of layers' choices: one target, or all targets between two neighbours that differ in nonzeros.

    Args:
        layer: (pieces,) their layers.
        place: (pieces,) the places of their storages in the table.
        start, end: (pieces,) the ranks and nonzeros of the neighbours; the same for a single target.
        cost, error: (pieces,) of `start`.
        rise, fall: (pieces,) the cost of `end` less that of `start`, and the error of `start` less that of `end`.
    """

    layer: Ints
    place: Ints
    start: tuple[Ints, Ints]
    end: tuple[Ints, Ints]
    cost: Ints
    error: Floats
    rise: Ints
    fall: Floats


def solve_core(
    table: OptionTable, price: float, bound: float, least: float, gap: float, nodes: int
) -> tuple[Sizes | None, float]:
    """Solve for the best choice of one piece per layer; return it with a bound, or None where HiGHS found none.

    At a `price` of a unit of budget the reduced cost of an option is its `error + price cost` less the least of its
    layer. The error of a choice that contains the option is at least the Lagrangian `bound` plus the reduced cost; so
    an allocation of error `least` can only be improved by pieces whose reduced cost is at most `least - bound`, a
    handful per layer.

        min sum error y - fall t   s.t.  sum over a layer's pieces y = 1,  0 <= t <= y,  sum cost y + rise t <= limit

    with `y` binary. Between two counts of nonzeros this is exact, as surfaces are linear there. Where only rank is
    free, one rank costs too much to be taken in fractions: every rank between two options is then a piece of its own.

    Args:
        price, bound: of the relaxation.
        least: error of a known allocation.
        gap, nodes: relative gap and number of nodes at which HiGHS stops.
    Source:
        the reduction by reduced costs: Ingargiola and Korsh 1973; the core: Pisinger 1995, A minimal algorithm for the
        multiple-choice knapsack problem, doi:10.1016/0377-2217(95)00015-I.
    """
    if least - bound <= gap * least:
        return None, bound
    pieces = _pieces(table, price, least - bound)
    count, layers = len(pieces.layer), len(table.names)
    choose = csr_array((np.ones(count), (pieces.layer, np.arange(count))), shape=(layers, count))
    scale = max(least, 1e-30)
    # Costs are whole: half a unit more admits no other choice of whole pieces, and absorbs HiGHS' tolerance.
    room = 0.5 if table.axis == "rank" else 0.0
    with _silent():
        result = milp(
            np.concatenate([pieces.error, -pieces.fall]) / scale,
            integrality=np.repeat([1, 0], count),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(hstack([choose, csr_array(choose.shape)]), 1, 1),
                LinearConstraint(hstack([-eye_array(count), eye_array(count)]), -np.inf, 0),
                LinearConstraint(np.concatenate([pieces.cost, pieces.rise])[None], -np.inf, table.budget.limit + room),
            ],
            options={"mip_rel_gap": gap, "node_limit": nodes},
        )
    if result.x is None:
        log.warning("HiGHS found no allocation (%s); the Lagrangian one is used.", result.message)
        return None, bound
    proved = max(bound, min(least, float(result.mip_dual_bound) * scale))
    y, t = np.split(result.x, 2)
    # For every layer the piece with the largest y.
    chosen = first_least(-y, np.searchsorted(pieces.layer, np.arange(layers)))
    sizes = _within(table, pieces, chosen, t)
    # In bytes a count between two others may cost more than the line between them says.
    return (sizes if table.slack(sizes) >= 0 else None), proved


def _pieces(table: OptionTable, price: float, slack: float) -> Pieces:
    """Find the pieces whose reduced cost is at most `slack`, at one of their ends; ordered by layer."""
    value = table.error + price * table.cost
    most = np.minimum.reduceat(value, table.starts) + slack
    if table.axis == "nnz":
        place, rank, nnz = table.place, table.rank, table.nnz
        cost, error = table.cost, table.error
        follows = np.append((place[1:] == place[:-1]) & (rank[1:] == rank[:-1]), False)
        alone = ~follows & ~np.append(False, follows[:-1])
        start = np.flatnonzero(follows | alone)
        end = start + follows[start]
    else:
        place, rank, nnz = _whole_ranks(table)
        cost, error = table.costs(place, rank, nnz), table.predict(place, rank, nnz)
        value = error + price * cost
        start = end = np.arange(len(place))
    layer = table.owner[place]
    near = np.minimum(value[start], value[end]) <= most[layer[start]]
    start, end = start[near], end[near]
    return Pieces(
        layer[start],
        place[start],
        (rank[start], nnz[start]),
        (rank[end], nnz[end]),
        cost[start],
        error[start],
        cost[end] - cost[start],
        error[start] - error[end],
    )


def _whole_ranks(table: OptionTable) -> tuple[Ints, Ints, Ints]:
    """Return the options with all ranks between two of the same nonzeros that are within the limits."""
    order = np.lexsort((table.rank, table.nnz, table.place))
    place, rank, nnz = table.place[order], table.rank[order], table.nnz[order]
    step = table.limits.rank_multiple
    follows = np.append((place[1:] == place[:-1]) & (nnz[1:] == nnz[:-1]), False)
    # Every option stands for itself and for the ranks up to the next one.
    counts = np.where(follows, (np.append(rank[1:], 0) - rank) // step, 1)
    each = np.repeat(np.arange(len(place)), counts)
    number = np.arange(len(each)) - np.repeat(np.cumsum(counts) - counts, counts)
    return place[each], rank[each] + number * step, nnz[each]


def _within(table: OptionTable, pieces: Pieces, chosen: Ints, t: Floats) -> Sizes:
    """Return the targets of a solution: pieces at one of their ends, and one between them on the rest of the budget.

    One constraint leaves at most one piece between its ends.

    Args:
        chosen: (layers,) the pieces. t: (pieces,) how far each is taken.
    """
    t = t[chosen]
    between = (t > TOLERANCE) & (t < 1 - TOLERANCE)
    ended = t >= 1 - TOLERANCE
    rank, nnz = (np.where(ended, pieces.end[i][chosen], pieces.start[i][chosen]) for i in (0, 1))
    place = pieces.place[chosen]
    if between.any():
        middle = np.flatnonzero(between)[-1:]
        piece = chosen[middle]
        left = table.slack(Sizes(place, rank, nnz))
        limit = pieces.cost[piece] + left
        rank[middle], nnz[middle] = table.grow(place[middle], rank[middle], nnz[middle], pieces.end[1][piece], limit)
    return Sizes(place, rank, nnz)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Drop the text that HiGHS writes past Python to the standard output whatever its options say."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
