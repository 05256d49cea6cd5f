"""Plan a compression to a fraction kept without an analysis, by an allocator that reads no predicted losses."""

from __future__ import annotations

from collections.abc import Mapping

from allocators import ALLOCATORS, get_allocator
from globalopt.errors import UsageError
from globalopt.pipeline.options import RefineOptions, SearchOptions
from globalopt.pipeline.plan import SearchPlan, resolve
from globalopt.protocols import Allocator, Reads, Solver


def plan_direct(
    budget: float,
    solver: Solver,
    solver_options: Mapping[str, str],
    allocator: str | Allocator = "uniform",
    allocator_options: Mapping[str, str] | None = None,
    rank_share: float | None = None,
    pattern: str = "unstructured",
    accounting: str = "params",
    sensitivity: str = "fisher",
    refining: RefineOptions | None = None,
    seed: int = 0,
    storage: str = "16",
    embeddings: str | None = None,
) -> SearchPlan:
    """Resolve a search whose allocator reads the layers and their profiles alone, so that nothing else is computed.

    A backward sweep is run only where the solver uses output Grams, or the matching does.

    Args:
        budget: fraction kept of the compressible layers, in (0, 1], of their parameters or bytes (`accounting`).
        solver_options: those that `solver` was made with, for the record.
        allocator: a name, with `allocator_options`, or an object.
        rank_share: part of a layer's kept parameters that is in its rank; None is the allocator's own.
        pattern: of the sparse parts: "unstructured" or N:M, such as "2:4".
        refining: how the layers are refined; None is without matching, as methods are published.
        storage: bits of the stored numbers, "8" or "4/8", the same for all layers.
        embeddings: bits of the embeddings, "16", "8" or "6", which the budget then counts too; None does not.
    Raises:
        UsageError: the allocator needs an analysis, or `rank_share` is given for a solver or an allocator without it.

    >>> from solvers import get_solver
    >>> plan = plan_direct(0.5, get_solver("wanda"), {}, allocator="owl")
    >>> plan.allocator.name, plan.reads is Reads.PROFILES, plan.refinement.output_grams, plan.refinement.matching
    ('owl', True, False, None)
    """
    options = dict(allocator_options or {})
    if rank_share is not None:
        if rank_share and not solver.low_rank:
            raise UsageError(
                f"--rank-share {rank_share:g} is for solvers with a low-rank part, and {solver.name} has none. Leave "
                "it out, or choose another --solver; `globalopt list` shows which have one."
            )
        if "rank_share" in options:
            raise UsageError("The rank share was given twice, as --rank-share and in --allocator-set. Give it once.")
        options["rank_share"] = str(rank_share)
    made = get_allocator(allocator, options) if isinstance(allocator, str) else allocator
    reads = made.reads
    if Reads.SURFACES in reads or Reads.OBJECTIVE in reads:
        raise UsageError(
            f"Allocator {made.name} reads an analysis of the model, which compress does not make. Run `globalopt "
            f"search --allocator {made.name}` instead, or choose one of {', '.join(unanalysed())}."
        )
    words = SearchOptions(
        budget=budget,
        pattern=pattern,
        accounting=accounting,
        allocator=made.name,
        allocator_options=options,
        solver=solver.name,
        solver_options=solver_options,
        sensitivity=sensitivity,
        seed=seed,
        storage=storage,
        embeddings=embeddings,
    )
    return resolve(words, refining, made, solver)


def unanalysed() -> tuple[str, ...]:
    """Name the allocators that read no predicted losses.

    >>> unanalysed()
    ('uniform', 'owl', 'alpha')
    """
    return tuple(name for name, kind in ALLOCATORS.items() if not kind.reads & (Reads.SURFACES | Reads.OBJECTIVE))
