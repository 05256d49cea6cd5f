"""Facts special to the search over warps: its knapsack, its study, its resumption."""

from __future__ import annotations

from dataclasses import dataclass, replace
from multiprocessing import Queue, get_context
from pathlib import Path

import numpy as np
import pytest

from allocators import Knapsack, Uniform
from allocators._warp import Sampler, Warp
from allocators._warp_study import nearest
from allocators.knapsack import relaxed_knapsack
from allocators.optuna_warp import OptunaWarp
from globalopt.errors import ArtefactError
from globalopt.objective.journal import RecordedObjective, Selection
from globalopt.values.layer import NM
from globalopt.values.problem import Allocation, Problem
from globalopt.values.sizes import Sizes
from tests.objectives import BentObjective
from tests.surfaces import problem

SAMPLERS = [Sampler.TPE, Sampler.CMAES, pytest.param(Sampler.GP, marks=pytest.mark.slow)]


class Killed(Exception):
    pass


@dataclass
class Dying(BentObjective):
    """Raises at its `die`-th question."""

    die: int = 0

    def losses(self, candidates, chunks):
        if self.asked == self.die:
            raise Killed
        return super().losses(candidates, chunks)


def with_kinds(p: Problem, kinds: int = 3) -> Problem:
    surfaces = [replace(s, spec=replace(s.spec, kind=f"k{i % kinds}")) for i, s in enumerate(p.surfaces)]
    return replace(p, surfaces=tuple(surfaces))


@dataclass
class BentByKind(BentObjective):
    """The surfaces are wrong by a factor per kind: what the warp can express."""

    @property
    def multipliers(self):
        factors = {"k0": 4.0, "k1": 1.0, "k2": 0.25}
        return {spec.name: factors[spec.kind] for spec in self.problem.specs}


