from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from globalopt.budgets.conversion import convert_target
from globalopt.errors import NumericalError, UsageError
from globalopt.models.batch import Batch
from globalopt.models.block_runner import BlockRunner
from globalopt.models.finding import find_layers
from globalopt.models.layers import ModelLayers
from globalopt.models.loading import load_model
from globalopt.models.walk import walk_blocks
from globalopt.protocols import Needs, Outputs, Solver
from globalopt.refine.blocks import Refinement, checked, refine
from globalopt.runs.artefacts import METRIC_CHOICE, OUTPUT_GRAM, SOLVED_LAYER
from globalopt.runs.folder import Run
from globalopt.runs.records import CheckedLoss, MetricChoice
from globalopt.values.budget import Budget, Target
from globalopt.values.decomposition import Decomposition, Solution, Status
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.metric import Gram, Metric
from globalopt.values.storage import Scales, Storage
from solvers import get_solver
from tests.tiny_models import save_tiny, tiny_ids, tiny_model

SPEC = LayerSpec("block.0.up", 0, "block.0.in", "up", 24, 16)


# ------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("accounting", ["params", "bytes"])
@pytest.mark.parametrize("target", [Target(1, 0), Target(3, 40), Target(2, 200), Target(1, 340)])
def test_rank_becomes_as_many_nonzeros_as_it_costs(accounting, target):
    budget = Budget(10**6, 10**6, accounting)
    folded = convert_target(target, SPEC, get_solver("wanda"), budget)
    assert folded.rank == 0
    assert target.nnz < folded.nnz < SPEC.numel
    limit = budget.cost(target, SPEC)
    assert budget.cost(folded, SPEC) <= limit
    one_more = budget.cost(replace(folded, nnz=folded.nnz + 1), SPEC)
    assert one_more > limit or folded.nnz + 1 == SPEC.numel


def test_targets_that_need_no_change():
    budget = Budget(10**6, 10**6)
    ranked = Target(2, 192, NM(2, 4))
    assert convert_target(ranked, SPEC, get_solver("oats"), budget) is ranked
    assert convert_target(Target(0, 7), SPEC, get_solver("wanda"), budget) == Target(0, 7)
    assert convert_target(Target(5, 0), SPEC, get_solver("svd"), budget) == Target(5, 0)


def test_rank_beside_a_pattern_cannot_become_nonzeros():
    with pytest.raises(UsageError, match=r"block\.0\.up"):
        convert_target(Target(2, 192, NM(2, 4)), SPEC, get_solver("wanda"), Budget(10**6, 10**6))


@pytest.mark.parametrize("accounting", ["params", "bytes"])
@pytest.mark.parametrize("target", [Target(2, 20), Target(0, 100), Target(5, 0), Target(3, 300)])
def test_a_sign_plane_is_paid_for_with_rank_and_nonzeros(accounting, target):
    budget = Budget(10**6, 10**6, accounting)
    signed = convert_target(target, SPEC, get_solver("slab"), budget)
    assert (signed.rank, signed.signs, signed.pattern) == (1, True, None)
    limit = budget.cost(target, SPEC)
    assert budget.cost(signed, SPEC) <= limit
    one_more = budget.cost(replace(signed, nnz=signed.nnz + 1), SPEC)
    assert one_more > limit or signed.nnz + 1 == SPEC.numel


def test_a_sign_plane_beside_a_pattern():
    budget, slab = Budget(10**6, 10**6), get_solver("slab")
    signed = convert_target(Target(2, 192, NM(2, 4)), SPEC, slab, budget)
    assert signed == Target(1, 192, NM(2, 4), signs=True)
    assert convert_target(signed, SPEC, slab, budget) is signed
    with pytest.raises(UsageError, match=r"256 params or more for layer block\.0\.up; its target costs 192"):
        convert_target(Target(0, 192, NM(2, 4)), SPEC, slab, budget)


def test_a_sign_plane_that_costs_more_than_the_target():
    with pytest.raises(UsageError, match=r"64 params or more for layer block\.0\.up; its target costs 63"):
        convert_target(Target(1, 23), SPEC, get_solver("slab"), Budget(10**6, 10**6))
    assert convert_target(Target(1, 24), SPEC, get_solver("slab"), Budget(10**6, 10**6)) == Target(1, 0, signs=True)


