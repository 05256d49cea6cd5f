"""Resolve the options of a job into a plan: solver, allocator, budget and pattern as objects.

Later modules use these objects alone; the options as typed are kept for the record of the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from allocators import get_allocator
from globalopt.analysis.corrections import ROUNDS
from globalopt.analysis.grid import Options
from globalopt.budgets.serving_limits import ServingProfile, check_solver, get_profile
from globalopt.errors import UsageError
from globalopt.matching.block import Matching
from globalopt.matching.model import Distillation
from globalopt.models.layers import ModelLayers
from globalopt.pipeline.method_records import method_record
from globalopt.pipeline.options import PROBE_STEPS, RefineOptions, SearchOptions
from globalopt.protocols import Allocator, Needs, Outputs, Reads, Solver
from globalopt.refine.blocks import Order
from globalopt.values.budget import Budget, Limits, Target
from globalopt.values.embeddings import AUTO
from globalopt.values.error_unit import ErrorUnit
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.problem import Problem
from globalopt.values.storage import PLAIN, Storage
from globalopt.values.surface import ErrorSurface
from solvers import get_solver


@dataclass(frozen=True)
class BudgetRule:
    """Define a budget as a fraction of a model's compressible layers, for any model.

    Args:
        kept: fraction kept, in (0, 1].
        accounting: unit in which it is counted: "params" or "bytes".

    >>> BudgetRule(0.5).of([LayerSpec("up", 0, "in", "up", 4, 4)]).limit
    8
    """

    kept: float
    accounting: str = "params"

    def of(self, specs: Iterable[LayerSpec]) -> Budget:
        """Compute the budget of a model with these layers."""
        return Budget.fraction(self.kept, specs, self.accounting)

    def check(self) -> BudgetRule:
        """Return self; `UsageError` or `UnknownNameError` if fraction or accounting are invalid for every model."""
        self.of([LayerSpec("any", 0, "any", "any", 1, 1)])
        return self


@dataclass(frozen=True, eq=False)
class AnalysisPlan:
    """Define how the loss of every option of every layer is predicted; it depends on neither budget nor allocator.

    Args:
        solver: solver of the refinement.
        probe: probe solver, which computes anchor solutions.
        accounting: unit of cost in which parts that the solver lacks are converted into others.
        fisher: whether losses are predicted from gradients, in nats per token; otherwise they are output errors.
        anchors: whether anchor solutions set the level of predictions; otherwise the spans alone do.
        scaling: of the spans; see `compute_span`.
        pattern: N:M pattern of `S`, or None.
        limits: on every layer's target.
        seed: of sampled labels.
        storages: in which a layer may be stored, most bits first.

    >>> plan = resolve(SearchOptions(0.5, solver="wanda")).analysis
    >>> plan.weighted, plan.unit.value
    (False, 'nats per token')
    """

    solver: Solver
    probe: Solver
    accounting: str
    fisher: bool
    anchors: bool
    scaling: str
    pattern: NM | None
    limits: Limits
    seed: int
    storages: tuple[Storage, ...] = (PLAIN,)

    @property
    def rounds_numbers(self) -> bool:
        """Tell whether a layer may be stored in fewer than 16 bits."""
        return self.storages != (PLAIN,)

    @property
    def weighted(self) -> bool:
        """Tell whether layers may be solved with their output Grams, where that lowers the single-layer loss."""
        return self.solver.outputs is not Outputs.NONE and self.fisher

    @property
    def compared(self) -> bool:
        """Tell whether the probe is compared with the solver of the refinement, where that is another one."""
        return self.anchors and method_record(self.probe) != method_record(self.solver)

    @property
    def unit(self) -> ErrorUnit:
        """Return the unit of predicted losses."""
        return ErrorUnit.NATS if self.fisher else ErrorUnit.OUTPUT_ERROR


@dataclass(frozen=True, eq=False)
class RefinementPlan:
    """Define how layers are refined and matched.

    Args:
        solver: solves every layer at its target.
        output_grams: whether errors are weighted by output Grams, in nats per token.
        metric_choices: whether the error metric of every layer is chosen by its single-layer loss.
        order: when the Grams of a block are taken.
        matching: how blocks are matched, or None.
        distillation: how the whole model is matched, or None.
        seed: of labels and of matching.

    >>> resolve(SearchOptions(0.5), RefineOptions(match="block")).refinement.matching.epochs > 0
    True
    """

    solver: Solver
    output_grams: bool
    metric_choices: bool
    order: Order
    matching: Matching | None
    distillation: Distillation | None
    seed: int

    @property
    def unit(self) -> ErrorUnit:
        """Return the unit of layer errors."""
        return ErrorUnit.NATS if self.output_grams else ErrorUnit.OUTPUT_ERROR

    @property
    def block_output_grams(self) -> bool:
        """Tell whether matching weights the error of a block's output by the block's output Gram."""
        return self.matching is not None and self.matching.loss.weighted

    def check(self, layers: ModelLayers) -> None:
        """Raise `UsageError` if the model cannot be matched as asked."""
        if self.distillation is not None and layers.lazy is not None:
            raise UsageError(
                "--match model trains the whole model at once, and it does not fit in memory. Use --match block, or "
                "raise --max-memory."
            )

    def record(self) -> dict[str, Any]:
        """Return the plan as JSON, for the addresses of artefacts."""
        return {
            "solver": method_record(self.solver),
            "output_grams": self.output_grams,
            "metric_choices": self.metric_choices,
            "order": self.order,
            "matching": self.matching and asdict(self.matching),
            "distillation": self.distillation and asdict(self.distillation),
            "seed": self.seed,
        }


@dataclass(frozen=True, eq=False)
class SearchPlan:
    """Define a search: analysis, allocation and refinement.

    Args:
        analysis: how losses are predicted.
        allocator: chooses the targets.
        rule: the budget.
        candidates: which weights stand for a target in the objective: "anchors", "span", or "auto".
        search_tokens: tokens of forward passes on which the allocator may evaluate the objective.
        profile: where the model will be served, with its limits on layers.
        refinement: how the chosen targets are refined.
        words: the options as typed, for the record.
        embeddings: bits of the embeddings, which the budget counts, or "auto"; None: they are not counted.

    >>> plan = resolve(SearchOptions(0.5, allocator="knapsack"))
    >>> plan.allocator.name, plan.rule.kept
    ('knapsack', 0.5)
    """

    analysis: AnalysisPlan
    allocator: Allocator
    rule: BudgetRule
    candidates: str
    search_tokens: int
    profile: ServingProfile
    refinement: RefinementPlan
    words: Mapping[str, Any]
    embeddings: str | None = None

    @property
    def seed(self) -> int:
        """Return the seed of the whole job."""
        return self.analysis.seed

    @property
    def reads(self) -> Reads:
        """Return what is computed of the problem: what the allocator and the candidates of its objective read."""
        reads = self.allocator.reads
        if Reads.OBJECTIVE in reads or Reads.SPANS in reads:
            reads |= Reads.SURFACES
        if Reads.SURFACES in reads and (self.candidates == "span" or not self.analysis.anchors):
            reads |= Reads.SPANS
        return reads

    @property
    def rounds(self) -> int:
        """Return the most rounds in which predicted losses are corrected by the model."""
        return ROUNDS if self.analysis.fisher and self.words["correct"] else 0

    def check_feasible(self, specs: tuple[LayerSpec, ...], budget: Budget) -> None:
        """Refuse a model for which there is no allocation, before anything is computed.

        Raises:
            UsageError: the pattern does not divide a layer, or no layer has room for a rank that can be served.
            BudgetError: the pattern does not fit the budget.
        """
        pattern, limits = self.analysis.pattern, self.analysis.limits
        if self.profile.low_rank_part:
            room = max(Options.of(spec, spec.max_rank, pattern, limits).rows[-1][0] for spec in specs)
            if not room:
                raise UsageError(
                    f"No layer has room for rank {limits.rank_multiple}, and --serving-profile "
                    f"{self.words['serving_profile']} needs some rank. Lower --rank-multiple."
                )
        if pattern is not None:
            surfaces = tuple(
                ErrorSurface(spec, (Target(0, pattern.nnz(spec), pattern, storage=self.analysis.storages[-1]),), (0.0,))
                for spec in specs
            )
            Problem(surfaces, budget, pattern)

    def record(self) -> dict[str, Any]:
        """Return the plan as JSON, for the identity of a run: options as typed, and the methods that they resolve to.

        Options of methods are recorded with their defaults, so that typing a default does not make it another run.
        """
        words = {name: word for name, word in self.words.items() if name not in ("allocator_options", "solver_options")}
        if words.get("storage") == "16":
            # The identity of a run in 16 bits is what it was before there were others.
            del words["storage"]
        if words.get("embeddings") is None:
            words.pop("embeddings", None)
        return {
            "search": words,
            "refining": self.refinement.record(),
            "methods": {
                "solver": method_record(self.analysis.solver),
                "allocator": method_record(self.allocator),
                "probe": method_record(self.analysis.probe),
            },
        }


def resolve(
    options: SearchOptions,
    refining: RefineOptions | None = None,
    allocator: Allocator | None = None,
    solver: Solver | None = None,
) -> SearchPlan:
    """Resolve the options of a search, before a model is loaded.

    Args:
        refining: how the result is refined; None is without matching.
        allocator, solver: objects of the caller, in place of those that the options name.
    Raises:
        UsageError, UnknownNameError: an option is unknown, out of its range, or at odds with another.

    >>> resolve(SearchOptions(0.5, pattern="2:4")).analysis.pattern
    NM(keep=2, of=4)
    """
    solver = solver or get_solver(options.solver, options.solver_options)
    allocator = allocator or get_allocator(options.allocator, options.allocator_options)
    method_record(allocator)
    if not isinstance(getattr(allocator, "reads", None), Reads):
        raise UsageError(
            f"{type(allocator).__name__} does not say what it reads of a problem; give the class `reads`, such as "
            "Reads.SURFACES (globalopt.protocols)."
        )
    anchors = options.predict_from == "anchors"
    if options.candidates == "anchors" and not anchors:
        raise UsageError(
            "There are no anchor solutions to make candidates from, as --predict-from is span. Use --candidates span."
        )
    check_solver(options.serving_profile, options.limits, solver)
    rule = BudgetRule(options.budget, options.accounting).check()
    analysis = AnalysisPlan(
        solver=solver,
        probe=probe_solver(solver, options.probe_steps),
        accounting=options.accounting,
        fisher=options.sensitivity != "none",
        anchors=anchors,
        scaling=options.scaling,
        pattern=NM.parse(options.pattern),
        limits=options.limits,
        seed=options.seed,
        storages=options.storages,
    )
    if len(options.storages) > 1 and Reads.SURFACES not in allocator.reads:
        raise UsageError(
            f"Allocator {allocator.name} reads no predicted losses, so that it cannot choose among --storage "
            f"{options.storage}. Give one storage, or another --allocator."
        )
    if options.embeddings == AUTO:
        check_automatic(allocator, analysis.fisher)
    if analysis.rounds_numbers and solver.signs:
        raise UsageError(f"Solver {solver.name} keeps a plane of signs, which is stored in 16 bits alone.")
    refinement = replace(
        resolve_refinement(refining or RefineOptions(), solver, analysis.fisher, options.seed),
        # Where losses were predicted there are output Grams, so that errors are reported in nats too.
        output_grams=analysis.weighted or (analysis.fisher and Reads.SURFACES in allocator.reads),
        metric_choices=analysis.weighted,
    )
    profile = get_profile(options.serving_profile)
    return SearchPlan(
        analysis,
        allocator,
        rule,
        options.candidates,
        options.search_tokens,
        profile,
        refinement,
        asdict(options),
        options.embeddings,
    )


def check_automatic(allocator: Allocator, fisher: bool) -> None:
    """Raise `UsageError` where the bits of embeddings cannot be chosen, as there are no losses in nats to compare.

    >>> from allocators import Knapsack
    >>> check_automatic(Knapsack(), fisher=True)
    """
    if Reads.SURFACES not in allocator.reads:
        raise UsageError(
            f"Allocator {allocator.name} reads no predicted losses, so that the bits of --embeddings auto cannot be "
            "chosen beside it. Give --embeddings 16, 8 or 6, or another --allocator."
        )
    if not fisher:
        raise UsageError(
            "--embeddings auto compares losses in nats, and --sensitivity none predicts output errors. Give "
            "--embeddings 16, 8 or 6, or leave out --sensitivity."
        )


def resolve_refinement(options: RefineOptions, solver: Solver, fisher: bool, seed: int) -> RefinementPlan:
    """Resolve the options of a refinement without a search before it.

    Args:
        fisher: whether a backward sweep may weight errors by output Grams.

    >>> resolve_refinement(RefineOptions(), get_solver("wanda"), fisher=True, seed=0).output_grams
    False
    """
    weighted = fisher and solver.outputs is not Outputs.NONE
    return RefinementPlan(
        solver=solver,
        output_grams=weighted,
        metric_choices=weighted,
        order=Order(options.order),
        matching=options.matching(fisher),
        distillation=options.distillation,
        seed=seed,
    )


def probe_solver(solver: Solver, steps: int = PROBE_STEPS) -> Solver:
    """Make the probe solver of a solver: a few steps of 3BASiL, with the diagonal of the output Gram where it uses one.

    With the whole output Gram a step has four products with Grams in place of one: gates of SmolLM2-135M took four
    times as long. A solver that only ranks the entries of a layer takes no time, and probes itself.

    >>> probe_solver(get_solver("wanda")).name, probe_solver(get_solver("sparsegpt")).name
    ('wanda', '3basil')
    """
    if solver.needs is not Needs.GRAM and not solver.low_rank:
        return solver
    outputs = Outputs.NONE if solver.outputs is Outputs.NONE else Outputs.ROWS
    return get_solver("3basil", {"steps": str(steps), "outputs": outputs})
