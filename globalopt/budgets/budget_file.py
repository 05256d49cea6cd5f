"""Write and read budget files: an allocation as JSON, which another run, solver or machine can use.

A file holds the rank and the number of nonzeros of every layer, the accounting, and a fingerprint of the model, never a
path or a date: the same search writes the same bytes. Where a layer is stored in fewer than 16 bits, it also holds the
bits of every layer, and where the budget counts the embeddings, the bits of these; it is then of the second version of
the schema, which older programs refuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from globalopt.budgets.schema import (
    SCHEMA_VERSION,
    STORAGE_VERSION,
    BudgetFile,
    EmbeddingEntry,
    LayerEntry,
    LimitsEntry,
    schema_of,
)
from globalopt.errors import ArtefactError, GlobalOptError, UsageError
from globalopt.runs.files import read_json, write_json
from globalopt.values.budget import NO_LIMITS, Budget, Target, limit_of
from globalopt.values.embeddings import Embedding, dense_bytes, measured, stored_bytes
from globalopt.values.error_unit import ErrorUnit
from globalopt.values.layer import LayerSpec
from globalopt.values.problem import Allocation, Problem


def make(
    allocation: Allocation,
    problem: Problem,
    fingerprint: str,
    covered: int,
    block_params: int,
    asked: float,
    error_unit: ErrorUnit,
    embeddings: Sequence[Embedding] = (),
) -> BudgetFile:
    """Make the budget file of an allocation of `problem`.

    Args:
        covered, block_params: parameters of the compressible layers, and of the decoder blocks.
        asked: the requested kept fraction.
        error_unit: of the problem's error surfaces.
        embeddings: that the budget counts beside the layers of the problem, which has what they leave.
    Raises:
        UsageError: a target has a plane of signs.

    >>> from globalopt.values.surface import ErrorSurface
    >>> spec = LayerSpec("up_proj", 0, "mlp", "up_proj", 4, 4)
    >>> surface = ErrorSurface(spec, (Target(0, 0), Target(0, 8), Target(0, 16)), (1.0, 0.25, 0.0))
    >>> problem = Problem((surface,), Budget(limit=8, total=16))
    >>> allocation = problem.finish({"up_proj": Target(0, 8)}, by="by hand")
    >>> file = make(allocation, problem, "f" * 64, 16, 20, 0.5, ErrorUnit.NATS)
    >>> file.used, file.predicted
    (8, 0.25)
    """
    budget, table = allocation.budget, problem.table
    sizes = table.sizes(allocation.targets)
    errors = dict(zip(table.names, table.predict(*sizes.arrays).tolist(), strict=True))
    total, lost = budget.total + dense_bytes(embeddings), measured(embeddings)
    return BudgetFile(
        schema_version=schema_of(allocation.targets.values(), embeddings),
        fingerprint=fingerprint,
        accounting="bytes" if budget.accounting == "bytes" else "params",
        asked=asked,
        limit=limit_of(asked, total) if embeddings else budget.limit,
        used=allocation.used + stored_bytes(embeddings),
        total=total,
        covered=covered,
        block_params=block_params,
        allocator=allocation.by,
        seed=problem.seed,
        error_unit=error_unit,
        predicted=allocation.predicted + lost,
        bound=None if allocation.bound is None else allocation.bound + lost,
        layers=tuple(_entry(spec, allocation.targets[spec.name], budget, errors[spec.name]) for spec in problem.specs),
        limits=None if problem.limits == NO_LIMITS else LimitsEntry(**asdict(problem.limits)),
        embeddings=tuple(_embedding_entry(each) for each in embeddings),
    )


def _embedding_entry(each: Embedding) -> EmbeddingEntry:
    """Record how an embedding is stored."""
    return EmbeddingEntry(
        name=each.name, rows=each.rows, width=each.width, bits=each.bits, cost=each.bytes, loss=each.loss
    )


def unpredicted(file: BudgetFile) -> BudgetFile:
    """Return a budget file without its predicted losses, for an allocator that read none.

    >>> from globalopt.values.surface import ErrorSurface
    >>> spec = LayerSpec("up_proj", 0, "mlp", "up_proj", 4, 4)
    >>> surface = ErrorSurface(spec, (Target(0, 0), Target(0, 16)), (1.0, 0.0))
    >>> problem = Problem((surface,), Budget(limit=8, total=16))
    >>> allocation = problem.finish({"up_proj": Target(0, 8)}, by="by hand")
    >>> file = unpredicted(make(allocation, problem, "f" * 64, 16, 20, 0.5, ErrorUnit.NATS))
    >>> file.predicted, file.error_unit.value, file.layers[0].predicted
    (None, 'not predicted', None)
    """
    layers = tuple(layer.model_copy(update={"predicted": None}) for layer in file.layers)
    update = {"predicted": None, "bound": None, "error_unit": ErrorUnit.NOT_PREDICTED, "layers": layers}
    return file.model_copy(update=update)


def _entry(spec: LayerSpec, target: Target, budget: Budget, predicted: float | None) -> LayerEntry:
    """Record the target of a layer; `UsageError` where it has a plane of signs.

    A file is for any solver: one that keeps a plane of signs gets it by `conversion.convert_target`, after reading.
    """
    if target.signs:
        raise UsageError(
            f"Layer {spec.name}: a budget file holds no plane of signs; leave it out, a solver that keeps one adds it."
        )
    return LayerEntry(
        name=spec.name,
        block=spec.block,
        kind=spec.kind,
        d_out=spec.d_out,
        d_in=spec.d_in,
        rank=target.rank,
        nnz=target.nnz,
        pattern=str(target.pattern) if target.pattern else None,
        cost=budget.cost(target, spec),
        predicted=predicted,
        storage=str(target.storage),
    )


def whole(
    specs: tuple[LayerSpec, ...], fingerprint: str, covered: int, block_params: int, accounting: str
) -> BudgetFile:
    """Make the budget file that leaves every layer dense.

    Args:
        covered, block_params: parameters of the compressible layers, and of the decoder blocks.
        accounting: "params" or "bytes".

    >>> file = whole((LayerSpec("up_proj", 0, "mlp", "up_proj", 4, 4),), "f" * 64, 16, 20, "bytes")
    >>> file.used, file.layers[0].nnz, file.predicted
    (32, 16, None)
    """
    budget = Budget.fraction(1.0, specs, accounting)
    return BudgetFile(
        schema_version=SCHEMA_VERSION,
        fingerprint=fingerprint,
        accounting="bytes" if accounting == "bytes" else "params",
        asked=1.0,
        limit=budget.limit,
        used=budget.total,
        total=budget.total,
        covered=covered,
        block_params=block_params,
        allocator="dense",
        seed=0,
        error_unit=ErrorUnit.NOT_PREDICTED,
        predicted=None,
        bound=None,
        layers=tuple(_entry(spec, Target.dense(spec), budget, None) for spec in specs),
    )


def imported(targets: Mapping[str, Target], like: BudgetFile, by: str = "imported") -> BudgetFile:
    """Make the budget file of the model of `like` with other targets, without predicted losses.

    Where all targets are those of `like`, it is returned as it is.

    Args:
        targets: by layer name, one for each.
        by: the name of the allocator to record.
    Raises:
        ArtefactError: a target does not fit its layer or has a plane of signs, or all together cost more than the dense
            layers.

    >>> dense = whole((LayerSpec("up_proj", 0, "mlp", "up_proj", 8, 4),), "f" * 64, 32, 40, "params")
    >>> file = imported({"up_proj": Target(rank=1, nnz=4)}, dense)
    >>> file.allocator, file.used, file.asked
    ('imported', 16, 0.5)
    """
    if all(targets[entry.name] == entry.target for entry in like.layers):
        return like
    budget, beside = like.budget, stored_bytes(like.matrices)
    entries = []
    for entry in like.layers:
        target = targets[entry.name]
        try:
            entries.append(_entry(entry.spec, target.check(entry.spec), budget, None))
        except GlobalOptError as cause:
            raise ArtefactError(str(cause)) from None
    used = sum(entry.cost for entry in entries) + beside
    if not 0 < used <= like.total:
        raise ArtefactError(
            f"the layers would use {used} {like.accounting}; a budget is above 0 and at most the dense {like.total}."
        )
    same = used == like.used
    changed = {
        "schema_version": schema_of(targets.values(), like.matrices),
        "asked": like.asked if same else used / like.total,
        "limit": like.limit if same else used,
        "used": used,
        "allocator": by,
        "seed": 0,
        "error_unit": ErrorUnit.NOT_PREDICTED,
        "predicted": None,
        "bound": None,
        "layers": tuple(entries),
        # Imported targets need not be within the limits of the search.
        "limits": None,
    }
    return like.model_copy(update=changed)


def without_rank(file: BudgetFile) -> BudgetFile:
    """Convert the rank of every layer into nonzeros of at most the same cost.

    Raises:
        UsageError: a layer with a pattern has rank; the pattern fixes its number of nonzeros.

    >>> from globalopt.budgets.example import example_budget
    >>> [(entry.rank, entry.nnz) for entry in without_rank(example_budget()).layers]
    [(0, 16), (0, 16)]
    """
    budget = file.budget
    targets = {}
    for entry in file.layers:
        target = entry.target
        if target.rank and target.pattern is not None:
            raise UsageError(
                f"Pattern {target.pattern} leaves no room to keep rank {target.rank} of layer {entry.name} as nonzeros."
            )
        if target.rank:
            target = budget.grow(replace(target, rank=0), entry.spec, "nnz", entry.spec.numel - 1, entry.cost)
        targets[entry.name] = target
    return imported(targets, file, file.allocator)


def write(path: Path, file: BudgetFile) -> None:
    """Write a budget file atomically; the same contents give the same bytes.

    >>> from globalopt.budgets.example import example_budget
    >>> write(Path("budget.json"), example_budget())
    >>> read(Path("budget.json")) == example_budget()
    True
    """
    write_json(path, record(file))


def record(file: BudgetFile) -> dict[str, Any]:
    """Return the contents as JSON values, without `limits`, embeddings and storages where there are none but 16 bits.

    >>> from globalopt.budgets.example import example_budget
    >>> record(example_budget())["layers"][1]["nnz"], "limits" in record(example_budget())
    (16, False)
    """
    absent = {name for name, there in (("limits", file.limits), ("embeddings", file.embeddings)) if not there}
    found = file.model_dump(mode="json", exclude=absent)
    if file.schema_version == SCHEMA_VERSION:
        for layer in found["layers"]:
            del layer["storage"]
    return found


def read(path: Path) -> BudgetFile:
    """Read and check a budget file.

    Raises:
        ArtefactError: the file is missing, truncated, of a newer schema, or has unknown or bad fields, or its costs do
            not add up.

    >>> from globalopt.budgets.example import example_budget
    >>> write(Path("budget.json"), example_budget())
    >>> read(Path("budget.json")).layers[0].kind
    'up_proj'
    """
    raw = read_json(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("schema_version"), int):
        raise ArtefactError(f"{path} is not a budget file: it has no schema_version.")
    if raw["schema_version"] > STORAGE_VERSION:
        raise ArtefactError(
            f"{path} was written by a newer version (schema {raw['schema_version']}, this one reads up to "
            f"{STORAGE_VERSION}). Upgrade globalopt."
        )
    try:
        return BudgetFile.model_validate(raw).check(path)
    except ValidationError as cause:
        first = cause.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtefactError(f"{path} is not a valid budget file: {where}: {first['msg']}.") from None
