"""EvoPress (arXiv:2410.14649): levels of equal weights, swaps between layers, selection on growing minibatches."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from allocators._moves import LayerMoves, layers_of, spend_rest
from allocators._trials import Trials
from globalopt.protocols import Candidate
from globalopt.values.budget import BYTES_PER_VALUE, Target
from globalopt.values.problem import Problem

LEVELS = 8
"""Levels above and below the start."""

OFFSPRING = 64
SURVIVORS = (8, 2, 1)
TOKENS = (2048, 16384, 65536)
"""Offspring of a generation, the survivors of each stage, and the tokens on which they are evaluated there."""

MOST_SWAPS = 3

DRAWS = 8
"""Mutations drawn per offspring before a generation is smaller: a small problem has fewer different ones."""

Levels = dict[str, int]


def swaps_of_a_mutation(rng: random.Random) -> int:
    """Draw `min(U{1..3}, U{1..3})`: 1, 2 or 3 with probability 5/9, 3/9, 1/9."""
    return min(rng.randint(1, MOST_SWAPS), rng.randint(1, MOST_SWAPS))


class Database:
    """Describe the targets of every layer by level: at level l the target that costs `l step` more than the start's.

    `step = ½ min(s, 1 - s) / LEVELS hidden²` weights, s the sparsity (1 - budget) and hidden the smallest input
    dimension; the same for all layers, so that a swap keeps the budget. Where only rank is free a level is a step of
    it at least.
    """

    def __init__(self, problem: Problem, start: Mapping[str, Target]) -> None:
        self.problem = problem
        self.layers = layers_of(problem)
        kept, hidden = problem.budget.kept, min(spec.d_in for spec in problem.specs)
        weights = round(0.5 * min(kept, 1 - kept) / LEVELS * hidden**2)
        rank = 0 if problem.axis == "nnz" else max(layer.unit for layer in self.layers.values())
        self.step = max(1, rank, weights * (BYTES_PER_VALUE if problem.budget.accounting == "bytes" else 1))
        self.levels = {name: self._levels(layer, start[name]) for name, layer in self.layers.items()}

    def _levels(self, layer: LayerMoves, start: Target) -> dict[int, Target]:
        down = min(LEVELS, layer.spare(start) // self.step)
        up = min(LEVELS, layer.room(start) // self.step)
        found = {-level: layer.shrunk(start, level * self.step) for level in range(1, down + 1)}
        return found | {level: layer.grown(start, level * self.step) for level in range(1, up + 1)} | {0: start}

    def targets(self, levels: Levels) -> dict[str, Target]:
        """Return the allocation of `levels`, with the rest that rounding leaves in bytes or under a pattern spent."""
        found = {name: self.levels[name][level] for name, level in levels.items()}
        return spend_rest(self.problem, self.layers, found)

    def mutate(self, levels: Levels, rng: random.Random) -> Levels:
        """Return a copy in which some random layers give up a level, and as many others take one."""
        mutant = dict(levels)
        for _ in range(swaps_of_a_mutation(rng)):
            givers = [name for name, level in mutant.items() if level - 1 in self.levels[name]]
            takers = [name for name, level in mutant.items() if level + 1 in self.levels[name]]
            if givers and takers:
                giver, taker = rng.choice(givers), rng.choice(takers)
                if giver != taker:
                    mutant[giver] -= 1
                    mutant[taker] += 1
        return mutant


def evopress(trials: Trials, start: Mapping[str, Target], generations: int, rng: random.Random) -> None:
    """Improve `start` for `generations` and nominate every new parent; `OutOfTokens` where the tokens do not suffice.

    Each stage evaluates all candidates on the same random chunks; the parent joins the last stage.
    """
    database = Database(trials.problem, start)
    parent = dict.fromkeys(sorted(start), 0)
    for _ in range(generations):
        offspring: list[Levels] = []
        for _ in range(DRAWS * OFFSPRING):
            mutant = database.mutate(parent, rng)
            if mutant != parent and mutant not in offspring:
                offspring.append(mutant)
            if len(offspring) == OFFSPRING:
                break
        if not offspring:
            return
        for survivors, tokens in zip(SURVIVORS, TOKENS, strict=True):
            if survivors == SURVIVORS[-1]:
                offspring = [parent, *offspring]
            kept = fittest(trials, [database.targets(levels) for levels in offspring], tokens, survivors, rng)
            offspring = [offspring[i] for i in kept]
        if offspring[0] != parent:
            parent = offspring[0]
            trials.nominate(database.targets(parent))


def fittest(
    trials: Trials, candidates: Sequence[Candidate], tokens: int, survivors: int, rng: random.Random
) -> list[int]:
    """Select the `survivors` candidates of least mean loss, best first, on random whole chunks of about `tokens`."""
    available = len(trials.all_chunks)
    count = min(available, max(1, tokens // trials.objective.chunk_tokens))
    means = trials.losses(candidates, rng.sample(range(available), count)).mean(1)
    return means.argsort(stable=True)[:survivors].tolist()
