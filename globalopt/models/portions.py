"""Share the windows of a text out to the processes of a job."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from globalopt.errors import UsageError
from globalopt.machine import ranks


@dataclass(frozen=True)
class Portion:
    """Name the windows of a text that one process runs, batch by batch.

    Args:
        windows: the windows of every batch, by their places in the whole text, ascending.
        numbers: for every batch the number of the batch of the whole text that it is a part of, or, where it is made of
            parts of several, of the first.
        weights: for every batch its share of that batch.
        whole: number of batches of the whole text.
        size: windows of a batch of the whole text but for the last.

    >>> part = Portion(((0, 1), (2,)), (0, 1), (1.0, 0.5), whole=2, size=2)  # another process runs window 3
    >>> part.place(1), part.weight(1), part.place(2), part.weight(2)
    (1, 0.5, None, 0.0)
    """

    windows: tuple[tuple[int, ...], ...]
    numbers: tuple[int, ...]
    weights: tuple[float, ...]
    whole: int
    size: int

    @classmethod
    def all(cls, sizes: Iterable[int]) -> Portion:
        """Name all windows of batches of so many windows each.

        >>> Portion.all([2, 1]).windows
        ((0, 1), (2,))
        """
        found: list[tuple[int, ...]] = []
        for size in sizes:
            start = found[-1][-1] + 1 if found else 0
            found.append(tuple(range(start, start + size)))
        return cls(
            tuple(found), tuple(range(len(found))), (1.0,) * len(found), len(found), max(map(len, found), default=1)
        )

    @classmethod
    def own(cls, count: int, size: int, every: int = 1, together: bool = False) -> Portion:
        """Name the windows of this process: with several, every batch of the whole text is divided among them.

        Args:
            count: windows of the whole text.
            size: windows of a batch of it.
            every: something is done with one of so many batches; windows of those are dealt out apart from the others,
                so that each process has as many of them.
            together: whether windows of batches between which `every` does not tell are joined in batches of `size`.
        Raises:
            UsageError: there are fewer windows in one of `every` batches than processes.

        >>> Portion.own(count=5, size=2).windows
        ((0, 1), (2, 3), (4,))
        """
        if not ranks.several():
            return cls.all(min(size, count - start) for start in range(0, count, size))
        kinds = [[i for i in range(count) if i // size % every == kind] for kind in range(every)]
        if len(kinds[0]) < ranks.count():
            raise UsageError(
                f"There are {ranks.count()} processes, and {len(kinds[0])} calibration windows that each of them needs "
                "some of. Raise --nsamples, or start fewer processes."
            )
        dealt = [i for kind in kinds for i in kind][ranks.number() :: ranks.count()]
        found: list[tuple[int, ...]] = []
        for kind in range(every):
            mine = [i for i in dealt if i // size % every == kind]
            if together:
                found += [tuple(mine[i : i + size]) for i in range(0, len(mine), size)]
            else:
                found += [tuple(i for i in mine if i // size == n) for n in sorted({i // size for i in mine})]
        found.sort()
        numbers = tuple(batch[0] // size for batch in found)
        weights = tuple(len(batch) / min(size, count - n * size) for batch, n in zip(found, numbers, strict=True))
        return cls(tuple(found), numbers, weights, -(-count // size), size)

    def place(self, number: int) -> int | None:
        """Return which batch of this process is its part of a batch of the whole text; None where it has none."""
        return self.numbers.index(number) if number in self.numbers else None

    def weight(self, number: int) -> float:
        """Return the share that this process has of a batch of the whole text."""
        place = self.place(number)
        return 0.0 if place is None else self.weights[place]

    def every(self, every: int) -> list[int]:
        """List the batches of this process that are of one of `every` batches of the whole text."""
        return [place for place, number in enumerate(self.numbers) if number % every == 0]

    def some(self, every: int) -> Portion:
        """Name the windows of one of `every` batches alone, numbered among themselves.

        >>> Portion.all([2, 2, 2]).some(2).windows
        ((0, 1), (2, 3))
        """
        places = self.every(every)
        kept = [self.windows[place] for place in places]
        if len(self.numbers) == self.whole and set(self.weights) <= {1.0}:
            return Portion.all(map(len, kept))
        windows = tuple(tuple(i // self.size // every * self.size + i % self.size for i in batch) for batch in kept)
        numbers = tuple(self.numbers[place] // every for place in places)
        weights = tuple(self.weights[place] for place in places)
        return Portion(windows, numbers, weights, -(-self.whole // every), self.size)
