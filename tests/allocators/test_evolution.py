"""Facts special to the evolutions: EvoPress' schedule, and what guidance, racing and feedback are worth."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from allocators import Knapsack, Uniform
from allocators._evopress import LEVELS, Database, evopress, swaps_of_a_mutation
from allocators._feedback import MISFIT, PRIOR, Feedback
from allocators._moves import Moves
from allocators._trials import Trials
from allocators.evolution import Evolution, Preset
from globalopt.errors import UsageError
from globalopt.objective.journal import RecordedObjective, Selection
from globalopt.values.layer import NM
from tests.objectives import BentObjective
from tests.surfaces import problem


class Killed(Exception):
    pass


@dataclass
class Listed(BentObjective):
    """Chunks of 2048 tokens, as EvoPress' first stage asks; lists the sizes of all questions."""

    chunks: int = 64
    limit: int = 10**9
    questions: list[tuple[int, int]] = field(default_factory=list)

    @property
    def chunk_tokens(self) -> int:
        return 2048

    def losses(self, candidates, chunks):
        assert len(set(chunks)) == len(chunks)
        self.questions.append((len(candidates), len(chunks)))
        return super().losses(candidates, chunks)


def test_a_mutation_has_1_56_swaps_on_average():
    rng = random.Random(0)
    drawn = Counter(swaps_of_a_mutation(rng) for _ in range(9000))
    assert sum(n * count for n, count in drawn.items()) / 9000 == pytest.approx(14 / 9, abs=0.03)
    assert [drawn[n] / 9000 for n in (1, 2, 3)] == pytest.approx([5 / 9, 3 / 9, 1 / 9], abs=0.02)


def test_a_generation_asks_for_as_many_tokens_as_published():
    p = problem(0.5, layers=12)
    objective = Listed(p)
    start = Uniform(rank_share=0.0).allocate(p).targets
    evopress(Trials(p, objective, [start]), start, 1, random.Random(0))
    assert objective.questions == [(64, 1), (8, 8), (3, 32)]
    assert sum(candidates * chunks for candidates, chunks in objective.questions) * 2048 == 458_752


def test_no_more_chunks_than_there_are():
    p = problem(0.5, layers=12)
    objective = Listed(p, chunks=5)
    start = Uniform(rank_share=0.0).allocate(p).targets
    evopress(Trials(p, objective, [start]), start, 1, random.Random(0))
    assert objective.questions == [(64, 1), (8, 5), (3, 5)]


@pytest.mark.parametrize(("accounting", "pattern"), [("params", None), ("bytes", None), ("params", NM(2, 4))])
def test_levels_cost_the_same_everywhere(accounting, pattern):
    p = problem(0.6 if pattern else 0.5, accounting=accounting, pattern=pattern)
    start = dict(Uniform(rank_share=0.0).allocate(p).targets)
    database = Database(p, start)
    table, begun = p.table, p.table.sizes(start)
    before = table.costs(*begun.arrays)
    assert database.sizes(0 * database.least) == begun
    assert database.least.min() >= -LEVELS
    assert database.most.max() <= LEVELS
    for level in range(-LEVELS, LEVELS + 1):
        sizes = database.sizes(np.full(len(start), level))
        less = before + level * database.step - table.costs(*sizes.arrays)
        less = less[(database.least <= level) & (level <= database.most)]
        assert (less == 0).all() if accounting == "params" and not pattern else (less >= 0).all()
    rng = random.Random(0)
    parent = np.zeros(len(start), np.int64)
    for _ in range(50):
        mutant = database.mutate(parent, rng)
        assert mutant.sum() == 0
        assert abs(mutant - parent).sum() <= 6
        assert (database.least <= mutant).all()
        assert (mutant <= database.most).all()
        assert p.used(database.targets(mutant)) <= p.budget.limit
        parent = mutant


def test_evopress_improves_on_uniform_and_knows_no_rank():
    p = problem(0.5, layers=12)
    objective = BentObjective(p, limit=40_000)
    found = Evolution(preset=Preset.EVOPRESS).allocate(p, objective)
    uniform = Uniform(rank_share=0.0).allocate(p)
    assert objective.true(found.targets) < objective.true(uniform.targets)
    assert all(target.rank == 0 for target in found.targets.values())
    assert objective.tokens <= 40_000


@pytest.mark.parametrize("seed", range(2))
def test_guided_finds_what_the_surfaces_do_not_know(seed):
    """Nearly the knapsack of the true surfaces, at a fraction of the tokens of EvoPress, whose start is far behind."""
    p = problem(0.4, seed=seed, layers=12)
    objective = BentObjective(p, limit=20_000)
    knapsack = objective.true(Knapsack().allocate(p).targets)
    true = tuple(replace(s, error=tuple(e * objective.multipliers[s.spec.name] for e in s.error)) for s in p.surfaces)
    best = objective.true(Knapsack().allocate(replace(p, surfaces=true)).targets)
    found = objective.true(Evolution().allocate(p, objective).targets)
    assert found - best < 0.2 * (knapsack - best)


