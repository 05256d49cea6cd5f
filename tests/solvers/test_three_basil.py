"""What is special to the searching solvers: presets, stacked layers, paths."""

from __future__ import annotations

import math

import pytest
import torch

from globalopt.errors import UsageError
from globalopt.kernels import ridge_admm
from globalopt.protocols import Outputs, Solver
from globalopt.values.budget import Target
from globalopt.values.decomposition import Solution, Status
from globalopt.values.layer import NM
from globalopt.values.metric import Gram, Metric
from solvers import SOLVERS, three_basil
from solvers.three_basil import STEPS, AdmmPreset, ThreeBASiL
from tests.synthetic import metric

D_OUT, D_IN = 64, 96


def fit(solver: Solver, W, norm, target) -> Solution:
    return solver.solve(solver.prepare(W, norm), target)


def weighted(norm: Metric, d_out: int, seed: int) -> Metric:
    return Metric(norm.inputs, metric(d_out, d_out, 200, seed)[1].inputs)


def geometric_mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


# ------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("target", [Target(12, 1200), Target(0, 1536)])
def test_a_longer_search_finds_a_lower_error(target):
    errors = {preset: 0.0 for preset in AdmmPreset}
    for seed in (0, 1, 2, 3):
        W, norm = metric(D_OUT, D_IN, 400, seed)
        for preset in AdmmPreset:
            errors[preset] += fit(ThreeBASiL(preset), W, norm, target).error
    assert errors[AdmmPreset.BEST] < errors[AdmmPreset.DEFAULT] < 0.995 * errors[AdmmPreset.FAST]


@pytest.mark.parametrize("preset", AdmmPreset)
def test_a_preset_is_a_number_of_steps(preset):
    W, norm = metric(16, 24, 300)
    named = fit(ThreeBASiL(preset), W, norm, Target(2, 100))
    counted = fit(ThreeBASiL(steps=STEPS[preset]), W, norm, Target(2, 100))
    assert torch.equal(named.value.S, counted.value.S)
    assert named.stats["steps"] <= STEPS[preset]
    assert fit(ThreeBASiL(preset, steps=7), W, norm, Target(2, 100)).stats["steps"] == 7


def test_a_search_that_is_cut_short_says_so():
    W, norm = metric(D_OUT, D_IN, 400)
    sparse = Target(0, 1500)
    assert fit(ThreeBASiL(steps=5), W, norm, sparse).status is Status.MAX_STEPS
    # Where an exact answer exists the support settles, and nothing is left to wait for.
    exact = fit(ThreeBASiL(), W, norm, sparse).value.dense()
    settled = fit(ThreeBASiL(), exact, norm, sparse)
    assert settled.status is Status.CONVERGED
    assert settled.stats["steps"] < STEPS[AdmmPreset.DEFAULT]
    assert settled.error < 1e-3 * norm.error(exact)


def test_momentum_lowers_the_error(monkeypatch):
    """Of `L`, where its rank is high: by a sixth on these layers, the geometric mean of four (.82)."""
    ratios = []
    for seed in range(4):
        W, norm = metric(48, 64, 400, seed)
        target = Target(16, round(0.15 * W.numel()))
        with_momentum = fit(ThreeBASiL(), W, norm, target).error
        with monkeypatch.context() as patch:
            patch.setattr(ridge_admm, "MOMENTUM", 0.0)
            ratios.append(with_momentum / fit(ThreeBASiL(), W, norm, target).error)
    assert 0.7 < geometric_mean(ratios) < 0.92


# ------------------------------------------------------------------------------------------------- one site


def site(outputs: bool, seed: int) -> list[tuple[torch.Tensor, Metric, Target]]:
    """Layers of different heights on the same inputs, one kept whole and two without a sparse part."""
    wanted = [
        (32, Target(3, 400)),
        (16, Target(2, 200)),
        (16, Target(0, 16 * 48)),
        (24, Target(0, 260)),
        (16, Target(4, 0)),
        (16, Target.zero()),
        (16, Target(1, 16 * 24, NM(2, 4))),
    ]
    _, norm = metric(8, 48, 300, seed)
    weights = [metric(d_out, 48, 300, 10 * seed + i)[0] for i, (d_out, _) in enumerate(wanted)]
    return [
        (W, weighted(norm, len(W), 10 * seed + i) if outputs else norm, target)
        for i, (W, (_, target)) in enumerate(zip(weights, wanted, strict=True))
    ]


