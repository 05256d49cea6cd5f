"""The stages of an analysis: all that an allocation is made from, each skipped where its artefacts are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from allocators import get_allocator
from globalopt.analysis import (
    MEASURED_WINDOWS,
    compare_fits,
    fit_layers,
    measure_layers,
    output_grams,
    price_by_gradients,
    price_by_grams,
    span_layers,
    weigh_layers,
)
from globalopt.capture import Batch, BlockRunner
from globalopt.errors import UsageError
from globalopt.fit_ratio import sampled
from globalopt.protocols import Needs, Outputs, Solver
from globalopt.search_objective import CANDIDATES
from globalopt.serving import check_solver, get_profile, limits_of
from globalopt.span import SCALINGS
from globalopt.store import Run
from globalopt.surface import Options
from globalopt.types import FREE, NM, Budget, ErrorSurface, Gram, LayerSpec, Limits, Problem, Target
from globalopt.workbench import Bench
from solvers import get_solver

SENSITIVITIES = ("fisher", "none")
PRICINGS = ("fit", "span")

OTHER_LABELS = 2**31
"""Turns a seed of labels into that of others."""


@dataclass(frozen=True)
class SearchOptions:
    """What `search` is asked for; option texts are kept as typed until their table converts them."""

    budget: float
    accounting: str = "params"
    pattern: str = "unstructured"
    allocator: str = "auto"
    allocator_options: Mapping[str, str] = field(default_factory=dict)
    solver: str = "3basil"
    solver_options: Mapping[str, str] = field(default_factory=dict)
    sensitivity: str = "fisher"
    scaling: str = "activation"
    seed: int = 0
    pricing: str = "fit"
    candidates: str = "auto"
    search_tokens: int = 500_000
    serving_profile: str = "dense"
    rank_multiple: int | None = None

    def __post_init__(self) -> None:
        profile = get_profile(self.serving_profile)
        limits = self.limits
        if profile.pattern is not None and self.pattern != profile.pattern:
            raise UsageError(f"--serving-profile {self.serving_profile} is of pattern {profile.pattern} alone.")
        if not limits.sparse and self.pattern != "unstructured":
            raise UsageError(
                f"--serving-profile {self.serving_profile} keeps no sparse parts, and --pattern {self.pattern} is of "
                "these."
            )
        if not limits.sparse and self.scaling != "direct":
            raise UsageError(
                f"--serving-profile {self.serving_profile} takes --span-scaling direct: other spans have few ranks."
            )
        check_word("candidates", self.candidates, CANDIDATES)
        check_word("sensitivity", self.sensitivity, SENSITIVITIES)
        check_word("span-scaling", self.scaling, SCALINGS)
        check_word("pricing", self.pricing, PRICINGS)

    @property
    def limits(self) -> Limits:
        """What every layer must be within, so that it can be served."""
        return limits_of(self.serving_profile, self.rank_multiple)

    def words(self) -> dict[str, Any]:
        """As JSON, for the identity of a run; runs without a place to be served are what they ever were."""
        words = asdict(self)
        if self.serving_profile == "dense":
            del words["serving_profile"]
        if self.rank_multiple is None:
            del words["rank_multiple"]
        return words


def check_word(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"--{option} is one of {', '.join(known)}; got '{value}'.")


def check_options(options: SearchOptions) -> None:
    """Raise what is wrong with the options before a model is loaded: unknown names, budgets outside (0, 1]."""
    solver = get_solver(options.solver, options.solver_options)
    get_allocator(options.allocator, options.allocator_options)
    if options.candidates == "fit" and not fitted(options, solver):
        raise UsageError(
            f"There are no fits to make candidates from: solver {solver.name} moves no weight it keeps, or --pricing "
            "is span. Use --candidates span."
        )
    NM.parse(options.pattern)
    check_solver(options.serving_profile, options.limits, solver)
    Budget.fraction(options.budget, [LayerSpec("any", 0, "any", "any", 1, 1)], options.accounting)


def fitted(options: SearchOptions, solver: Solver) -> bool:
    """Whether layers are priced by fits. A solver that reads less than the Gram leaves what the span leaves."""
    return options.pricing == "fit" and solver.needs is Needs.GRAM


def check_feasible(options: SearchOptions, specs: tuple[LayerSpec, ...], budget: Budget) -> None:
    """Refuse what no allocation can be, before anything is computed.

    Raises:
        UsageError: the pattern does not divide a layer, or no layer has room for a rank that can be served.
        BudgetError: the pattern does not fit the budget.
    """
    pattern, limits = NM.parse(options.pattern), options.limits
    if get_profile(options.serving_profile).low_rank_part:
        room = max(Options.of(spec, spec.max_rank, pattern, limits).rows[-1][0] for spec in specs)
        if not room:
            raise UsageError(
                f"No layer has room for rank {limits.rank_multiple}, and --serving-profile {options.serving_profile} "
                "needs some rank. Lower --rank-multiple."
            )
    if pattern is None:
        return
    surfaces = tuple(ErrorSurface(spec, (Target(0, pattern.nnz(spec), pattern),), (0.0,)) for spec in specs)
    Problem(surfaces, budget, pattern)


def analyse(bench: Bench, options: SearchOptions, run: Run, pattern: NM | None) -> None:
    """All that an allocation is made from: Grams, the metric of every layer, spans, fits, measurements, prices.

    What is there already is not made again.
    """
    layers, device = bench.layers, bench.loaded.device
    unpriced = [spec for spec in layers.specs if not run.sensitivity_path(spec).exists()]
    if not unpriced:
        return
    solver = get_solver(options.solver, options.solver_options)
    limits = options.limits
    weighted = solver.outputs is not Outputs.NONE and options.sensitivity != "none"
    if weighted or options.scaling == "output":
        # Of other labels than the prices': what was fitted to gradients looks too good when they price it.
        collect_outputs(bench, run, options.seed ^ OTHER_LABELS)
    if weighted:
        weigh(bench, run, pattern, solver.outputs, limits)
    runner = bench.runner(run.folder)
    with bench.stage("span", len(layers.specs), "layers") as advance:
        inputs = span_layers(runner, run, options.scaling, options.sensitivity != "none", device, advance)
    if fitted(options, solver):
        _fit(bench, options, run, pattern, solver, run.chosen_outputs if weighted else lambda spec: None)
        # A pattern keeps more than what needs measuring.
        if options.sensitivity != "none" and pattern is None:
            _measure(bench, run)
    with bench.stage("price", len(unpriced), "layers") as advance:
        if options.sensitivity == "none":
            found = price_by_grams(layers, unpriced, run, pattern, limits)
        else:
            found = price_by_gradients(runner, inputs, unpriced, run, pattern, options.seed, device, limits)
        for one in found:
            run.write_sensitivity(one.surface, one.outputs, one.overlap)
            advance(one.surface.spec.name)


def weigh(bench: Bench, run: Run, pattern: NM | None, outputs: Outputs, limits: Limits = FREE) -> None:
    """Choose the metric of every layer that has none yet, between `tr(E G Eᵀ)` and as much of `A` as `outputs` says."""
    unweighed = [spec for spec in bench.layers.specs if not run.weighing_path(spec).exists()]
    if unweighed:
        with bench.stage("weigh", len(unweighed), "layers") as advance:
            weigh_layers(_look(bench), unweighed, run, pattern, quick(outputs), advance, limits)


def quick(outputs: Outputs) -> Solver:
    """What fits layers that are only looked at."""
    return get_solver("3basil", {"steps": "80", "outputs": str(outputs)})


def _look(bench: Bench) -> BlockRunner:
    """A runner on the few calibration windows on which layers are looked at one at a time."""
    return BlockRunner(bench.layers, [Batch(bench.splits.calibration.windows[:MEASURED_WINDOWS])])


def _fit(
    bench: Bench,
    options: SearchOptions,
    run: Run,
    pattern: NM | None,
    solver: Solver,
    chosen: Callable[[LayerSpec], Gram | None],
) -> None:
    """Fit the anchors of every layer that has no fits yet, in the output Gram that `chosen` gives it."""
    layers, limits, glance = bench.layers, options.limits, quick(solver.outputs)
    if all(run.fits_path(spec).exists() for spec in layers.specs):
        return
    budget = Budget.fraction(options.budget, layers.specs, options.accounting)
    with bench.stage("compare", len(sampled(layers.specs)), "layers") as advance:
        ratio = compare_fits(layers, run, pattern, glance, solver, budget, chosen, advance, limits)
    unfitted = [spec for spec in layers.specs if not run.fits_path(spec).exists()]
    with bench.stage("fit", len(unfitted), "layers") as advance:
        fit_layers(layers, unfitted, run, pattern, glance, chosen, advance, limits, ratio)


def _measure(bench: Bench, run: Run) -> None:
    """Measure the lowest fits of every layer where that was not done yet."""
    unmeasured = [spec for spec in bench.layers.specs if not run.measured_path(spec).exists()]
    if unmeasured:
        with bench.stage("measure", len(unmeasured), "layers") as advance:
            measure_layers(_look(bench), unmeasured, run, advance)


def collect_block_outputs(bench: Bench, run: Run, seed: int) -> None:
    """The output Grams of the blocks, by a backward sweep, where they are not there yet."""
    if not all(run.block_outputs_path(block).exists() for block in range(len(bench.layers.blocks))):
        with bench.stage("outputs", 1, "sweeps") as advance:
            output_grams(bench.runner(run.folder), run, [], seed, bench.loaded.device)
            advance("blocks")


def collect_outputs(bench: Bench, run: Run, seed: int) -> None:
    """The output Grams that are not there yet, by a backward sweep of their own."""
    unmeasured = [spec for spec in bench.layers.specs if not run.outputs_path(spec).exists()]
    if unmeasured:
        runner = bench.runner(run.folder)
        with bench.stage("outputs", len(unmeasured), "layers") as advance:
            output_grams(runner, run, unmeasured, seed, bench.loaded.device, advance)