def test_guided_without_tokens_is_the_better_start():
    p = problem(0.4)
    found = Evolution().allocate(p, BentObjective(p, limit=0))
    assert dict(found.targets) == dict(Knapsack().allocate(p).targets)


def test_noise_alone_never_moves_the_incumbent():
    """Windows whose losses say nothing: in 20 searches, at most one incumbent should fall to chance."""

    class Noise(BentObjective):
        def losses(self, candidates, chunks):
            super().losses(candidates, chunks)
            rows = []
            for candidate in candidates:
                key = zlib.crc32(repr(sorted(candidate.items(), key=str)).encode())
                rows.append(1 + 0.1 * torch.randn(self.chunks, 4, generator=torch.Generator().manual_seed(key)))
            return torch.stack([row[list(chunks)].flatten().double() for row in rows])

    moved = 0
    for seed in range(8):
        p = problem(0.4, seed=seed, layers=4)
        objective = Noise(p, limit=6000)
        starts = [dict(a.allocate(p).targets) for a in (Knapsack(), Uniform())]
        moved += dict(Evolution(generations=6).allocate(p, objective).targets) not in starts
    assert moved <= 2


@pytest.mark.parametrize("preset", Preset)
def test_a_killed_search_ends_with_the_same_answer(preset, tmp_path):
    p = problem(0.4, layers=8)
    search = Evolution(preset=preset, generations=4)

    def recorded(model: BentObjective, journal: Path, die: int = -1) -> RecordedObjective:
        def ask(candidates, chunks):
            if model.asked == die:
                raise Killed
            return model.losses(candidates, chunks)

        return RecordedObjective(ask, Selection((4,) * 6, 10), p, model.limit, journal)

    model = BentObjective(p)
    undisturbed = search.allocate(p, recorded(model, tmp_path / "whole"))
    for die in (3, model.asked - 1):
        mortal = BentObjective(p)
        with pytest.raises(Killed):
            search.allocate(p, recorded(mortal, tmp_path / f"{die}", die))
        assert search.allocate(p, recorded(mortal, tmp_path / f"{die}")) == undisturbed
        assert mortal.tokens == model.tokens


def test_feedback_learns_the_multipliers():
    p = problem(0.4, layers=6)
    table = p.table
    objective = BentObjective(p, power=1.0)
    rng = random.Random(0)
    before = table.sizes(Uniform().allocate(p).targets)
    feedback = Feedback(table, 1.0)
    assert feedback.multipliers.tolist() == [1.0] * 6
    for _ in range(60):
        after = Moves(table).random_swap(before, 12, rng)
        assert after is not None
        now, then = objective.losses([table.targets(before), table.targets(after)], range(6))
        feedback.tell(before, after, (then - now) / objective.scales.mean())
        before = after
    wanted = [objective.multipliers[name] for name in table.names]
    assert feedback.multipliers == pytest.approx(wanted, rel=0.3)
    assert feedback.corrected().error == pytest.approx(feedback.multipliers[table.layer] * table.error)


def test_feedback_is_the_ridge_solution_of_all_layers():
    """Against the normal equations, whose size is that of the layers."""
    p = problem(0.4, layers=6)
    table = p.table
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    before = table.sizes(Uniform().allocate(p).targets)
    feedback = Feedback(table, 2.0)
    precision = np.eye(6) / (PRIOR * 2.0) ** 2
    moment = precision.sum(1) * 2.0
    for _ in range(15):
        after = Moves(table).random_swap(before, 12, rng)
        assert after is not None
        differences = 0.1 * torch.randn(24, generator=generator).double()
        feedback.tell(before, after, differences)
        errors = [table.predict(*sizes.arrays) for sizes in (before, after)]
        change = errors[1] - errors[0]
        variance = float(differences.var()) / 24 + (MISFIT * 2.0 * abs(change).sum()) ** 2
        precision += np.outer(change, change) / variance
        moment += change * float(differences.mean()) / variance
        assert feedback.multipliers == pytest.approx(np.linalg.solve(precision, moment).clip(0.2, 20.0), rel=1e-9)


def test_feedback_of_noise_stays_near_the_scale():
    p = problem(0.4, layers=6)
    before = p.table.sizes(Uniform().allocate(p).targets)
    feedback = Feedback(p.table, 2.0)
    after = Moves(p.table).random_swap(before, 12, random.Random(0))
    assert after is not None
    feedback.tell(before, after, torch.randn(24, generator=torch.Generator().manual_seed(0)).double() * 1e3)
    assert all(1.5 < m < 2.5 for m in feedback.multipliers)


def test_options_out_of_range():
    with pytest.raises(UsageError, match="rank_share"):
        Evolution(rank_share=2.0)
    with pytest.raises(UsageError, match="generations"):
        Evolution(generations=0)