@pytest.mark.parametrize("outputs", [False, True], ids=["G", "A,G"])
def test_layers_of_a_site_are_about_as_good_as_alone(outputs):
    solver, ratios = ThreeBASiL(), []
    for seed in (0, 1, 2):
        layers = site(outputs, seed)
        stacked = solver.solve_site(layers)
        assert len(stacked) == len(layers)
        for found, (W, norm, target) in zip(stacked, layers, strict=True):
            alone = fit(solver, W, norm, target)
            assert found.value.fits(target)
            assert (found.value.rank, found.value.nnz) == (alone.value.rank, alone.value.nnz)
            assert found.error == pytest.approx(norm.error(W - found.value.dense()), rel=1e-4, abs=1e-6)
            assert found.stats["damping"] == alone.stats["damping"]
            if target.nnz in (0, W.numel()):
                # No support to choose: nothing that the others could change.
                assert found.error == alone.error
            else:
                ratios.append(found.error / alone.error)
    assert len(ratios) == 12
    assert geometric_mean(ratios) < 1.03
    assert max(ratios) < 1.25


def test_layers_of_a_site_are_not_modified():
    layers = site(True, 0)
    before = [(W.clone(), norm.inputs.matrix.clone()) for W, norm, _ in layers]
    ThreeBASiL(steps=20).solve_site(layers)
    for (W, norm, _), (weight, G) in zip(layers, before, strict=True):
        assert torch.equal(W, weight)
        assert torch.equal(norm.inputs.matrix, G)


@pytest.mark.parametrize("felt", [None, 0.0], ids=["no A", "A = 0"])
@pytest.mark.parametrize("last", [False, True])
def test_a_layer_without_outputs_beside_one_with(felt, last):
    (W, norm, target), (other, beside, wanted) = site(True, 0)[:2]
    size = len(other)
    without = Metric(beside.inputs, None if felt is None else Gram(torch.full((size, size), felt), 10))
    layers = [(W, norm, target), (other, without, wanted)]
    stacked = ThreeBASiL().solve_site(layers if last else layers[::-1])
    found = stacked[-1 if last else 0].value
    inputs = Metric(norm.inputs)
    alone = fit(ThreeBASiL(), other, inputs, wanted)
    assert inputs.error(other - found.dense()) <= 1.2 * alone.error


def test_a_site_of_one_and_a_site_of_none():
    W, norm, target = site(True, 0)[0]
    (only,) = ThreeBASiL().solve_site([(W, norm, target)])
    assert torch.equal(only.value.dense(), fit(ThreeBASiL(), W, norm, target).value.dense())
    assert ThreeBASiL().solve_site([]) == []


def test_a_target_that_does_not_fit_stops_the_site():
    (W, norm, _), (other, beside, wanted) = site(False, 0)[:2]
    with pytest.raises(UsageError, match="largest rank 16"):
        ThreeBASiL().solve_site([(W, norm, Target(1, 10)), (other, beside, Target(17, 10))])
    with pytest.raises(UsageError, match="sign"):
        ThreeBASiL().solve_site([(W, norm, Target(1, 10)), (other, beside, Target(1, 10, signs=True))])
    with pytest.raises(UsageError, match="fits no low-rank part"):
        SOLVERS["alps"]().solve_site([(other, beside, wanted)])


# ------------------------------------------------------------------------------------------------- a path


PATH = [Target(12, 1400), Target(12, 500), Target(12, 0), Target(12, 1000), Target(0, 6144), Target(8, 700)]


PATTERNS = [Target(4, 3072, NM(2, 4)), Target(4, 3072), Target(4, 1536, NM(1, 4)), Target(4, 3072, NM(4, 8))]


@pytest.mark.parametrize("targets", [PATH, PATTERNS], ids=["sizes", "patterns"])
def test_a_path_does_not_depend_on_the_order_it_is_asked_in(targets):
    W, norm = metric(D_OUT, D_IN, 400)
    solver = ThreeBASiL(AdmmPreset.FAST)
    state = solver.prepare(W, norm)
    given, backwards = solver.solve_path(state, targets), solver.solve_path(state, targets[::-1])
    for target, found, other in zip(targets, given, backwards[::-1], strict=True):
        assert (found.value.rank, found.value.nnz) == (target.rank, target.nnz)
        assert torch.equal(found.value.dense(), other.value.dense()), target
        assert found.error == other.error
    assert solver.solve_path(state, []) == []