@pytest.mark.parametrize("accounting", ["params", "bytes"])
@pytest.mark.parametrize("target", [Target(3, 40), Target(0, 100), Target(2, 192, NM(2, 4))])
def test_nonzeros_become_as_much_rank_as_they_cost(accounting, target):
    budget = Budget(10**6, 10**6, accounting)
    folded = convert_target(target, SPEC, get_solver("svd"), budget)
    assert folded == Target(folded.rank, 0)
    limit = budget.cost(target, SPEC)
    assert budget.cost(folded, SPEC) <= limit < budget.cost(replace(folded, rank=folded.rank + 1), SPEC)


def test_nonzeros_too_few_for_a_rank_are_refused():
    with pytest.raises(UsageError, match=rf"20 nonzeros of layer {SPEC.name} do not buy"):
        convert_target(Target(0, 20), SPEC, get_solver("svd"), Budget(10**6, 10**6))


def test_rank_ends_at_the_smaller_side():
    assert convert_target(Target(16, 300), SPEC, get_solver("svd"), Budget(10**6, 10**6)) == Target(16, 0)


@pytest.mark.parametrize("name", ["wanda", "svd", "slab"])
@pytest.mark.parametrize("target", [Target.dense(SPEC), Target.zero()])
def test_a_layer_kept_or_dropped_whole_stays_so(name, target):
    assert convert_target(target, SPEC, get_solver(name), Budget(10**6, 10**6)) is target


def test_what_is_stored_must_keep_its_target():
    S = torch.zeros(4, 8)
    S[:, :2] = 1.0
    value = Decomposition(S, torch.ones(4, 1), torch.ones(1, 8))
    assert checked(value, Target(1, 8, NM(2, 4))) is value
    for target in (Target(0, 8), Target(1, 7), Target(1, 4, NM(1, 4)), Target(1, 8, signs=True)):
        with pytest.raises(NumericalError, match="keeps rank 1 and 8 of 32 nonzeros"):
            checked(value, target)


def test_what_is_stored_must_not_take_more_bytes_than_its_target():
    """A layer without zeros has no index, in few bits, so that fewer nonzeros may take more bytes."""
    storage, scales = Storage(8), Scales(Storage(8), torch.ones(4), None, None)
    whole, lacking = torch.ones(8, 32), torch.ones(8, 32)
    lacking[0, 0] = 0
    found = [Decomposition(S, S[:, :0], S[:0], scales=scales) for S in (whole, lacking)]
    assert checked(found[0], Target(0, 256, storage=storage)) is found[0]
    with pytest.raises(NumericalError, match="keeps rank 0 and 255 of 256 nonzeros"):
        checked(found[1], Target(0, 256, storage=storage))


# ------------------------------------------------------------------------------------------------- refinement


