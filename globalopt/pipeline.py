"""The verbs: what `search`, `compress` and `eval` do, as short functions that call the stages in order."""

from __future__ import annotations

import contextlib
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from allocators import get_allocator
from globalopt import budget_file
from globalopt.analysis import (
    fit_layers,
    measure_layers,
    output_grams,
    price_by_gradients,
    price_by_grams,
    span_layers,
    weigh_layers,
)
from globalopt.budget_file import BudgetFile
from globalopt.calibration import Split, Splits, make_splits, read_text, reference_splits
from globalopt.capture import Batch, BlockRunner
from globalopt.errors import ArtefactError, UsageError
from globalopt.evaluate import evaluate, evaluate_both
from globalopt.layers import ModelLayers, check_finite, find_layers
from globalopt.models import LoadedModel, load_model, model_fingerprint, reference_folder, save_dense, weights_sha256
from globalopt.protocols import Allocator, Needs, Outputs, Progress, Solver
from globalopt.recorder import Selection
from globalopt.refine import Refinement, for_solver, refine
from globalopt.resources import StageClock
from globalopt.search_objective import CANDIDATES, SearchObjective
from globalopt.span import SCALINGS
from globalopt.store import Run, digest
from globalopt.summary import Metrics, Search, Summary
from globalopt.types import NM, Allocation, Budget, ErrorSurface, Gram, LayerSpec, Problem, Target
from solvers import get_solver

REFERENCE = "reference"
SENSITIVITIES = ("fisher", "none")
PRICINGS = ("fit", "span")
MEASURED_WINDOWS = 4
"""Calibration windows on which single layers are measured."""

OTHER_LABELS = 2**31
"""Turns a seed of labels into that of others."""