def test_a_target_of_a_path_starts_from_the_largest_that_keeps_no_more(monkeypatch):
    starts = {}

    class Recording(three_basil.AdmmSearch):
        def run(self, weights, norms, targets, start=None):
            kept = start and (start[0].subspace.rank, int(start[0].S.count_nonzero()))
            starts[targets[0].rank, targets[0].nnz] = kept
            return super().run(weights, norms, targets, start)

    monkeypatch.setattr(three_basil, "AdmmSearch", Recording)
    W, norm = metric(16, 24, 300)
    solver = ThreeBASiL(steps=20)
    solver.solve_path(solver.prepare(W, norm), [Target(*sizes) for sizes in ((6, 200), (2, 200), (6, 100), (2, 60))])
    assert starts == {(2, 60): None, (6, 100): (2, 60), (2, 200): (2, 60), (6, 200): (6, 100)}


@pytest.mark.parametrize("outputs", [False, True], ids=["G", "A,G"])
def test_a_path_is_as_good_at_a_fraction_of_the_steps(outputs):
    W, norm = metric(D_OUT, D_IN, 400)
    norm = weighted(norm, D_OUT, 1) if outputs else norm
    solver, targets = ThreeBASiL(), [Target(12, nnz) for nnz in (600, 800, 1000, 1200)]
    state = solver.prepare(W, norm)
    path, alone = solver.solve_path(state, targets), [solver.solve(state, target) for target in targets]
    assert torch.equal(path[0].value.dense(), alone[0].value.dense())
    assert geometric_mean([warm.error / cold.error for warm, cold in zip(path, alone, strict=True)]) < 1.05
    assert all(found.stats["steps"] <= 0.3 * STEPS[AdmmPreset.DEFAULT] for found in path[1:])
    # So few steps from nothing are worse.
    short = fit(ThreeBASiL(steps=round(path[-1].stats["steps"])), W, norm, targets[-1])
    assert path[-1].error < short.error


@pytest.mark.parametrize("seed", [0, 1])
def test_a_coarse_path_is_settled_where_coordinates_are_correlated(seed):
    """Eigenvalues that fall as squares: a few steps from a support of half the size leave twice the error."""
    generator = torch.Generator().manual_seed(seed)

    def falling(size: int) -> Gram:
        Q = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
        matrix = (Q / torch.arange(1, size + 1).square()) @ Q.mT
        return Gram((matrix + matrix.mT) / 2, 1000)

    norm = Metric(falling(D_IN), falling(D_OUT))
    W = torch.randn(D_OUT, D_IN, generator=generator)
    solver, targets = ThreeBASiL(AdmmPreset.FAST), [Target(0, int(kept * W.numel())) for kept in (0.08, 0.2, 0.4, 0.7)]
    state = solver.prepare(W, norm)
    for warm, target in zip(solver.solve_path(state, targets), targets, strict=True):
        assert warm.error < 1.4 * solver.solve(state, target).error


def test_a_path_of_patterns():
    W, norm = metric(D_OUT, D_IN, 400)
    solver = ThreeBASiL(AdmmPreset.FAST)
    for target, found in zip(PATTERNS, solver.solve_path(solver.prepare(W, norm), PATTERNS), strict=True):
        assert found.value.fits(target)
        assert found.value.nnz == target.nnz
        assert found.error < 1.2 * fit(solver, W, norm, target).error


# ------------------------------------------------------------------------------------------------- ALPS


def test_alps_is_the_search_at_rank_zero():
    W, norm = metric(D_OUT, D_IN, 400)
    alps = fit(SOLVERS["alps"](), W, norm, Target(0, 1500))
    twin = ThreeBASiL(damping=0.01, diagonal_damping=0.0, outputs=Outputs.NONE)
    assert torch.equal(alps.value.S, fit(twin, W, norm, Target(0, 1500)).value.S)
    assert alps.value.rank == 0
    assert alps.stats["damping"] == 0.01
