"""Divide work over processes: by cost, in consecutive spans, and as a grid."""

from __future__ import annotations

from collections.abc import Sequence


def bins(costs: Sequence[float], count: int) -> list[int]:
    """Divide items over `count` bins of about equal cost: the largest first, each into the bin that holds least.

    No bin holds more than 4/3 of what the best division puts into its fullest one (Graham 1969).

    Returns:
        the bin of every item.

    >>> bins([3.0, 1.0, 2.0], count=2)
    [0, 1, 1]
    """
    loads, found = [0.0] * count, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        found[i] = min(range(count), key=loads.__getitem__)
        loads[found[i]] += costs[i]
    return found


def span(total: int, number: int, count: int) -> range:
    """Return the consecutive items of one of `count` processes, where each gets as many as the others, or one less.

    >>> [list(span(5, number, 2)) for number in range(2)]
    [[0, 1], [2, 3, 4]]
    """
    return range(total * number // count, total * (number + 1) // count)


def grid(rows: int, columns: int, number: int, count: int) -> tuple[range, range]:
    """Divide the cells of a table over processes, as parts of consecutive rows and columns.

    Of all ways in which `count` processes can stand in a rectangle, the one whose largest part is least; of several,
    the one that divides the rows most, as what is made for a row is made by fewer processes then.

    Returns:
        the rows and columns of one process; empty where there are more processes than parts.

    >>> grid(rows=4, columns=1, number=1, count=2), grid(rows=1, columns=6, number=0, count=2)
    ((range(2, 4), range(0, 1)), (range(0, 1), range(0, 3)))
    """
    down = min(
        range(1, count + 1),
        key=lambda down: (-(-rows // down) * -(-columns // (count // down)), -down),
    )
    across = count // down
    place, beside = divmod(number, across)
    if place >= down:
        return range(0), range(0)
    return span(rows, place, down), span(columns, beside, across)