NATS = "nats per token"
OUTPUT_ERROR = "output error"


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded. `model` None is the bundled reference model."""

    model: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    allow_low_coverage: bool = False


@dataclass(frozen=True)
class TextOptions:
    """Which text, and how it is cut into windows. `calibration` None is the bundled text (reference model only)."""

    calibration: str | None = None
    eval_text: str | None = None
    text_column: str | None = None
    nsamples: int = 128
    seqlen: int = 256
    eval_windows: int = 128
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("nsamples", "seqlen", "eval_windows", "batch_size"):
            least = 2 if name == "seqlen" else 1
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} must be at least {least}; got {getattr(self, name)}.")


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

    def __post_init__(self) -> None:
        _check_word("candidates", self.candidates, CANDIDATES)
        _check_word("sensitivity", self.sensitivity, SENSITIVITIES)
        _check_word("span-scaling", self.scaling, SCALINGS)
        _check_word("pricing", self.pricing, PRICINGS)


def _check_word(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"--{option} is one of {', '.join(known)}; got '{value}'.")


@dataclass(frozen=True, eq=False)
class Bench:
    """A loaded model with its layers and its windows, and where stages say how far they are."""

    model_options: ModelOptions
    text_options: TextOptions
    loaded: LoadedModel
    layers: ModelLayers
    splits: Splits
    progress: Progress
    clock: StageClock

    @property
    def name(self) -> str:
        return self.model_options.model or REFERENCE

    @property
    def fingerprint(self) -> str:
        return model_fingerprint(self.layers)

    def batches(self, split: Split) -> list[Batch]:
        return [Batch(windows) for windows in split.windows.split(self.text_options.batch_size)]

    def identity(self, seed: int) -> dict[str, Any]:
        """What decides results apart from the method: weights, windows, precision, seed."""
        return {
            "model": self.fingerprint,
            "weights": weights_sha256(self.layers),
            "dtype": str(self.loaded.model.dtype).removeprefix("torch."),
            "splits": {split.name: split.sha256 for split in self.splits},
            "batch_size": self.text_options.batch_size,
            "seed": seed,
        }

    def facts(self, command: str) -> dict[str, Any]:
        """What is recorded beside the identity: how to make the same run, or evaluate it, again."""
        return {
            "command": command,
            "model": self.name,
            "model_options": asdict(self.model_options),
            "text_options": asdict(self.text_options),
            "splits": {split.name: split.record() for split in self.splits},
            "versions": versions(),
        }

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[str], None]]:
        """A stage that is both shown and measured."""
        with self.clock.stage(name), self.progress.stage(name, total, unit) as advance:
            yield advance


def versions() -> dict[str, str]:
    """Versions of what decides results."""
    packages = ("globalopt", "torch", "transformers", "scipy", "numpy")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def set_up(model: ModelOptions, text: TextOptions, seed: int, progress: Progress, clock: StageClock) -> Bench:
    """Load the model and cut the text into its splits.

    Raises:
        UsageError: a model of the user's without a text of the user's.
        ArtefactError, CalibrationError, UnsupportedModelError, NumericalError: model or text cannot be used.
    """
    with clock.stage("load"), progress.stage("load", 2, "steps") as advance:
        loaded, layers = _load(model)
        advance("model")
        splits = _splits(loaded, model, text, seed)
        advance("text")
    if model.model is None:
        progress.note("No model given: using the bundled reference model (a 7M-parameter Llama, WikiText-2).")
    return Bench(model, text, loaded, layers, splits, progress, clock)


def _load(options: ModelOptions) -> tuple[LoadedModel, ModelLayers]:
    loaded = load_model(
        options.model or str(reference_folder()), options.dtype, options.device, options.trust_remote_code
    )
    layers = find_layers(loaded.model, options.allow_low_coverage)
    check_finite(layers)
    return loaded, layers


def _splits(loaded: LoadedModel, model: ModelOptions, text: TextOptions, seed: int) -> Splits:
    longest = getattr(loaded.model.config, "max_position_embeddings", None)
    sizes: dict[str, Any] = {
        "nsamples": text.nsamples,
        "seqlen": text.seqlen,
        "seed": seed,
        "eval_windows": text.eval_windows,
        "max_length": longest,
    }
    if text.calibration in (None, REFERENCE):
        if model.model is not None and text.calibration is None:
            raise UsageError(
                "A model of your own needs a text of its own: add --calibration FILE (.txt, .jsonl, .parquet), a "
                "folder saved by `datasets`, or a hub data set."
            )
        return reference_splits(loaded.tokenizer, **sizes)
    calibration = read_text(text.calibration, text.text_column)
    evaluation = read_text(text.eval_text, text.text_column) if text.eval_text else None
    return make_splits(loaded.tokenizer, calibration, evaluation, **sizes)


def search(
    bench: Bench,
    options: SearchOptions,
    folder: Path,
    command: str,
    fresh: bool = False,
    allocator: Allocator | None = None,
) -> tuple[Summary, Run]:
    """Span, allocate, refine, evaluate: the whole job, into `folder`. Running it again goes on where it stopped.

    Args:
        allocator: stands in for the one that the options name; their words then only tell runs apart.
    """
    solver = get_solver(options.solver, options.solver_options)
    allocator = allocator or get_allocator(options.allocator, options.allocator_options)
    pattern = NM.parse(options.pattern)
    specs = bench.layers.specs
    budget = Budget.fraction(options.budget, specs, options.accounting)
    check_pattern(pattern, specs, budget)

    identity = {**bench.identity(options.seed), "search": asdict(options)}
    run = Run.start(folder, identity, bench.facts(command), fresh)
    if run.summary_path.exists():
        bench.progress.note(f"{folder} is finished; nothing was computed again.")
        return run.read_summary(), run

    analyse(bench, options, run, pattern)
    problem = pose(bench, options, run)
    allocation, searched = allocate(bench, options, run, problem, allocator)
    file = budget_of(bench, options, problem, allocation)
    budget_file.write(run.budget_path, file)

    def outputs(spec: LayerSpec) -> Gram | None:
        return run.read_sensitivity(spec)[1]

    unit = file.error_unit
    return finish(bench, run, file, allocation, solver, command, options.seed, unit, outputs, searched), run


def allocate(
    bench: Bench, options: SearchOptions, run: Run, problem: Problem, allocator: Allocator
) -> tuple[Allocation, Search | None]:
    """The allocator's answer, and what it asked of the model, if it asks."""
    if not allocator.asks:
        with bench.stage("allocate", 1, "budgets") as advance:
            allocation = allocator.allocate(problem)
            advance(allocator.name)
        return allocation, None
    with true_loss(bench, options, run, problem) as objective:
        allocation = allocator.allocate(problem, objective)
        loss = float(objective.losses([allocation.targets], range(objective.chunks)).mean())
    return allocation, objective.facts(loss)


def pose(bench: Bench, options: SearchOptions, run: Run) -> Problem:
    """The problem of an analysed run: what its solver can make of every layer, under its budget."""
    specs = bench.layers.specs
    solver = get_solver(options.solver, options.solver_options)
    surfaces = tuple(_offered(run.read_sensitivity(spec)[0], solver) for spec in specs)
    profiles = {spec.name: run.read_profile(spec) for spec in specs}
    budget = Budget.fraction(options.budget, specs, options.accounting)
    return Problem(surfaces, budget, NM.parse(options.pattern), options.seed, profiles)


