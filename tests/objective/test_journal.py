"""A search that was killed asks again, is answered from its journal, and ends as if nothing had happened."""

from __future__ import annotations

from multiprocessing import Queue, get_context
from pathlib import Path

import pytest
import torch

from globalopt.errors import ArtefactError
from globalopt.objective.journal import RecordedObjective, Selection
from globalopt.values.budget import Target
from globalopt.values.span import Mask
from tests.objectives import BentObjective
from tests.surfaces import problem

SELECTION = Selection((4,) * 6, 10)


class Killed(Exception):
    pass


class Asked:
    """Answers like a model, and dies at the `last` question."""

    def __init__(self, p, last=10**9):
        self.inner = BentObjective(p)
        self.count = 0
        self.last = last

    def __call__(self, candidates, chunks):
        self.count += 1
        if self.count > self.last:
            raise Killed
        return self.inner.losses(candidates, chunks)


def recorded(p, journal=None, last=10**9, kind=""):
    ask = Asked(p, last)
    return RecordedObjective(ask, SELECTION, p, 10**6, journal, kind=kind), ask


def random_targets(p, seed):
    generator = torch.Generator().manual_seed(seed)
    return {s.spec.name: s.targets[int(torch.randint(len(s.targets), (), generator=generator))] for s in p.surfaces}


def walk(objective, p, steps=12):
    """A search that depends on everything it is told."""
    here, trace = random_targets(p, 0), []
    for step in range(steps):
        others = [random_targets(p, 100 * step + i) for i in range(3)]
        losses = objective.losses([here, *others], [step % 6, (step + 1) % 6]).mean(1)
        here = [here, *others][int(losses.argmin())]
        trace.append((losses.tolist(), objective.tokens))
    return here, trace


def test_answers_are_the_objectives():
    p = problem(0.5)
    objective, ask = recorded(p)
    asked = [random_targets(p, i) for i in range(3)]
    torch.testing.assert_close(objective.losses(asked, [4, 1]), BentObjective(p).losses(asked, [4, 1]))
    assert objective.chunks == 6
    assert objective.chunk_tokens == 40
    assert ask.count == 1


def test_asking_twice_costs_nothing():
    p = problem(0.5)
    objective, ask = recorded(p)
    asked = [random_targets(p, i) for i in range(3)]
    first = objective.losses(asked, [0, 1])
    assert objective.tokens == 3 * 2 * 40
    again = objective.losses([asked[1], random_targets(p, 9)], [1, 0])
    assert objective.tokens == 4 * 2 * 40
    assert torch.equal(again[0], torch.cat([first[1, 4:], first[1, :4]]))
    assert ask.count == 2
    assert ask.inner.tokens == objective.tokens


@pytest.mark.parametrize("last", [0, 1, 4, 7, 11])
def test_a_killed_search_ends_like_an_undisturbed_one(tmp_path, last):
    p = problem(0.5)
    whole, undisturbed = recorded(p)
    expected = walk(whole, p)
    killed, _ = recorded(p, tmp_path / "study.log", last)
    with pytest.raises(Killed):
        walk(killed, p)
    resumed, ask = recorded(p, tmp_path / "study.log")
    assert walk(resumed, p) == expected
    assert ask.count == undisturbed.count - last
    assert resumed.evaluations == whole.evaluations


def test_masks_are_told_apart_by_their_components():
    p = problem(0.5)
    objective, ask = recorded(p)
    spec = p.specs[0]
    base = dict(random_targets(p, 0))

    def candidate(kept: int):
        entries = torch.zeros(spec.d_out, spec.d_in, dtype=torch.bool)
        entries.view(-1)[kept] = True
        return {**base, spec.name: Mask(torch.ones(2, dtype=torch.bool), entries)}

    objective.losses([candidate(0), candidate(1), candidate(0)], [0])
    assert objective.tokens == 2 * 40
    assert ask.count == 1


def test_evaluations_stand_beside_what_was_predicted():
    p = problem(0.5)
    objective, _ = recorded(p)
    targets = random_targets(p, 3)
    objective.losses([targets], [0])
    objective.losses([targets], range(1, 6))
    part, whole = objective.evaluations
    assert (part.windows, part.whole, part.tokens) == (4, False, 40)
    assert (whole.windows, whole.whole, whole.tokens) == (24, True, 240)
    assert part.predicted == whole.predicted == p.predicted(targets)


def test_a_broken_journal_is_refused(tmp_path):
    (tmp_path / "study.log").write_text("this is no journal\n")
    with pytest.raises(ArtefactError, match="no journal of a search"):
        recorded(problem(0.5), tmp_path / "study.log")


