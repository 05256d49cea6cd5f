"""A search that was killed asks again, is answered from its journal, and ends as if nothing had happened."""

from __future__ import annotations

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


def recorded(p, journal=None, last=10**9):
    ask = Asked(p, last)
    return RecordedObjective(ask, ask.inner.span, SELECTION, p, 10**6, journal), ask


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
