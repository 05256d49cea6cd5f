from __future__ import annotations

import math

import pytest
import torch

from globalopt.kernels import ridge_admm
from globalopt.kernels.low_rank import Subspace
from globalopt.kernels.norm import Norm
from globalopt.kernels.projection import plane_order
from globalopt.kernels.ridge_admm import SparseAndSubspace
from globalopt.values.budget import Target
from globalopt.values.decomposition import follows
from globalopt.values.layer import NM
from solvers import _admm
from solvers._admm import AdmmSearch
from tests.kernels.norms import problem, side, squared


@pytest.fixture
def runs(monkeypatch):
    """The schedule and the masks of every run of ADMM: `(schedule, [(magnitudes, share, mask), ...])`."""
    seen, original = [], _admm.ridge_admm

    def recording(W, inputs, parts, schedule, start=None, trace_every=0):
        masks = []
        seen.append((schedule, masks))

        def watch(keep):
            def watched(magnitudes, share, exact):
                mask = keep(magnitudes, share, exact)
                masks.append((magnitudes.clone(), share, mask.bool()))
                return mask

            return watched

        watched = [type(part)(part.rows, part.outputs, part.rank, watch(part.keep)) for part in parts]
        return original(W, inputs, watched, schedule, start, trace_every)

    monkeypatch.setattr(_admm, "ridge_admm", recording)
    return seen


@pytest.mark.parametrize("target", [Target(2, 101), Target(0, 96, NM(2, 4)), Target(1, 48, NM(1, 4))])
def test_the_largest_entries_grow_to_the_count_within_the_pattern(runs, target):
    W, norm = problem((8, 24), False)
    found = AdmmSearch(steps=20).run([W], [norm], [target])
    masks = runs[0][1]
    assert len(masks) == found.steps
    for magnitudes, share, mask in masks:
        assert int(mask.sum()) == math.ceil(share * target.nnz)
        allowed = torch.ones_like(mask)
        if target.pattern is not None:
            order = plane_order(24, target.pattern, W.device).argsort()
            magnitudes, mask = magnitudes[:, order], mask[:, order]
            assert follows(mask, target.pattern)
            groups = magnitudes.view(8, -1, target.pattern.of)
            allowed = groups >= groups.sort(descending=True).values[..., target.pattern.keep - 1 : target.pattern.keep]
            allowed = allowed.view(8, 24)
        # Nothing that could have been kept is larger than what was.
        dropped = magnitudes[allowed & ~mask]
        assert bool((dropped <= magnitudes[mask].min()).all())
    assert masks[0][1] < 0.2
    assert masks[-1][1] == 1
    assert int(found.fits[0].S.count_nonzero()) == target.nnz


@pytest.mark.parametrize("weighted", [False, True], ids=["G", "A,G"])
def test_patterns_are_searched_in_planes_as_in_the_columns_own_order(weighted, monkeypatch):
    """A stack of two patterns is solved in the columns' own order, each of them alone in planes."""
    monkeypatch.setattr(ridge_admm, "SETTLED_SHARE", -1.0)  # alone one might end before the other
    W, norm = problem((8, 24), weighted)
    patterns = [NM(2, 4), NM(1, 4)]
    targets = [Target(2, 96, patterns[0]), Target(1, 48, patterns[1])]
    starts = [AdmmSearch(steps=40).run([W], [norm], [Target(t.rank, t.nnz // 2)]).fits[0] for t in targets]
    for given in (None, starts):
        search = AdmmSearch(steps=24, begun=0.0 if given is None else 0.3)
        together = search.run([W, W], [norm, norm], targets, given).fits
        for i, target in enumerate(targets):
            alone = search.run([W], [norm], [target], None if given is None else [given[i]]).fits[0]
            assert follows(alone.S, patterns[i])
            torch.testing.assert_close(alone.S, together[i].S)
            torch.testing.assert_close(alone.subspace.U, together[i].subspace.U)


def test_a_start_is_grown_from_the_share_it_has(runs):
    W, norm = problem((8, 24), False)
    small = AdmmSearch(steps=20).run([W], [norm], [Target(1, 40)]).fits
    large = AdmmSearch(steps=20).run([W], [norm], [Target(1, 140)]).fits
    runs.clear()
    for start in (small, large):
        AdmmSearch(steps=10, begun=0.3, full=0.7).run([W], [norm], [Target(1, 100)], start)
    (first, _), (second, _) = runs
    assert (first.grown, first.begun, first.full, first.steps) == (0.4, 0.3, 0.7, 10)
    assert second.grown == 1


def test_the_penalty_is_smaller_for_correlated_coordinates(runs):
    W, norm = problem((8, 24), False)
    white = Norm(side(torch.eye(24).double()))
    for given in (norm, white):
        AdmmSearch(steps=20).run([W], [given], [Target(0, 40)])
    (correlated, _), (plain, _) = runs
    assert correlated.start < plain.start
    assert correlated.end < plain.end
    assert correlated.start < correlated.end


def test_the_penalty_is_larger_with_an_output_side(runs):
    W, norm = problem((8, 24), False)
    # One with the same spectrum as none at all, so that only its presence counts.
    both = Norm(norm.inputs, side(torch.eye(8).double()))
    for norms in ([norm, norm], [both, both], [norm, both], [both, norm]):
        AdmmSearch(steps=20).run([W, W], norms, [Target(0, 40)] * 2)
    plain, *sided = (schedule for schedule, _ in runs)
    assert all(schedule.start > 1.2 * plain.start for schedule in sided)
    assert all(schedule.end > 1.2 * plain.end for schedule in sided)


@pytest.mark.parametrize("weighted", [False, True], ids=["G", "A,G"])
def test_polish_lowers_the_error_on_the_support_that_was_found(weighted):
    W, norm = problem((24, 32), weighted)

    def error(fit):
        return squared(norm, W - fit.S - fit.subspace.U @ fit.subspace.factor(W - fit.S))

    fits = [AdmmSearch(steps=30, rounds=rounds).run([W], [norm], [Target(2, 200)]).fits[0] for rounds in (0, 1, 4)]
    assert all(torch.equal(fit.S != 0, fits[0].S != 0) for fit in fits)
    assert error(fits[2]) < error(fits[1]) < error(fits[0])


def test_a_start_saves_steps():
    W, norm = problem((24, 32), False)
    target = Target(0, 200)
    neighbour = AdmmSearch(steps=200).run([W], [norm], [Target(0, 170)]).fits

    def error(found):
        return squared(norm, W - found.fits[0].S)

    warm = AdmmSearch(steps=30, begun=0.5).run([W], [norm], [target], neighbour)
    cold = AdmmSearch(steps=30).run([W], [norm], [target])
    assert error(warm) < error(cold)
    other = SparseAndSubspace(torch.zeros_like(W), Subspace(W[:, :0], W[:, :0]))
    empty = AdmmSearch(steps=30).run([W], [norm], [target], [other])
    torch.testing.assert_close(error(empty), error(cold), rtol=0.02, atol=0)


def test_needs_an_input_gram():
    W, _ = problem((8, 24), False)
    with pytest.raises(ValueError, match="input Gram"):
        AdmmSearch(steps=5).run([W], [Norm(None)], [Target(0, 40)])
