"""Compute the cache address of every stage: a hash of the stage's inputs and of the version of its algorithm.

An address contains only what the stage reads. Therefore a search with another budget or allocator uses the whole
analysis of an earlier run again, one with another preset of a solver uses Grams, spans and anchor solutions again, and
raising the version of one stage leaves the artefacts of the stages before it valid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from globalopt.analysis import (
    anchors,
    collect,
    corrections,
    curves,
    metric_choices,
    predictions,
    profiles,
    rounding,
    spans,
)
from globalopt.analysis.corrections import WINDOWS
from globalopt.budgets import budget_file
from globalopt.budgets.budget_file import BudgetFile
from globalopt.embeddings import coding
from globalopt.evaluation import perplexity
from globalopt.matching import model as model_matching
from globalopt.objective import candidates
from globalopt.pipeline.method_records import limits_record, method_record
from globalopt.pipeline.plan import AnalysisPlan, RefinementPlan, SearchPlan
from globalopt.pipeline.session import Session
from globalopt.protocols import Reads, Solver
from globalopt.refine import blocks
from globalopt.rounding import stored
from globalopt.runs.artefacts import Stage
from globalopt.runs.cache import Address
from globalopt.runs.files import digest
from globalopt.values.budget import Limits
from globalopt.values.layer import NM
from globalopt.values.storage import PLAIN

VERSIONS: Mapping[Stage, int] = {
    Stage.GRAMS: collect.GRAMS_VERSION,
    Stage.LABELS: collect.LABELS_VERSION,
    Stage.PROFILES: profiles.VERSION,
    Stage.SPECTRA: curves.VERSION,
    Stage.SPANS: spans.VERSION,
    Stage.ANCHORS: anchors.ANCHORS_VERSION,
    Stage.METRICS: metric_choices.VERSION,
    Stage.GAPS: anchors.GAPS_VERSION,
    Stage.ROUNDING: rounding.VERSION,
    Stage.PREDICTIONS: predictions.VERSION,
    Stage.CORRECTIONS: corrections.VERSION,
    Stage.OBJECTIVE: candidates.VERSION,
    # Version of the problem that is posed and of the stored solution; allocators have versions of their own.
    Stage.ALLOCATION: 1,
    Stage.REFINEMENT: blocks.VERSION,
    Stage.MODEL_MATCHING: model_matching.VERSION,
    Stage.RESULT: perplexity.VERSION,
}
"""The version of every stage's algorithm; the number is defined in the module of the algorithm."""

FINISHED = (Stage.ALLOCATION, Stage.REFINEMENT, Stage.MODEL_MATCHING, Stage.RESULT)
"""Stages that a family of budgets does not run."""

REFINED = (Stage.GRAMS, Stage.METRICS, Stage.LABELS, Stage.REFINEMENT, Stage.MODEL_MATCHING, Stage.RESULT)
"""Stages of a refinement without a search."""

Addresses = Mapping[Stage, Address]
"""The address of every stage of a job."""


def analysis_addresses(session: Session, plan: AnalysisPlan, reads: Reads = Reads.SURFACES) -> dict[Stage, Address]:
    """Compute the addresses of the stages up to the predicted losses. The budget is none of their inputs.

    Args:
        reads: what the allocator reads. Where that is no surfaces, no anchors are solved, and error metrics are chosen
            at the probed targets instead.

    >>> from globalopt.pipeline.example import example_plan, example_session
    >>> session = example_session()
    >>> found = analysis_addresses(session, example_plan(0.5).analysis)
    >>> found == analysis_addresses(session, example_plan(0.3).analysis)
    True
    >>> [stage.value for stage in found][:3]
    ['grams', 'labels', 'spectra']
    """
    data = _data(session)
    method = _method(plan.probe, plan.pattern, plan.limits)
    grams, labels = _grams(data), _labels(data, plan.seed)
    of_outputs = labels.digest if plan.fisher or plan.weighted else None
    found = {
        Stage.GRAMS: grams,
        Stage.LABELS: labels,
        Stage.SPECTRA: _address(Stage.SPECTRA, {"grams": grams.digest}),
        Stage.PROFILES: _address(Stage.PROFILES, {"grams": grams.digest}),
        Stage.SPANS: _address(
            Stage.SPANS,
            {
                "grams": grams.digest,
                "scaling": plan.scaling,
                "pattern": method["pattern"],
                "sparse": plan.limits.sparse,
                "labels": labels.digest if plan.scaling == "output" else None,
            },
        ),
    }
    options = {"pattern": method["pattern"], "limits": method["limits"], "low_rank": plan.solver.low_rank}
    if plan.anchors:
        inputs = {"spans": found[Stage.SPANS].digest, "labels": labels.digest if plan.weighted else None}
        found[Stage.ANCHORS] = _address(Stage.ANCHORS, {**inputs, **method, **options})
    if plan.weighted:
        checked = _digest(found, Stage.ANCHORS) if Reads.SURFACES in reads else None
        found[Stage.METRICS] = _metrics(grams, labels, method, checked)
    if plan.compared:
        inputs = {stage: _digest(found, stage) for stage in (Stage.ANCHORS, Stage.METRICS)}
        inputs |= {"solver": method_record(plan.solver), "accounting": plan.accounting}
        found[Stage.GAPS] = _address(Stage.GAPS, inputs)
    if plan.rounds_numbers and Reads.SURFACES in reads:
        inputs = {stage: _digest(found, stage) for stage in (Stage.GRAMS, Stage.ANCHORS, Stage.METRICS)}
        found[Stage.ROUNDING] = _address(Stage.ROUNDING, {**inputs, "labels": of_outputs})
    read = (Stage.SPANS, Stage.ANCHORS, Stage.METRICS, Stage.GAPS)
    inputs = {stage: _digest(found, stage) for stage in read}
    inputs |= {**options, "labels": of_outputs}
    if not plan.anchors:
        # Only solutions at anchors depend on the metric that is chosen.
        inputs[Stage.METRICS] = None
    found[Stage.PREDICTIONS] = _address(Stage.PREDICTIONS, inputs)
    return found