def test_targets_of_other_patterns_differ():
    p = problem(0.5)
    objective, ask = recorded(p)
    a = random_targets(p, 0)
    name = p.specs[0].name
    b = {**a, name: Target(a[name].rank, a[name].nnz, signs=True)}
    objective.losses([a, b], [0])
    assert objective.tokens == 80
    assert ask.inner.tokens == 80


def test_two_searches_share_a_journal_at_the_same_time(tmp_path):
    """Each is answered by what the other has evaluated meanwhile, whatever their budgets, and counts its own tokens."""
    p, other = problem(0.5), problem(0.3)
    one, model = recorded(p, tmp_path / "study.log")
    two, second = recorded(other, tmp_path / "study.log")
    asked = [random_targets(p, i) for i in range(6)]
    first = one.losses(asked[:3], [0, 1])
    again = two.losses(asked[1:4], [1, 2])
    assert torch.equal(again[:2, :4], first[1:, 4:])
    third = one.losses(asked[2:], [2])
    assert torch.equal(third[:2], again[1:, 4:])
    assert model.inner.tokens == (3 * 2 + 2) * 40
    assert second.inner.tokens == (2 + 2) * 40
    assert (one.tokens, two.tokens) == ((3 * 2 + 4) * 40, 3 * 2 * 40)
    # What each has added is there for a third.
    three, silent = recorded(p, tmp_path / "study.log", last=0)
    assert torch.equal(three.losses(asked[2:], [2]), third)
    assert torch.equal(three.losses(asked[:3], [0, 1]), first)
    assert silent.count == 0


def test_of_a_loss_that_two_have_evaluated_all_take_the_first(tmp_path):
    """As where two machines differ in the last bits."""
    p = problem(0.5)
    targets = random_targets(p, 0)
    inner, _ = recorded(p, tmp_path / "study.log")

    def late(candidates, chunks):
        early.extend(inner.losses(candidates, chunks).tolist())
        return BentObjective(p).losses(candidates, chunks) + 1e-12

    early: list[list[float]] = []
    outer = RecordedObjective(late, SELECTION, p, 10**6, tmp_path / "study.log")
    found = outer.losses([targets], [0, 1])
    assert found.tolist() == early
    resumed, silent = recorded(p, tmp_path / "study.log", last=0)
    assert torch.equal(resumed.losses([targets], [1, 0]), torch.cat([found[:, 4:], found[:, :4]], 1))
    assert silent.count == 0


def test_other_candidates_and_other_text_are_not_the_same_losses(tmp_path):
    p = problem(0.5)
    targets = random_targets(p, 0)
    recorded(p, tmp_path / "study.log", kind="anchors")[0].losses([targets], [0])
    other, ask = recorded(p, tmp_path / "study.log", kind="span")
    other.losses([targets], [0])
    assert ask.count == 1
    ask = Asked(p)
    shorter = RecordedObjective(ask, Selection((4,) * 6, 9), p, 10**6, tmp_path / "study.log", kind="anchors")
    shorter.losses([targets], [0])
    assert ask.count == 1


def test_a_line_that_was_cut_off_is_not_read(tmp_path):
    p = problem(0.5)
    whole, _ = recorded(p)
    expected = walk(whole, p)
    journal = tmp_path / "study.log"
    killed, _ = recorded(p, journal, last=5)
    with pytest.raises(Killed):
        walk(killed, p)
    text = journal.read_bytes()
    journal.write_bytes(text[:-40])
    resumed, _ = recorded(p, journal)
    assert walk(resumed, p) == expected
    # Nor does it spoil what was written after it.
    finished, silent = recorded(p, journal, last=0)
    assert walk(finished, p) == expected
    assert silent.count == 0


def search_elsewhere(journal: Path, seed: int, queue: Queue) -> None:
    """In a process of its own: a walk, beginning with the same candidates as another."""
    p = problem(0.5)
    objective, _ = recorded(p, journal)
    walk(objective, p, 4)
    targets = [random_targets(p, 1000 * seed + i) for i in range(3)]
    for chunk in range(6):
        objective.losses(targets, [chunk])
    queue.put((seed, objective.tokens))


def test_two_processes_write_one_journal(tmp_path):
    p = problem(0.5)
    context = get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=search_elsewhere, args=(tmp_path / "study.log", seed, queue)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    alone, _ = recorded(p)
    expected = walk(alone, p, 4)
    tokens = alone.tokens + 3 * 6 * 40
    assert sorted(queue.get(timeout=10) for _ in workers) == [(1, tokens), (2, tokens)]
    found, silent = recorded(p, tmp_path / "study.log", last=0)
    assert walk(found, p, 4) == expected
    targets = [random_targets(p, 1000 * seed + i) for seed in (1, 2) for i in range(3)]
    torch.testing.assert_close(found.losses(targets, range(6)), BentObjective(p).losses(targets, range(6)))
    assert silent.count == 0