def budget_of(bench: Bench, options: SearchOptions, problem: Problem, allocation: Allocation) -> BudgetFile:
    """The budget file of an allocation of a run's problem."""
    coverage = bench.layers.coverage
    unit = NATS if options.sensitivity != "none" else OUTPUT_ERROR
    return budget_file.make(
        allocation, problem, bench.fingerprint, coverage.covered, coverage.block_params, options.budget, unit
    )


@contextlib.contextmanager
def true_loss(
    bench: Bench, options: SearchOptions, run: Run, problem: Problem, stage: str = "search"
) -> Iterator[SearchObjective]:
    """What a search asks, on the selection text and in the journal of an analysed run; the model is dense after it."""
    batches = bench.batches(bench.splits.selection)
    selection = Selection(tuple(len(batch.input_ids) for batch in batches), bench.splits.selection.seqlen)
    most = options.search_tokens // max(batch.tokens for batch in batches)
    with bench.stage(stage, most, "chunks") as advance:
        objective = SearchObjective(
            lambda: BlockRunner(bench.layers, batches),
            selection,
            run,
            problem,
            options.candidates,
            options.search_tokens,
            advance,
        )
        try:
            yield objective
        finally:
            objective.close()


def compress(
    bench: Bench,
    source: Path,
    file: BudgetFile,
    solver_name: str,
    solver_options: Mapping[str, str],
    seed: int,
    folder: Path,
    command: str,
    fresh: bool = False,
    sensitivity: str = "fisher",
) -> tuple[Summary, Run]:
    """Refine a found budget with any solver, evaluate, and write the result into `folder`."""
    _check_word("sensitivity", sensitivity, SENSITIVITIES)
    solver = get_solver(solver_name, solver_options)
    allocation = file.for_model(bench.fingerprint, bench.layers.specs, source)
    for spec in bench.layers.specs:
        for_solver(allocation.targets[spec.name], spec, solver, allocation.budget)
    identity = {
        **bench.identity(seed),
        "budget": digest(file.model_dump(mode="json")),
        "solver": [solver_name, dict(solver_options)],
        "sensitivity": sensitivity,
    }
    run = Run.start(folder, identity, bench.facts(command), fresh)
    if run.summary_path.exists():
        bench.progress.note(f"{folder} is finished; nothing was computed again.")
        return run.read_summary(), run
    budget_file.write(run.budget_path, file)
    if sensitivity == "none" or solver.outputs is Outputs.NONE:
        return finish(bench, run, file, allocation, solver, command, seed, OUTPUT_ERROR, lambda spec: None), run
    collect_outputs(bench, run, seed)
    patterns = {target.pattern for target in allocation.targets.values()}
    weigh(bench, run, patterns.pop() if len(patterns) == 1 else None, solver.outputs)
    return finish(bench, run, file, allocation, solver, command, seed, NATS, run.read_outputs), run


def collect_outputs(bench: Bench, run: Run, seed: int) -> None:
    """The output Grams that are not there yet, by a backward sweep of their own."""
    unmeasured = [spec for spec in bench.layers.specs if not run.outputs_path(spec).exists()]
    if unmeasured:
        runner = BlockRunner(bench.layers, bench.batches(bench.splits.calibration))
        with bench.stage("outputs", len(unmeasured), "layers") as advance:
            output_grams(runner, run, unmeasured, seed, bench.loaded.device, advance)


def check_options(options: SearchOptions) -> None:
    """Raise what is wrong with the options before a model is loaded: unknown names, budgets outside (0, 1]."""
    solver = get_solver(options.solver, options.solver_options)
    get_allocator(options.allocator, options.allocator_options)
    if options.candidates == "fit" and not _fitted(options, solver):
        raise UsageError(
            f"There are no fits to make candidates from: solver {solver.name} moves no weight it keeps, or --pricing "
            "is span. Use --candidates span."
        )
    NM.parse(options.pattern)
    Budget.fraction(options.budget, [LayerSpec("any", 0, "any", "any", 1, 1)], options.accounting)


def _fitted(options: SearchOptions, solver: Solver) -> bool:
    """Whether layers are priced by fits. A solver that reads less than the Gram leaves what the span leaves."""
    return options.pricing == "fit" and solver.needs is Needs.GRAM


def check_pattern(pattern: NM | None, specs: tuple[LayerSpec, ...], budget: Budget) -> None:
    """Refuse a pattern that does not divide a layer or does not fit the budget, before anything is computed."""
    if pattern is None:
        return
    surfaces = tuple(ErrorSurface(spec, (Target(0, pattern.nnz(spec), pattern),), (0.0,)) for spec in specs)
    Problem(surfaces, budget, pattern)


