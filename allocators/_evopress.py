"""EvoPress (arXiv:2410.14649): levels of equal weights, swaps between layers, selection on growing minibatches."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np

from allocators._moves import Moves
from allocators._trials import Trials
from globalopt.protocols import Candidate
from globalopt.values.budget import BYTES_PER_VALUE, Target
from globalopt.values.problem import Problem
from globalopt.values.sizes import Ints, Sizes

LEVELS = 8
"""Levels above and below the start."""

OFFSPRING = 64
SURVIVORS = (8, 2, 1)
TOKENS = (2048, 16384, 65536)
"""Offspring of a generation, the survivors of each stage, and the tokens on which they are evaluated there."""

MOST_SWAPS = 3

DRAWS = 8
"""Mutations drawn per offspring before a generation is smaller: a small problem has fewer different ones."""


def swaps_of_a_mutation(rng: random.Random) -> int:
    """Draw `min(U{1..3}, U{1..3})`: 1, 2 or 3 with probability 5/9, 3/9, 1/9."""
    return min(rng.randint(1, MOST_SWAPS), rng.randint(1, MOST_SWAPS))


class Database:
    """Describe the targets of every layer by level: at level l the target that costs `l step` more than the start's.

    `step = ½ min(s, 1 - s) / LEVELS hidden²` weights, s the sparsity (1 - budget) and hidden the smallest input
    dimension; the same for all layers, so that a swap keeps the budget. Where only rank is free a level is a step of
    it at least.

    The levels of an allocation are an array (layers,), in the order of the table; `least` and `most` are the ends.
    """

    def __init__(self, problem: Problem, start: Mapping[str, Target]) -> None:
        self.table = table = problem.table
        self.moves = moves = Moves(table)
        kept, hidden = problem.budget.kept, min(spec.d_in for spec in problem.specs)
        weights = round(0.5 * min(kept, 1 - kept) / LEVELS * hidden**2)
        rank = 0 if problem.axis == "nnz" else int(moves.unit.max())
        self.step = max(1, rank, weights * (BYTES_PER_VALUE if problem.budget.accounting == "bytes" else 1))
        sizes = table.sizes(start)
        now = sizes.arrays
        self._place = sizes.place
        spare, room = moves.spare(*now), moves.room(*now)
        self.least = -np.minimum(LEVELS, spare // self.step)
        self.most = np.minimum(LEVELS, room // self.step)
        at = []
        for level in range(-LEVELS, LEVELS + 1):
            # What a layer does not have is not looked up; its ends stand there.
            amount = abs(level) * self.step
            if level < 0:
                at.append(moves.shrunk(*now, np.minimum(amount, spare)))
            else:
                at.append(moves.grown(*now, np.minimum(amount, room)) if level else (sizes.rank, sizes.nnz))
        self._rank, self._nnz = (np.stack([found[i] for found in at]) for i in (0, 1))

    def sizes(self, levels: Ints) -> Sizes:
        """Return the targets at `levels`."""
        every = np.arange(len(levels))
        return Sizes(self._place, self._rank[levels + LEVELS, every], self._nnz[levels + LEVELS, every])

    def targets(self, levels: Ints) -> dict[str, Target]:
        """Return the allocation of `levels`, with the rest that rounding leaves in bytes or under a pattern spent."""
        return self.table.targets(self.moves.spend_rest(self.sizes(levels)))

    def mutate(self, levels: Ints, rng: random.Random) -> Ints:
        """Return a copy in which some random layers give up a level, and as many others take one."""
        mutant = levels.copy()
        for _ in range(swaps_of_a_mutation(rng)):
            givers, takers = np.flatnonzero(mutant > self.least), np.flatnonzero(mutant < self.most)
            if len(givers) and len(takers):
                giver, taker = givers[rng.randrange(len(givers))], takers[rng.randrange(len(takers))]
                if giver != taker:
                    mutant[giver] -= 1
                    mutant[taker] += 1
        return mutant


def evopress(trials: Trials, start: Mapping[str, Target], generations: int, rng: random.Random) -> None:
    """Improve `start` for `generations` and nominate every new parent; `OutOfTokens` where the tokens do not suffice.

    Each stage evaluates all candidates on the same random chunks; the parent joins the last stage.
    """
    database = Database(trials.problem, start)
    parent = np.zeros(len(start), np.int64)
    for _ in range(generations):
        known, offspring = {parent.tobytes()}, []
        for _ in range(DRAWS * OFFSPRING):
            mutant = database.mutate(parent, rng)
            if mutant.tobytes() not in known:
                known.add(mutant.tobytes())
                offspring.append(mutant)
            if len(offspring) == OFFSPRING:
                break
        if not offspring:
            return
        made = [(levels, database.targets(levels)) for levels in offspring]
        for survivors, tokens in zip(SURVIVORS, TOKENS, strict=True):
            if survivors == SURVIVORS[-1]:
                made = [(parent, database.targets(parent)), *made]
            kept = fittest(trials, [targets for _, targets in made], tokens, survivors, rng)
            made = [made[i] for i in kept]
        levels, targets = made[0]
        if levels is not parent:
            parent = levels
            trials.nominate(targets)


def fittest(
    trials: Trials, candidates: Sequence[Candidate], tokens: int, survivors: int, rng: random.Random
) -> list[int]:
    """Select the `survivors` candidates of least mean loss, best first, on random whole chunks of about `tokens`."""
    available = len(trials.all_chunks)
    count = min(available, max(1, tokens // trials.objective.chunk_tokens))
    means = trials.losses(candidates, rng.sample(range(available), count)).mean(1)
    return means.argsort(stable=True)[:survivors].tolist()
