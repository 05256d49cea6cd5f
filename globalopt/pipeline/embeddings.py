"""Choose the bits of the embeddings of a model under the budget of its layers, and put the rounded ones into it.

With `auto` every matrix may have 16, 8 or 6 bits, which are at most nine combinations. The loss of each matrix in each
width alone is measured on the model; every combination leaves another budget for the layers, whose knapsack is solved
to a bound. The combination of least predicted loss, of layers and embeddings together, is taken, and the least of the
bounds holds for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import torch

from globalopt.analysis.corrections import WINDOWS
from globalopt.embeddings import coding
from globalopt.embeddings.coding import encode_matrix
from globalopt.embeddings.find import find_embeddings
from globalopt.embeddings.placing import place, placed
from globalopt.errors import BudgetError
from globalopt.machine import ranks
from globalopt.models.block_runner import BlockRunner
from globalopt.models.layers import ModelLayers
from globalopt.objective.kl_to_dense import ModelObjective
from globalopt.pipeline.plan import SearchPlan
from globalopt.pipeline.reporter import Reporter
from globalopt.pipeline.session import Session
from globalopt.protocols import Reads
from globalopt.runs.artefacts import EMBEDDING, EMBEDDING_LOSS
from globalopt.runs.folder import Run
from globalopt.runs.records import Allocated
from globalopt.values.budget import Budget, Target
from globalopt.values.embeddings import AUTO, EMBEDDING_BITS, Embedding, budget_beside, measured
from globalopt.values.layer import LayerSpec
from globalopt.values.problem import Allocation, Problem

Menus = Sequence[Sequence[Embedding]]
"""The ways in which every embedding matrix may be stored, most bits first; none where embeddings are not counted."""


def menus(layers: ModelLayers, plan: SearchPlan) -> tuple[tuple[Embedding, ...], ...]:
    """List how a plan may store the embeddings of a model.

    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.pipeline.example import example_plan
    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> plan = example_plan(accounting="bytes", embeddings="8")
    >>> [[each.bits for each in menu] for menu in menus(layers, plan)], menus(layers, example_plan())
    ([[8], [8]], ())
    """
    if plan.embeddings is None:
        return ()
    bits = EMBEDDING_BITS if plan.embeddings == AUTO else (int(plan.embeddings),)
    return tuple(tuple(each.stored_in(width) for width in bits) for each in find_embeddings(layers.model))


def layer_budget(plan: SearchPlan, specs: Sequence[LayerSpec], chosen: Sequence[Embedding]) -> Budget:
    """Make the budget that a plan has for the layers, beside the embeddings that are `chosen`.

    Raises:
        BudgetError: nothing is left for the layers, or less than their pattern needs.

    >>> from globalopt.pipeline.example import example_plan
    >>> spec = LayerSpec("up", 0, "in", "up", 64, 64)
    >>> plan = example_plan(0.6, accounting="bytes", embeddings="8")
    >>> layer_budget(plan, [spec], [Embedding("embed", 64, 64, bits=8)]).limit
    5606
    """
    if plan.embeddings is None:
        return plan.rule.of(specs)
    pattern, storage = plan.analysis.pattern, plan.analysis.storages[-1]
    least = 1
    if pattern is not None:
        least = sum(Target(0, pattern.nnz(spec), pattern, storage=storage).bytes(spec) for spec in specs)
    return budget_beside(plan.rule.kept, specs, chosen, least)


def largest_budget(layers: ModelLayers, plan: SearchPlan) -> Budget:
    """Make the largest budget that a plan may have for the layers: beside embeddings in the fewest bits.

    Raises:
        BudgetError: nothing is left for the layers, or less than their pattern needs.

    >>> from globalopt.models.finding import find_layers
    >>> from globalopt.pipeline.example import example_plan
    >>> from globalopt.reference.tiny import tiny_llama
    >>> layers = find_layers(tiny_llama(), allow_low_coverage=True)
    >>> largest_budget(layers, example_plan(0.5, accounting="bytes", embeddings="8")).limit
    4288
    """
    return layer_budget(plan, layers.specs, [menu[-1] for menu in menus(layers, plan)])


def measures(plan: SearchPlan) -> bool:
    """Tell whether the loss of embeddings is measured: where those of layers are predicted in nats too.

    >>> from globalopt.pipeline.example import example_plan
    >>> measures(example_plan(allocator="uniform")), measures(example_plan(allocator="knapsack"))
    (False, True)
    """
    return plan.analysis.fisher and Reads.SURFACES in plan.reads


def measured_menus(session: Session, reporter: Reporter, plan: SearchPlan, run: Run) -> Menus:
    """Measure the loss of every embedding in every width that a plan may choose, each alone in the dense model.

    The loss is the KL divergence from the dense model on the first windows of the selection text, as in the correction
    of predicted losses. Nothing is measured where the losses of layers are not predicted in nats either.

    Args:
        run: whose cache keeps the losses.

    >>> from pathlib import Path
    >>> from globalopt.pipeline.example import example_plan, example_reporter, example_session
    >>> plan = example_plan(0.6, accounting="bytes", embeddings="auto", allocator="knapsack")
    >>> with Run.start(Path("losses"), {}, {}) as run:
    ...     found = measured_menus(example_session(), example_reporter(), plan, run)
    >>> [menu[0].loss < menu[1].loss < menu[2].loss for menu in found]
    [True, True]
    """
    found = menus(session.layers, plan)
    if not found or not measures(plan):
        return found
    dtype = session.loaded.checkpoint_dtype
    coded = [each for menu in found for each in menu if each.bits < 16]
    missing = ranks.told([each for each in coded if not run.has(EMBEDDING_LOSS, _key(each, dtype))])
    if missing:
        batches = session.batches(session.splits.selection, windows=WINDOWS)
        with reporter.stage("embeddings", len(missing), "matrices") as advance:
            objective = ModelObjective(BlockRunner(session.layers, batches))
            for each in missing:
                matrix = encode_matrix(session.layers.model.get_parameter(f"{each.name}.weight"), each.bits)
                with placed(session.layers, each.name, matrix, dtype):
                    loss = float(objective.losses_of([{}], range(objective.chunks)).mean())
                if ranks.writer():
                    run.put(EMBEDDING_LOSS, _key(each, dtype), {"loss": loss})
                advance(f"{each.name} in {each.bits} bits: {loss:.3g}")
            objective.close()
        ranks.written(run)

    def loss_of(each: Embedding) -> float:
        return 0.0 if each.bits == 16 else float(run.get(EMBEDDING_LOSS, _key(each, dtype))["loss"])

    return [[replace(each, loss=loss_of(each)) for each in menu] for menu in found]


def choose(
    plan: SearchPlan, problem: Problem, choices: Menus, solve: Callable[[Problem], Allocation]
) -> tuple[tuple[Embedding, ...], float | None]:
    """Choose the embeddings of least predicted loss, of layers and embeddings together, among all combinations.

    Args:
        problem: of the layers; its budget is replaced.
        choices: the menu of every embedding; where there is one combination, nothing is solved.
        solve: solves a problem by its surfaces alone.
    Returns:
        the embeddings, and the least of the bounds of all combinations that fit; None without a bound of each.
    Raises:
        BudgetError: no combination leaves enough for the layers.

    >>> from allocators import Knapsack
    >>> from allocators.example import example_problem
    >>> from globalopt.pipeline.example import example_plan
    >>> plan = example_plan(0.6, accounting="bytes", embeddings="auto", allocator="knapsack")
    >>> menu = [Embedding("embed", 8, 64, bits, loss) for bits, loss in ((16, 0.0), (8, 1e-9), (6, 1.0))]
    >>> chosen, bound = choose(plan, example_problem(0.5), [menu], Knapsack().allocate)
    >>> chosen[0].bits, bound > 0
    (8, True)
    """
    combinations = list(product(*choices))
    if len(combinations) == 1:
        return combinations[0], None
    found: list[tuple[float, float | None, tuple[Embedding, ...]]] = []
    for chosen in combinations:
        try:
            budget = layer_budget(plan, problem.specs, chosen)
        except BudgetError:
            # Embeddings in fewer bits leave more; that these leave enough was checked before the analysis.
            continue
        allocation, lost = solve(replace(problem, budget=budget)), measured(chosen)
        bound = None if allocation.bound is None else allocation.bound + lost
        found.append((allocation.predicted + lost, bound, chosen))
    bounds = [bound for _, bound, _ in found if bound is not None]
    _, _, best = min(found, key=lambda each: each[0])
    return best, min(bounds) if len(bounds) == len(found) else None


def beside_embeddings(found: Allocated, stored: tuple[Embedding, ...], bound: float | None) -> Allocated:
    """Record the embeddings that an allocation of the layers is beside.

    Args:
        bound: lower bound on the predicted loss of layers and embeddings in any bits; None where there was no choice.

    >>> from globalopt.values.search_record import Outcome
    >>> found = Allocated({}, 0.3, None, Outcome(2, 0.4, None, None))
    >>> head = Embedding("lm_head", 100, 64, bits=8, loss=0.1)
    >>> round(beside_embeddings(found, (head,), bound=0.35).bound, 6)  # of the layers
    0.25
    """
    lost = measured(stored)
    least = found.bound
    if least is not None and bound is not None:
        least = min(least, bound - lost)
    # The loss of the embeddings is part of what the summary compares with the uniform allocation.
    uniform = replace(found.uniform, predicted=found.uniform.predicted + lost) if lost else found.uniform
    return replace(found, bound=least, uniform=uniform, embeddings=stored)


def place_embeddings(session: Session, run: Run, chosen: Sequence[Embedding]) -> Callable[[], None]:
    """Round the embeddings that are `chosen` in few bits, save their codes, and return what puts them into the model.

    Args:
        run: where the codes are saved, or are already. The session's model is dense.

    >>> from pathlib import Path
    >>> from globalopt.pipeline.example import example_session
    >>> session, each = example_session(), Embedding("lm_head", 64, 16, bits=8)
    >>> before = session.layers.model.lm_head.weight.clone()
    >>> with Run.start(Path("rounded"), {}, {}) as run:
    ...     place_embeddings(session, run, [each])()
    >>> bool((session.layers.model.lm_head.weight == before).all())
    False
    """
    coded = [each for each in chosen if each.bits < 16]
    for each in coded if ranks.writer() else ():
        if not run.has(EMBEDDING, each.name):
            weight = session.layers.model.get_parameter(f"{each.name}.weight")
            run.put(EMBEDDING, each.name, encode_matrix(weight, each.bits))
    ranks.written(run)

    def put() -> None:
        for each in coded:
            place(session.layers, each.name, run.get(EMBEDDING, each.name), session.loaded.checkpoint_dtype)

    return put


def _key(each: Embedding, dtype: torch.dtype) -> str:
    """Name the measured loss of an embedding in its bits, rounded by the present algorithm and saved in `dtype`."""
    return f"{each.name}.{each.bits}.{str(dtype).removeprefix('torch.')}.v{coding.VERSION}"