def _offered(surface: ErrorSurface, solver: Solver) -> ErrorSurface:
    """The part of a surface a solver can make: rank 0 only, where it has no low-rank part."""
    if solver.low_rank:
        return surface
    kept = [(t, e) for t, e in zip(surface.targets, surface.error, strict=True) if t.rank == 0]
    return ErrorSurface(surface.spec, tuple(t for t, _ in kept), tuple(e for _, e in kept))


def analyse(bench: Bench, options: SearchOptions, run: Run, pattern: NM | None) -> None:
    """All that an allocation is made from: Grams, the metric of every layer, spans, fits, measurements, prices.

    What is there already is not made again.
    """
    layers, device = bench.layers, bench.loaded.device
    unpriced = [spec for spec in layers.specs if not run.sensitivity_path(spec).exists()]
    if not unpriced:
        return
    solver = get_solver(options.solver, options.solver_options)
    weighted = solver.outputs is not Outputs.NONE and options.sensitivity != "none"
    if weighted or options.scaling == "output":
        # Of other labels than the prices': what was fitted to gradients looks too good when they price it.
        collect_outputs(bench, run, options.seed ^ OTHER_LABELS)
    if weighted:
        weigh(bench, run, pattern, solver.outputs)
    runner = BlockRunner(layers, bench.batches(bench.splits.calibration))
    with bench.stage("span", len(layers.specs), "layers") as advance:
        inputs = span_layers(runner, run, options.scaling, options.sensitivity != "none", device, advance)
    if _fitted(options, solver):
        _fit(bench, run, pattern, solver.outputs, run.chosen_outputs if weighted else lambda spec: None)
        # A pattern keeps more than what needs measuring.
        if options.sensitivity != "none" and pattern is None:
            _measure(bench, run)
    with bench.stage("price", len(unpriced), "layers") as advance:
        if options.sensitivity == "none":
            found = price_by_grams(layers, unpriced, run, pattern)
        else:
            found = price_by_gradients(runner, inputs, unpriced, run, pattern, options.seed, device)
        for surface, outputs in found:
            run.write_sensitivity(surface, outputs)
            advance(surface.spec.name)


def weigh(bench: Bench, run: Run, pattern: NM | None, outputs: Outputs) -> None:
    """Choose the metric of every layer that has none yet, between `tr(E G Eᵀ)` and as much of `A` as `outputs` says."""
    unweighed = [spec for spec in bench.layers.specs if not run.weighing_path(spec).exists()]
    if unweighed:
        with bench.stage("weigh", len(unweighed), "layers") as advance:
            weigh_layers(_look(bench), unweighed, run, pattern, _quick(outputs), advance)


def _quick(outputs: Outputs) -> Solver:
    """What fits layers that are only looked at."""
    return get_solver("3basil", {"steps": "80", "outputs": str(outputs)})


def _look(bench: Bench) -> BlockRunner:
    """A runner on the few calibration windows on which layers are looked at one at a time."""
    return BlockRunner(bench.layers, [Batch(bench.splits.calibration.windows[:MEASURED_WINDOWS])])


def _fit(
    bench: Bench, run: Run, pattern: NM | None, outputs: Outputs, chosen: Callable[[LayerSpec], Gram | None]
) -> None:
    """Fit the anchors of every layer that has no fits yet, in the output Gram that `chosen` gives it."""
    unfitted = [spec for spec in bench.layers.specs if not run.fits_path(spec).exists()]
    if unfitted:
        with bench.stage("fit", len(unfitted), "layers") as advance:
            fit_layers(bench.layers, unfitted, run, pattern, _quick(outputs), chosen, advance)


def _measure(bench: Bench, run: Run) -> None:
    """Measure the lowest fits of every layer where that was not done yet."""
    unmeasured = [spec for spec in bench.layers.specs if not run.measured_path(spec).exists()]
    if unmeasured:
        with bench.stage("measure", len(unmeasured), "layers") as advance:
            measure_layers(_look(bench), unmeasured, run, advance)