def search_addresses(session: Session, plan: SearchPlan) -> dict[Stage, Address]:
    """Compute the addresses of the stages of a search up to its allocation.

    Those of its refinement depend on the allocation: see `refinement_addresses`.

    >>> from globalopt.pipeline.example import example_plan, example_session
    >>> session = example_session()
    >>> one, other = (search_addresses(session, example_plan(kept)) for kept in (0.5, 0.3))
    >>> [stage.value for stage in one if one[stage] != other[stage]]
    ['corrections', 'allocation']
    """
    found = objective_addresses(session, plan)
    found[Stage.CORRECTIONS] = correction_address(found, plan, [plan.rule.kept])
    inputs = {
        "objective": found[Stage.OBJECTIVE].digest,
        "profiles": found[Stage.PROFILES].digest,
        "corrections": found[Stage.CORRECTIONS].digest,
        "allocator": method_record(plan.allocator),
        "budget": asdict(plan.rule),
        "search_tokens": plan.search_tokens,
        "seed": plan.seed,
        **_storages(plan),
        **_embeddings(plan),
    }
    return {**found, Stage.ALLOCATION: _address(Stage.ALLOCATION, inputs)}


def correction_address(found: Addresses, plan: SearchPlan, kept: Sequence[float]) -> Address:
    """Compute the address of the corrections of predicted losses around budgets that keep the fractions `kept`.

    >>> from globalopt.pipeline.example import example_plan, example_session
    >>> plan = example_plan()
    >>> found = objective_addresses(example_session(), plan)
    >>> correction_address(found, plan, [0.5]) == correction_address(found, plan, [0.3])
    False
    """
    inputs = {
        "objective": found[Stage.OBJECTIVE].digest,
        "accounting": plan.rule.accounting,
        "kept": [*kept],
        "rounds": plan.rounds,
        "windows": WINDOWS,
        **_storages(plan),
        **_embeddings(plan),
    }
    return _address(Stage.CORRECTIONS, inputs)


def objective_addresses(session: Session, plan: SearchPlan) -> dict[Stage, Address]:
    """Compute the addresses of the analysis, and of the journal of evaluations of the objective.

    The loss of an allocation depends on neither allocator nor budget, so all searches on one analysis share a journal.

    >>> from globalopt.pipeline.example import example_plan, example_session
    >>> session = example_session()
    >>> plans = [example_plan(solver="3basil", candidates=source) for source in ("anchors", "span")]
    >>> one, other = (objective_addresses(session, plan) for plan in plans)
    >>> [stage.value for stage in one if one[stage] != other[stage]]
    ['objective']
    """
    found = analysis_addresses(session, plan.analysis, plan.reads)
    inputs = {
        "predictions": found[Stage.PREDICTIONS].digest,
        "low_rank": plan.analysis.solver.low_rank,
        "selection": session.splits.selection.sha256,
        "batch_size": session.text_options.batch_size,
        "candidates": plan.candidates,
        # What a target in few bits loses depends on the losses of rounding, but not on the menu.
        **({"rounding": found[Stage.ROUNDING].digest} if Stage.ROUNDING in found else {}),
    }
    return {**found, Stage.OBJECTIVE: _address(Stage.OBJECTIVE, inputs)}


def _storages(plan: SearchPlan) -> dict[str, Any]:
    """Return the menu of storages as an input of a stage; nothing where all layers are in 16 bits."""
    solver = plan.analysis.solver
    whole = {} if solver.sparse or solver.low_rank else {"whole": True}
    storages = [str(storage) for storage in plan.analysis.storages]
    return {"storages": storages, **whole} if plan.analysis.rounds_numbers else {}


def _embeddings(plan: SearchPlan) -> dict[str, Any]:
    """Return the bits of the embeddings as an input of a stage; nothing where the budget does not count them."""
    return {} if plan.embeddings is None else {"embeddings": plan.embeddings, "codes": coding.VERSION}