def test_one_trial_is_the_knapsack():
    p = problem(0.4)
    found = OptunaWarp(trials=1).allocate(p, BentObjective(p, bend=0))
    assert dict(found.targets) == dict(Knapsack().allocate(p).targets)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_finds_a_bend_of_its_family(sampler):
    p = with_kinds(problem(0.4, layers=9))
    objective = BentByKind(p)
    found = OptunaWarp(sampler=sampler, trials=40).allocate(p, objective)
    factors = objective.multipliers
    surfaces = [replace(s, error=tuple(e * factors[s.spec.name] for e in s.error)) for s in p.surfaces]
    best = objective.true(Knapsack().allocate(replace(p, surfaces=tuple(surfaces))).targets)
    start = objective.true(Knapsack().allocate(p).targets)
    assert objective.true(found.targets) - best < 0.25 * (start - best)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_killed_search_ends_with_the_same_answer(sampler, tmp_path):
    """Also where its study is in a file: then trials that are finished are not made again."""
    p = with_kinds(problem(0.4, layers=9))
    alone = Dying(p, die=-1)
    undisturbed = OptunaWarp(sampler=sampler, trials=16).allocate(p, alone)

    def search(path: Path, die: int = -1) -> Allocation:
        return OptunaWarp(sampler=sampler, trials=16, study=str(path)).allocate(p, Dying(p, die=die))

    assert search(tmp_path / "whole") == undisturbed
    for die in (1, alone.asked // 2, alone.asked - 1):
        path = tmp_path / f"killed-{die}"
        with pytest.raises(Killed):
            search(path, die)
        assert search(path) == undisturbed
    # Finished already: only what is needed for the verdict is evaluated.
    assert search(tmp_path / "whole") == undisturbed


def test_resumed_it_stops_at_the_same_token(tmp_path):
    limit = 3000
    p = with_kinds(problem(0.4, layers=9))
    path = str(tmp_path / "journal")
    whole = BentObjective(p, limit=limit)
    undisturbed = OptunaWarp().allocate(p, whole)
    with pytest.raises(Killed):
        OptunaWarp(study=path).allocate(p, Dying(p, limit=limit, die=10))
    again = BentObjective(p, limit=limit)
    assert OptunaWarp(study=path).allocate(p, again) == undisturbed
    assert again.tokens == whole.tokens <= limit


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_killed_search_proposes_the_same_from_the_journal(sampler, tmp_path):
    """The journal of losses tells the study, which is in memory, the same again; nothing is evaluated twice."""
    p = with_kinds(problem(0.4, layers=9))
    search = OptunaWarp(sampler=sampler, trials=16)

    def recorded(model: BentObjective, journal: Path) -> RecordedObjective:
        return RecordedObjective(model.losses, Selection((4,) * 6, 10), p, model.limit, journal)

    model = Dying(p, die=-1)
    whole = recorded(model, tmp_path / "whole")
    undisturbed = search.allocate(p, whole)
    dying = Dying(p, die=15)
    with pytest.raises(Killed):
        search.allocate(p, recorded(dying, tmp_path / "killed"))
    dying.die = -1
    again = recorded(dying, tmp_path / "killed")
    assert search.allocate(p, again) == undisturbed
    assert again.tokens == whole.tokens
    assert dying.tokens == model.tokens
    assert again.evaluations == whole.evaluations


def test_workers_share_a_study(tmp_path):
    p = with_kinds(problem(0.4, layers=9))
    path = str(tmp_path / "journal")
    search = OptunaWarp(trials=12, study=path)
    objective = BentByKind(p)
    first = objective.true(search.allocate(p, objective).targets)
    other = replace(search, trials=24, worker=1)
    both = other.allocate(p, BentByKind(p))
    assert objective.true(both.targets) < first
    # A third that adds nothing returns the best of all, which it did not find.
    assert replace(other, worker=2).allocate(p, BentByKind(p)) == both
    alone = OptunaWarp(trials=24).allocate(p, BentByKind(p))
    assert dict(alone.targets) != dict(both.targets)


def test_workers_at_the_same_time(tmp_path):
    """Two searches take turns, each seeing the other's trials as they come."""
    p = with_kinds(problem(0.4, layers=9))
    path = str(tmp_path / "journal")

    @dataclass
    class Interrupted(BentByKind):
        other: BentByKind | None = None

        def losses(self, candidates, chunks):
            if self.other is not None and self.asked and self.asked % 6 == 0:
                more = len((tmp_path / "journal").read_text().splitlines())
                OptunaWarp(trials=min(20, more), worker=1, study=path).allocate(p, self.other)
            return super().losses(candidates, chunks)

    search = OptunaWarp(trials=20, study=path)
    found = search.allocate(p, Interrupted(p, other=BentByKind(p)))
    assert found.targets == search.allocate(p, BentByKind(p)).targets


def test_pruning_saves_tokens():
    p = with_kinds(problem(0.4, layers=9))
    objective = BentByKind(p, chunks=16)
    OptunaWarp(trials=30).allocate(p, objective)
    assert objective.tokens < 0.6 * 30 * 16 * objective.chunk_tokens


def test_the_nearest_warp_of_uniform_is_nearer_than_the_knapsack():
    table = with_kinds(problem(0.4, layers=12)).table
    warp = Warp.of(table.specs)
    uniform = table.sizes(Uniform().allocate(with_kinds(problem(0.4, layers=12))).targets)

    def params(sizes: Sizes) -> np.ndarray:
        return np.maximum(1, sizes.rank * table.per_rank + sizes.nnz)

    def distance(sizes: Sizes) -> float:
        return float(np.linalg.norm(np.log(params(sizes) / params(uniform))))

    near = relaxed_knapsack(warp.apply(table, nearest(table, warp, uniform)))
    assert distance(near) < distance(relaxed_knapsack(table))


def test_nearest_finds_the_coefficients_of_a_warped_knapsack():
    table = with_kinds(problem(0.5, layers=12)).table
    warp = Warp.of(table.specs)
    theta = np.array([1.0, 0.0, -1.0, 0.0, 0.0, 0.0])
    found = np.array(nearest(table, warp, relaxed_knapsack(warp.apply(table, theta))))
    assert np.corrcoef(found[:3], theta[:3])[0, 1] > 0.5


def test_the_study_of_another_search_is_refused(tmp_path):
    p = problem(0.4)
    path = str(tmp_path / "journal")
    OptunaWarp(trials=2, study=path).allocate(p, BentObjective(p))
    with pytest.raises(ArtefactError, match="another spread"):
        OptunaWarp(trials=3, spread=1.0, study=path).allocate(p, BentObjective(p))


def test_a_study_that_is_no_journal_is_refused(tmp_path):
    p = problem(0.4)
    (tmp_path / "study").write_text("this is no journal\n")
    for path in (tmp_path / "study", tmp_path / "missing" / "study"):
        with pytest.raises(ArtefactError, match="no journal of a study"):
            OptunaWarp(trials=2, study=str(path)).allocate(p, BentObjective(p))


def test_under_a_pattern():
    p = with_kinds(problem(0.65, pattern=NM(2, 4)))
    found = OptunaWarp(trials=8).allocate(p, BentObjective(p))
    assert all(target.pattern == NM(2, 4) for target in found.targets.values())


def search_elsewhere(folder: Path, worker: int, queue: Queue) -> None:
    """In a process of its own: a search that shares its study and its journal of losses."""
    p = with_kinds(problem(0.4, layers=9))
    model = BentByKind(p)
    objective = RecordedObjective(model.losses, Selection((4,) * 6, 10), p, model.limit, folder / "losses")
    search = OptunaWarp(trials=16, worker=worker, study=str(folder / "study"))
    found = search.allocate(p, objective)
    queue.put((worker, model.true(found.targets)))


def test_two_processes_share_a_study_and_a_journal(tmp_path):
    context = get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=search_elsewhere, args=(tmp_path, worker, queue)) for worker in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    found = dict(queue.get(timeout=10) for _ in workers)
    p = with_kinds(problem(0.4, layers=9))
    model = BentByKind(p)
    assert max(found.values()) < model.true(Knapsack().allocate(p).targets)
    # The study is whole, and a worker that comes later adds nothing to it and evaluates nothing on the model.
    objective = RecordedObjective(model.losses, Selection((4,) * 6, 10), p, model.limit, tmp_path / "losses")
    last = OptunaWarp(trials=16, worker=2, study=str(tmp_path / "study")).allocate(p, objective)
    assert model.true(last.targets) == pytest.approx(min(found.values()))
    assert model.tokens == 0