def finish(
    bench: Bench,
    run: Run,
    file: BudgetFile,
    allocation: Allocation,
    solver: Solver,
    command: str,
    seed: int,
    unit: str,
    outputs: Callable[[LayerSpec], Gram | None],
    searched: Search | None = None,
) -> Summary:
    """Refine to the allocation, save the model, evaluate what was saved, and write the summary.

    The bench's model is changed in place: a bench serves one refinement.
    """
    layers = bench.layers
    dtype = bench.loaded.checkpoint_dtype
    notes = list(_notes(allocation, solver))
    for note in notes:
        bench.progress.note(note)
    predicted = {entry.name: entry.predicted if file.error_unit == unit else None for entry in file.layers}
    plan = Refinement(allocation.targets, solver, allocation.budget, dtype, predicted)

    with bench.stage("refine", len(layers.specs), "layers") as advance:
        runner = BlockRunner(layers, bench.batches(bench.splits.calibration))
        results = list(refine(runner, plan, run, outputs, bench.loaded.device, advance, run.weighs_outputs))
    with bench.stage("save", 1, "models") as advance:
        # A model folder appears whole or not at all, so one that is there is this run's.
        if not run.model_folder.exists():
            save_dense(bench.loaded.model, bench.loaded.tokenizer, run.model_folder, dtype)
        advance(str(run.model_folder))
    dense, compressed = _evaluate_both(bench, run.model_folder)
    summary = Summary(
        command=command,
        model=bench.name,
        allocator=file.allocator,
        solver=solver.name,
        seed=seed,
        accounting=file.accounting,
        asked=file.asked,
        limit=file.limit,
        used=sum(result.cost for result in results),
        total=file.total,
        predicted=file.predicted,
        bound=file.bound,
        error_unit=unit,
        budget_unit=file.error_unit,
        covered=layers.coverage.covered,
        block_params=layers.coverage.block_params,
        skipped=dict(layers.coverage.skipped),
        layers=tuple(results),
        dense=dense,
        compressed=compressed,
        stages=bench.clock.costs,
        splits={split.name: split.record() for split in bench.splits},
        versions=versions(),
        notes=tuple(notes),
        search=searched,
    )
    run.write_summary(summary)
    return summary


def _notes(allocation: Allocation, solver: Solver) -> Iterator[str]:
    ranked = sum(1 for target in allocation.targets.values() if target.rank)
    if ranked and not solver.low_rank:
        yield (
            f"Solver {solver.name} has no low-rank part: the rank of {ranked} layers is kept as nonzeros of the same "
            f"cost in {allocation.budget.accounting}."
        )
    if not solver.sparse:
        yield f"Solver {solver.name} has no sparse part: nonzeros are kept as rank of at most the same cost."
    if solver.signs:
        yield f"Solver {solver.name} keeps a sign plane of rank 1 in every layer, paid for with other parts of it."


def _evaluate_both(bench: Bench, folder: Path) -> tuple[tuple[Metrics, ...], tuple[Metrics, ...]]:
    """Metrics of the dense model and of the saved one, reloaded, on validation and test windows."""
    options = bench.model_options
    splits = (bench.splits.validation, bench.splits.test)
    windows = sum(len(split.windows) for split in splits)
    with bench.stage("evaluate", windows, "windows") as advance:
        original, _ = _load(options)
        saved = load_model(str(folder), options.dtype, options.device, options.trust_remote_code)
        size = bench.text_options.batch_size
        pairs = [evaluate_both(saved.model, original.model, split, size, advance) for split in splits]
    return tuple(dense for dense, _ in pairs), tuple(compressed for _, compressed in pairs)


def evaluate_folder(bench: Bench, dense: str | None) -> tuple[Metrics, ...]:
    """Metrics of the bench's model on its validation and test windows, with KL to the model `dense` if given."""
    splits = (bench.splits.validation, bench.splits.test)
    with bench.stage("evaluate", sum(len(split.windows) for split in splits), "windows") as advance:
        options = bench.model_options
        against = None
        if dense is not None:
            source = str(reference_folder()) if dense == REFERENCE else dense
            against = load_model(source, options.dtype, options.device, options.trust_remote_code).model
        size = bench.text_options.batch_size
        return tuple(evaluate(bench.loaded.model, split, against, size, advance) for split in splits)


def run_command() -> str:
    """What was typed, with the program's own path reduced to its name."""
    return shlex.join(["globalopt", *sys.argv[1:]])


def recorded(folder: Path) -> tuple[Run, ModelOptions, TextOptions]:
    """A run with the model and text options it was made with; `ArtefactError` if the manifest lacks them."""
    run = Run.open(folder)
    facts = run.manifest.get("facts", {})
    try:
        return run, ModelOptions(**facts["model_options"]), TextOptions(**facts["text_options"])
    except (KeyError, TypeError):
        raise ArtefactError(f"{folder}: the manifest does not say which model and text it was made with.") from None