def compress_addresses(
    session: Session, plan: RefinementPlan, file: BudgetFile, probe: Solver, pattern: NM | None
) -> dict[Stage, Address]:
    """Compute the addresses of the stages of a refinement without a search.

    One backward sweep serves all that needs output Grams, so all of it has the address of the same labels.

    Args:
        plan: how the layers are refined.
        file: the budget.
        probe: cheap solver with which the error metrics of a layer are compared.
        pattern: the N:M pattern of every target of the budget, or None.

    >>> from globalopt.pipeline.example import example_budget, example_plan, example_refinement, example_session
    >>> from globalopt.pipeline.plan import probe_solver
    >>> session, plan = example_session(), example_refinement()
    >>> probe = probe_solver(plan.solver)
    >>> addresses = compress_addresses(session, plan, example_budget(session), probe, pattern=None)
    >>> addresses[Stage.GRAMS] == search_addresses(session, example_plan())[Stage.GRAMS]
    True
    """
    data = _data(session)
    grams, labels = _grams(data), _labels(data, plan.seed)
    found = {Stage.GRAMS: grams, Stage.LABELS: labels}
    if plan.metric_choices:
        found[Stage.METRICS] = _metrics(grams, labels, _method(probe, pattern, file.served), None)
    return refinement_addresses(session, plan, file, found)


def refinement_addresses(
    session: Session, plan: RefinementPlan, file: BudgetFile, earlier: Addresses
) -> dict[Stage, Address]:
    """Compute the addresses of the stages that follow a budget, and return them with the `earlier` ones.

    Args:
        plan: how the layers are refined.
        file: the budget.
        earlier: addresses of the search that found the budget, or of the first stages of a refinement without one.

    >>> from globalopt.pipeline.options import RefineOptions
    >>> from globalopt.pipeline.example import example_budget, example_plan, example_session
    >>> session = example_session()
    >>> file = example_budget(session)
    >>> plan = example_plan(refining=RefineOptions(match="model"))
    >>> addresses = refinement_addresses(session, plan.refinement, file, search_addresses(session, plan))
    >>> addresses[Stage.MODEL_MATCHING].inputs["refinement"] == addresses[Stage.REFINEMENT].digest
    True
    """
    data = _data(session)
    found = {**earlier, Stage.LABELS: _labels(data, plan.seed)}
    record = plan.record()
    distillation = record.pop("distillation")
    inputs: dict[str, Any] = {
        # A refinement computes Grams of its own, on the outputs of replaced layers, but by the same algorithm.
        "grams": _grams(data).digest,
        **record,
        "budget": digest(budget_file.record(file)),
        "dtype": str(session.loaded.checkpoint_dtype),
        "metrics": _digest(found, Stage.METRICS) if plan.metric_choices else None,
        "labels": found[Stage.LABELS].digest if plan.output_grams or plan.block_output_grams else None,
        **({"rounding": stored.VERSION} if any(layer.storage != str(PLAIN) for layer in file.layers) else {}),
        **({"codes": coding.VERSION} if any(each.bits < 16 for each in file.embeddings) else {}),
    }
    found[Stage.REFINEMENT] = _address(Stage.REFINEMENT, inputs)
    if distillation is not None:
        matched = {"refinement": found[Stage.REFINEMENT].digest, "distillation": distillation}
        found[Stage.MODEL_MATCHING] = _address(Stage.MODEL_MATCHING, matched)
    return found


def algorithms(stages: Iterable[Stage] = tuple(VERSIONS)) -> dict[str, int]:
    """Return the versions of the algorithms of some stages, for the identity of a run.

    >>> algorithms([Stage.SPANS])
    {'spans': 6}
    """
    return {str(stage): VERSIONS[stage] for stage in stages}


def _address(stage: Stage, inputs: Mapping[str, Any]) -> Address:
    """Make the address of a stage from its inputs and the version of its algorithm."""
    return Address(stage, VERSIONS[stage], inputs)


def _data(session: Session) -> dict[str, Any]:
    """Return the inputs of every stage on the calibration text."""
    return {
        "model": session.model_digest,
        "windows": session.splits.calibration.sha256,
        "batch_size": session.text_options.batch_size,
    }


def _method(probe: Solver, pattern: NM | None, limits: Limits) -> dict[str, Any]:
    """Return the inputs, beside its data, of every stage that uses the probe solver."""
    return {
        "probe": method_record(probe),
        "pattern": None if pattern is None else str(pattern),
        "limits": limits_record(limits),
    }


def _grams(data: Mapping[str, Any]) -> Address:
    """Compute the address of the input Grams."""
    return _address(Stage.GRAMS, data)


def _metrics(grams: Address, labels: Address, method: Mapping[str, Any], anchors: str | None) -> Address:
    """Compute the address of the choices of error metrics, by the hash of the anchor solutions where there are any."""
    inputs = {"grams": grams.digest, "labels": labels.digest, **method, "anchors": anchors}
    return _address(Stage.METRICS, inputs)


def _labels(data: Mapping[str, Any], seed: int) -> Address:
    """Compute the address of the output Grams of labels sampled with a seed."""
    return _address(Stage.LABELS, {**data, "seed": seed})


def _digest(found: Addresses, stage: Stage) -> str | None:
    """Return the hash of a stage's address, or None if the job does not have the stage."""
    return found[stage].digest if stage in found else None
