"""The address of every stage: what it reads, and the version of its algorithm.

What a stage does not read is no part of its address. So another budget or allocator shares the whole analysis with an
earlier run, another solver preset shares Grams, spans and anchor solutions, and a new version of one stage leaves the
stages before it where they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from globalopt.analysis import anchors, collect, curves, one_layer_losses, predictions, profiles, spans
from globalopt.budgets import budget_file
from globalopt.budgets.budget_file import BudgetFile
from globalopt.matching import model as model_matching
from globalopt.objective import candidates
from globalopt.pipeline.plan import OTHER_LABELS, AnalysisPlan, RefinementPlan, SearchPlan, limits_record, method_record
from globalopt.pipeline.session import Session
from globalopt.protocols import Solver
from globalopt.refine import blocks
from globalopt.runs.artefacts import Stage
from globalopt.runs.cache import Address
from globalopt.runs.files import digest
from globalopt.values.budget import Limits
from globalopt.values.layer import NM

ALLOCATION_VERSION = 1
"""Raised whenever allocations change, other than by their allocator."""

Addresses = Mapping[Stage, Address]


def analysis_addresses(session: Session, plan: AnalysisPlan) -> dict[Stage, Address]:
    """Address the stages up to the predicted losses."""
    data = _data(session)
    method = _method(plan.probe, plan.pattern, plan.limits)
    grams = _grams(data)
    # Of other labels than the predictions: a solution that minimises an error in the gradients of some labels looks
    # too good when the same labels predict its loss.
    probed = _labels(data, plan.seed ^ OTHER_LABELS)
    found = {
        Stage.GRAMS: grams,
        Stage.SPECTRA: Address(Stage.SPECTRA, curves.VERSION, {"grams": grams.digest}),
        Stage.PROFILES: Address(Stage.PROFILES, profiles.VERSION, {"grams": grams.digest}),
        Stage.SPANS: Address(
            Stage.SPANS,
            spans.VERSION,
            {
                "grams": grams.digest,
                "scaling": plan.scaling,
                "labels": probed.digest if plan.scaling == "output" else None,
            },
        ),
    }
    if plan.weighted or plan.scaling == "output":
        found[Stage.PROBE_LABELS] = probed
    if plan.weighted:
        found[Stage.METRICS] = _metrics(grams, probed, method)
    if plan.anchors:
        inputs = {"spans": found[Stage.SPANS].digest, "metrics": _digest(found, Stage.METRICS), **method}
        found[Stage.ANCHORS] = Address(Stage.ANCHORS, anchors.ANCHORS_VERSION, inputs)
        inputs = {"anchors": found[Stage.ANCHORS].digest, "solver": method_record(plan.solver)}
        inputs["accounting"] = plan.accounting
        found[Stage.GAPS] = Address(Stage.GAPS, anchors.GAPS_VERSION, inputs)
    if plan.single_layer_losses:
        inputs = {"gaps": found[Stage.GAPS].digest}
        found[Stage.LOSSES] = Address(Stage.LOSSES, one_layer_losses.LOSSES_VERSION, inputs)
    if plan.fisher:
        found[Stage.LABELS] = _labels(data, plan.seed)
    read = (Stage.SPANS, Stage.GAPS, Stage.LOSSES, Stage.LABELS)
    inputs = {stage: _digest(found, stage) for stage in read}
    inputs |= {"pattern": method["pattern"], "limits": method["limits"]}
    found[Stage.PREDICTIONS] = Address(Stage.PREDICTIONS, predictions.VERSION, inputs)
    return found


def search_addresses(session: Session, plan: SearchPlan) -> dict[Stage, Address]:
    """Address the stages of a search up to its allocation; those of its refinement depend on what is found."""
    found = objective_addresses(session, plan)
    inputs = {
        "objective": found[Stage.OBJECTIVE].digest,
        "profiles": found[Stage.PROFILES].digest,
        "allocator": method_record(plan.allocator),
        "budget": asdict(plan.rule),
        "search_tokens": plan.search_tokens,
        "seed": plan.seed,
    }
    return {**found, Stage.ALLOCATION: Address(Stage.ALLOCATION, ALLOCATION_VERSION, inputs)}


def objective_addresses(session: Session, plan: SearchPlan) -> dict[Stage, Address]:
    """Address the analysis, and the evaluations of the objective.

    What an allocation loses depends on neither allocator nor budget, so all searches on one analysis share a journal.
    """
    found = analysis_addresses(session, plan.analysis)
    inputs = {
        "predictions": found[Stage.PREDICTIONS].digest,
        "low_rank": plan.analysis.solver.low_rank,
        "selection": session.splits.selection.sha256,
        "batch_size": session.text_options.batch_size,
        "candidates": plan.candidates,
    }
    return {**found, Stage.OBJECTIVE: Address(Stage.OBJECTIVE, candidates.VERSION, inputs)}


def compress_addresses(
    session: Session, plan: RefinementPlan, file: BudgetFile, probe: Solver, pattern: NM | None
) -> dict[Stage, Address]:
    """Address the stages of a refinement without a search: one sweep of labels for all that needs output Grams."""
    data = _data(session)
    grams, labels = _grams(data), _labels(data, plan.seed)
    found = {Stage.GRAMS: grams, Stage.PROBE_LABELS: labels}
    if plan.metric_choices:
        found[Stage.METRICS] = _metrics(grams, labels, _method(probe, pattern, file.served))
    return refinement_addresses(session, plan, file, found)


def refinement_addresses(
    session: Session, plan: RefinementPlan, file: BudgetFile, earlier: Addresses
) -> dict[Stage, Address]:
    """Address the stages that follow a budget, beside the `earlier` ones."""
    data = _data(session)
    found = {**earlier, Stage.LABELS: _labels(data, plan.seed)}
    # The probe's labels gave output Grams of the blocks too, where they were sampled.
    found[Stage.MATCH_LABELS] = found.get(Stage.PROBE_LABELS, found[Stage.LABELS])
    record = plan.record()
    distillation = record.pop("distillation")
    inputs: dict[str, Any] = {
        **data,
        **record,
        "budget": digest(budget_file.record(file)),
        "dtype": str(session.loaded.checkpoint_dtype),
        "metrics": _digest(found, Stage.METRICS) if plan.metric_choices else None,
        "labels": found[Stage.LABELS].digest if plan.output_grams else None,
        "match_labels": found[Stage.MATCH_LABELS].digest if plan.block_output_grams else None,
    }
    found[Stage.REFINEMENT] = Address(Stage.REFINEMENT, blocks.VERSION, inputs)
    matched = {"refinement": found[Stage.REFINEMENT].digest, "distillation": distillation}
    found[Stage.MODEL_MATCHING] = Address(Stage.MODEL_MATCHING, model_matching.VERSION, matched)
    return found


def algorithms(addresses: Addresses) -> dict[str, int]:
    """The version of every stage's algorithm, for the identity of a run."""
    return {str(stage): address.version for stage, address in addresses.items()}


def _data(session: Session) -> dict[str, Any]:
    """What every stage on the calibration text reads."""
    return {
        "model": session.model_digest,
        "windows": session.splits.calibration.sha256,
        "batch_size": session.text_options.batch_size,
    }


def _method(probe: Solver, pattern: NM | None, limits: Limits) -> dict[str, Any]:
    """What every stage with the probe solver reads beside its data."""
    return {
        "probe": method_record(probe),
        "pattern": None if pattern is None else str(pattern),
        "limits": limits_record(limits),
    }


def _grams(data: Mapping[str, Any]) -> Address:
    return Address(Stage.GRAMS, collect.GRAMS_VERSION, data)


def _metrics(grams: Address, labels: Address, method: Mapping[str, Any]) -> Address:
    inputs = {"grams": grams.digest, "labels": labels.digest, **method}
    return Address(Stage.METRICS, one_layer_losses.METRICS_VERSION, inputs)


def _labels(data: Mapping[str, Any], seed: int) -> Address:
    return Address(Stage.LABELS, collect.LABELS_VERSION, {**data, "seed": seed})


def _digest(found: Addresses, stage: Stage) -> str | None:
    return found[stage].digest if stage in found else None