def setting(
    tmp_path, solver, target=None, dtype=torch.float32, model=None
) -> tuple[ModelLayers, BlockRunner, Refinement, Run]:
    layers = find_layers(model or tiny_model("llama"))
    total = sum(spec.numel for spec in layers.specs)
    budget = Budget(total, total)
    asked = {spec: target(spec) if target else Target(1, spec.numel // 3) for spec in layers.specs}
    targets = {spec.name: convert_target(asked[spec], spec, solver, budget) for spec in layers.specs}
    plan = Refinement(targets, solver, budget, dtype, dict.fromkeys(targets))
    runner = BlockRunner(layers, [Batch(tiny_ids(4, 12)), Batch(tiny_ids(4, 12, seed=1))])
    run = Run.start(tmp_path / "run", {"n": 1}, {})
    # Other settings open the same folder, as a run that goes on does.
    run.close()
    return layers, runner, plan, run


def test_the_model_becomes_what_was_saved(tmp_path):
    layers, runner, plan, run = setting(tmp_path, get_solver("oats", {"steps": "3"}), dtype=torch.bfloat16)
    seen: list[str] = []
    results = list(refine(runner, plan, run, advance=seen.append))
    assert seen == [result.name for result in results] == [spec.name for spec in layers.specs]
    for spec, result in zip(layers.specs, results, strict=True):
        value = run.layer(spec)
        assert value.S.dtype == torch.bfloat16
        assert torch.equal(layers.weight(spec.name), value.dense())
        assert (result.rank, result.nnz) == (value.rank, value.nnz) == (1, spec.numel // 3)
        assert result.cost == spec.numel // 3 + spec.d_out + spec.d_in
        assert 0 < result.relative < 1


@pytest.mark.parametrize(
    ("name", "target", "read"),
    [
        ("rtn", Target(0, 128, storage=Storage(8)), Needs.NOTHING),
        ("magnitude", Target(0, 64), Needs.NOTHING),
        ("magnitude", Target(0, 64, storage=Storage(8)), Needs.GRAM),
        ("wanda", Target(0, 64), Needs.DIAGONAL),
        ("sparsegpt", Target(0, 64), Needs.GRAM),
    ],
)
def test_what_is_read_of_inputs_is_what_solver_and_rounding_need(name, target, read):
    plan = Refinement({"up": target}, get_solver(name), Budget(10, 10), torch.float32, {"up": None})
    assert plan.reads is read
    assert replace(plan, output_grams=True).reads is Needs.GRAM


def test_a_solver_that_reads_no_inputs_runs_no_block(tmp_path):
    layers, runner, plan, run = setting(tmp_path, get_solver("magnitude"))
    dense = {spec.name: layers.weight(spec.name).clone() for spec in layers.specs}
    for block in layers.blocks:
        block.register_forward_hook(lambda *_: pytest.fail("a block was run"))
    for result in refine(runner, plan, run):
        W = dense[result.name]
        left = (W - layers.weight(result.name)).square().sum()
        assert result.actual == pytest.approx(float(left), rel=1e-5)
        assert result.relative == pytest.approx(float(left / W.square().sum()), rel=1e-5)


def test_wanda_chooses_by_all_tokens_and_reports_errors_of_some(tmp_path):
    layers, _, plan, run = setting(tmp_path, get_solver("wanda"))
    dense = {spec.name: layers.weight(spec.name).clone() for spec in layers.specs}
    batches = [Batch(tiny_ids(2, 12, seed=seed)) for seed in range(5)]
    whole = next(walk_blocks(BlockRunner(layers, batches))).grams()
    results = {result.name: result for result in refine(BlockRunner(layers, batches), plan, run)}
    for spec in layers.of_block(0):
        W, found = dense[spec.name], run.layer(spec).dense()
        metric = Metric(whole[spec.site])
        alone = get_solver("wanda")
        expected = alone.solve(alone.prepare(W, metric), plan.targets[spec.name])
        assert torch.equal(found, expected.value.dense())
        # Of two batches in five, and of all.
        assert results[spec.name].relative == pytest.approx(metric.error(W - found) / metric.error(W), rel=0.3)


Handed = tuple[torch.Tensor, Metric, Target]


@dataclass(frozen=True)
class Recording(Solver[torch.Tensor]):
    """Keeps the layers as they are, up to the count, and what it was handed: a list per site."""

    sites: list[list[Handed]]
    outputs: Outputs = Outputs.NONE

    name: ClassVar[str] = "recording"

    def prepare(self, weight: torch.Tensor, metric: Metric) -> torch.Tensor:
        return weight

    def solve(self, state: torch.Tensor, target: Target, start: Decomposition | None = None) -> Solution:
        S = torch.zeros_like(state)
        S.view(-1)[: target.nnz] = state.reshape(-1)[: target.nnz]
        return Solution(Decomposition(S, S.new_zeros(len(S), 0), S.new_zeros(0, S.shape[1])), 0.0, Status.CONVERGED)

    def solve_site(self, layers: Sequence[Handed]) -> list[Solution]:
        self.sites.append(list(layers))
        return [self.solve(self.prepare(weight, metric), target) for weight, metric, target in layers]


def by_site(layers: ModelLayers) -> list[list[LayerSpec]]:
    sites = dict.fromkeys(spec.site for spec in layers.specs)
    return [[spec for spec in layers.specs if spec.site == site] for site in sites]


def test_a_layer_may_be_fitted_without_its_output_gram_and_still_be_reported_in_it(tmp_path):
    solver = Recording([])
    layers, runner, plan, run = setting(tmp_path, solver)
    plain = layers.specs[5]
    grams = {spec.name: Gram(2 * torch.eye(spec.d_out), 48) for spec in layers.specs}
    for spec in layers.specs:
        run.put(OUTPUT_GRAM, spec, grams[spec.name])
        checked = CheckedLoss(Target(0, 8), predicted=0.1, weighted=2.0 if spec == plain else 0.5, plain=1.0)
        # Of most layers there was no reason to check anything.
        run.put(METRIC_CHOICE, spec, MetricChoice((checked,) if spec.block == plain.block else ()))
    before = layers.weight(plain.name).clone()
    results = list(refine(runner, replace(plan, output_grams=True, metric_choices=True), run))
    names = [spec.name for site in by_site(layers) for spec in site]
    handed = dict(zip(names, (layer for site in solver.sites for layer in site), strict=True))
    assert [name for name, (_, metric, _) in handed.items() if metric.outputs is None] == [plain.name]
    inputs = handed[plain.name][1].inputs
    lost = before - run.layer(plain).dense()
    (result,) = [result for result in results if result.name == plain.name]
    assert result.actual == pytest.approx(Metric(inputs, grams[plain.name]).error(lost) / 2, rel=1e-6)


def test_layers_on_the_same_inputs_are_handed_over_together(tmp_path):
    solver = Recording([])
    layers, runner, plan, run = setting(tmp_path, solver)
    before = {spec.name: layers.weight(spec.name).clone() for spec in layers.specs}
    results = list(refine(runner, plan, run))
    sites = by_site(layers)
    # q, k and v; o; gate and up; down: in both blocks.
    assert [len(handed) for handed in solver.sites] == [3, 1, 2, 1] * 2 == [len(specs) for specs in sites]
    for specs, handed in zip(sites, solver.sites, strict=True):
        for spec, (weight, metric, target) in zip(specs, handed, strict=True):
            assert torch.equal(weight, before[spec.name])
            assert metric.inputs is handed[0][1].inputs
            assert target == plan.targets[spec.name]
    # What a site took is shared out by size.
    cost = {result.name: result.seconds for result in results}
    for specs in sites:
        rates = [cost[spec.name] / spec.numel for spec in specs]
        assert rates == pytest.approx([rates[0]] * len(rates))


def test_a_layer_kept_or_dropped_whole_is_not_handed_over(tmp_path):
    whole = {"q_proj": Target.dense, "up_proj": lambda spec: Target.zero(), "down_proj": Target.dense}

    def target(spec: LayerSpec) -> Target:
        return whole.get(spec.kind, lambda spec: Target(1, spec.numel // 3))(spec)

    solver = Recording([])
    layers, runner, plan, run = setting(tmp_path, solver, target)
    before = {spec.name: layers.weight(spec.name).clone() for spec in layers.specs}
    results = list(refine(runner, plan, run))
    assert [len(handed) for handed in solver.sites] == [2, 1, 1] * 2
    for spec, result in zip(layers.specs, results, strict=True):
        assert (result.rank, result.nnz) == (0, plan.targets[spec.name].nnz)
        kept = before[spec.name].flatten()[: result.nnz]
        assert torch.equal(layers.weight(spec.name).flatten()[: result.nnz], kept)
        assert not layers.weight(spec.name).flatten()[result.nnz :].any()
        if spec.kind in whole:
            assert result.relative == (1.0 if spec.kind == "up_proj" else 0.0)
            assert result.seconds == 0


@dataclass(frozen=True)
class Failing(Recording):
    """Cannot fit a site of several layers."""

    def solve_site(self, layers: Sequence[Handed]) -> list[Solution]:
        if len(layers) > 1:
            raise NumericalError("no rung held.")
        return super().solve_site(layers)


def test_an_error_names_the_layers_of_its_site(tmp_path):
    layers, runner, plan, run = setting(tmp_path, Failing([]))
    names = ", ".join(spec.name for spec in by_site(layers)[0])
    with pytest.raises(NumericalError, match=re.escape(f"Layer {names}: no rung held.")):
        list(refine(runner, plan, run))
    assert not any(run.path(SOLVED_LAYER, spec).exists() for spec in layers.specs)


def test_later_blocks_see_the_compressed_ones(tmp_path):
    def grams(folder, target) -> list[Gram]:
        solver = Recording([])
        _, runner, plan, run = setting(tmp_path / folder, solver, target)
        list(refine(runner, plan, run))
        return [metric.inputs for handed in solver.sites for _, metric, _ in handed]

    some = grams("some", lambda spec: Target(0, spec.numel // 4))
    most = grams("most", lambda spec: Target(0, spec.numel - 1))
    second_block = len(some) // 2
    assert torch.equal(some[0].matrix, most[0].matrix)
    assert not torch.allclose(some[second_block].matrix, most[second_block].matrix, rtol=0.05)


@pytest.mark.parametrize("lazily", [False, True])
def test_memory_is_given_back_after_every_site_of_a_model_that_is_never_whole(tmp_path, monkeypatch, lazily):
    model = load_model(save_tiny(tmp_path / "model"), device="cpu", lazily=lazily).model
    layers, runner, plan, run = setting(tmp_path, get_solver("magnitude"), model=model)
    saved_before = []

    def given_back() -> None:
        saved_before.append(sum(run.path(SOLVED_LAYER, spec).exists() for spec in layers.specs))

    monkeypatch.setattr("globalopt.refine.blocks.trim_memory", given_back)
    list(refine(runner, plan, run))
    sites = by_site(layers)
    ends = [sum(map(len, sites[: i + 1])) for i in range(len(sites))]
    assert saved_before == (ends if lazily else [])


def test_a_layer_that_is_saved_is_not_solved_again(tmp_path):
    layers, runner, plan, run = setting(tmp_path, get_solver("wanda"))
    first = list(refine(runner, plan, run))
    weights = {spec.name: layers.weight(spec.name).clone() for spec in layers.specs}
    run.path(SOLVED_LAYER, layers.specs[3]).unlink()

    solver = Recording([])
    layers, runner, plan, run = setting(tmp_path, solver)
    second = list(refine(runner, plan, run))
    assert [len(handed) for handed in solver.sites] == [1]
    assert second[:3] == first[:3]
    assert all(torch.equal(layers.weight(spec.name), weights[spec.name]) for spec in layers.specs[:3])


def test_a_target_that_keeps_everything_needs_no_solver(tmp_path):
    solver = Recording([])
    layers, runner, plan, run = setting(tmp_path, solver, target=Target.dense)
    before = {spec.name: layers.weight(spec.name).clone() for spec in layers.specs}
    results = list(refine(runner, plan, run))
    assert solver.sites == []
    assert all(result.actual == result.relative == 0 for result in results)
    assert all(torch.equal(layers.weight(name), before[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("storage", [Storage(), Storage(8, 8), Storage(3, 3)], ids=str)
def test_a_layer_kept_whole_costs_no_more_than_its_target_though_it_has_zeros(tmp_path, storage, dtype):
    """Such as weights that went through few bits before: without a code a zero would take an index of all weights."""

    def target(spec: LayerSpec) -> Target:
        return replace(Target.dense(spec), storage=storage)

    layers, runner, plan, run = setting(tmp_path, get_solver("3basil", {}), target, dtype)
    for spec in layers.specs:
        weight = layers.weight(spec.name).clone()
        weight[1] = 0
        weight[:, ::5] = 0
        layers.set_weight(spec.name, weight)
    for spec, result in zip(layers.specs, refine(runner, plan, run), strict=True):
        assert result.bytes <= target(spec).bytes(spec)
        assert (result.nnz == spec.numel) == (storage.values < 16)


@dataclass(frozen=True)
class Broken(Recording):
    """Returns more nonzeros than asked."""

    def solve(self, state: torch.Tensor, target: Target, start: Decomposition | None = None) -> Solution:
        return super().solve(state, Target(0, target.nnz + 1))


def test_a_broken_solution_names_its_layer_and_is_not_saved(tmp_path):
    layers, runner, plan, run = setting(tmp_path, Broken([]))
    with pytest.raises(NumericalError, match=f"Layer {layers.specs[0].name}: the solution keeps"):
        list(refine(runner, plan, run))
    assert not run.path(SOLVED_LAYER, layers.specs[0]).exists()


@dataclass(frozen=True)
class Overflowing(Recording):
    """Returns values beyond the range of half precision."""

    def solve(self, state: torch.Tensor, target: Target, start: Decomposition | None = None) -> Solution:
        return super().solve(state * 1e9, target)


def test_what_overflows_its_type_is_refused(tmp_path):
    layers, runner, plan, run = setting(tmp_path, Overflowing([]), dtype=torch.float16)
    with pytest.raises(NumericalError, match=f"Layer {layers.specs[0].name}: S of the decomposition is not finite"):
        list(refine(runner, plan, run))
    assert not run.path(SOLVED_LAYER, layers.specs[0]).exists()


def test_with_output_grams_errors_are_in_nats(tmp_path):
    # A solver that reads the whole Gram, so that errors are measured in it with and without output Grams.
    _, runner, plan, run = setting(tmp_path / "a", get_solver("sparsegpt"))
    plain = list(refine(runner, plan, run))
    layers, runner, plan, run = setting(tmp_path / "b", get_solver("sparsegpt"))
    for spec in layers.specs:
        run.put(OUTPUT_GRAM, spec, Gram(torch.eye(spec.d_out) * 0.5, 1))
    nats = list(refine(runner, replace(plan, output_grams=True), run))
    # tr(A E G Eᵀ) / 2 with A = I / 2 is a quarter of tr(E G Eᵀ).
    assert [result.actual for result in nats] == pytest.approx([result.actual / 4 for result in plain], rel=1e-5)
    assert [result.relative for result in nats] == pytest.approx([result.relative for result in plain], rel=1e-6)
