"""Define the contents of budget files, and check that they agree.

The first version of the schema has layers in 16 bits alone; the second has the bits of every layer, and may count the
embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from globalopt.errors import ArtefactError, GlobalOptError
from globalopt.values.budget import NO_LIMITS, Budget, Limits, Target
from globalopt.values.embeddings import Embedding, dense_bytes, measured, stored_bytes
from globalopt.values.error_unit import ErrorUnit
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.layer_results import LayerPlan
from globalopt.values.problem import Allocation
from globalopt.values.storage import PLAIN, Storage

SCHEMA_VERSION = 1
STORAGE_VERSION = 2
"""Of files in which a layer is stored in fewer than 16 bits, or embeddings are counted."""


class LayerEntry(BaseModel):
    """Record the target of one layer, with its shape, its cost and its predicted error.

    >>> from globalopt.budgets.example import example_budget
    >>> entry = example_budget().layers[0]
    >>> (entry.d_out, entry.d_in), entry.target.rank, entry.target.nnz, entry.cost
    ((8, 4), 1, 4, 16)
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    name: str
    block: int = Field(ge=0)
    kind: str
    d_out: int = Field(ge=1)
    d_in: int = Field(ge=1)
    rank: int = Field(ge=0)
    nnz: int = Field(ge=0)
    pattern: str | None
    cost: int = Field(ge=0)
    predicted: float | None
    storage: str = str(PLAIN)

    @property
    def spec(self) -> LayerSpec:
        """The layer's place and shape; its input site is not in the file, so that its name stands for it."""
        return LayerSpec(self.name, self.block, self.name, self.kind, self.d_out, self.d_in)

    @property
    def target(self) -> Target:
        """The layer's target, never with a plane of signs."""
        pattern = NM.parse(self.pattern) if self.pattern else None
        return Target(self.rank, self.nnz, pattern, storage=Storage.parse(self.storage))


class LimitsEntry(BaseModel):
    """Record the serving limits that the targets of all layers are within (`Limits`).

    >>> LimitsEntry(rank_multiple=8, max_rank=512, sparse=True).max_rank
    512
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    rank_multiple: int = Field(ge=1)
    max_rank: int | None = Field(ge=0)
    sparse: bool


class EmbeddingEntry(BaseModel):
    """Record how an embedding matrix is stored, with its shape, its bytes and the loss that was measured of it.

    >>> entry = EmbeddingEntry(name="lm_head", rows=100, width=64, bits=8, cost=6600, loss=None)
    >>> entry.embedding.bytes
    6600
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    name: str
    rows: int = Field(ge=1)
    width: int = Field(ge=1)
    bits: int
    cost: int = Field(ge=0)
    loss: float | None

    @property
    def embedding(self) -> Embedding:
        """The matrix as it is stored; `UsageError` where its bits are none of embeddings."""
        return Embedding(self.name, self.rows, self.width, self.bits, self.loss)


class BudgetFile(BaseModel):
    """Hold the contents of a budget file; `read` also checks that the costs add up.

    `fingerprint` identifies the model by type and layer shapes. `asked` is the requested kept fraction; `limit`, `used`
    and `total` are in the unit of `accounting`; `covered / block_params` is the coverage. `predicted` and `bound` are
    in `error_unit`. `predicted` is None where the targets were imported, so that no search predicted their loss.
    `limits` are the serving limits of the search, if it had some. `embeddings` are those that the budget counts:
    then `limit`, `used` and `total` are of layers and embeddings together, and so are `predicted` and `bound`, where
    the losses of the embeddings were measured.

    >>> from globalopt.budgets.example import example_budget
    >>> file = example_budget()
    >>> file.accounting, file.used / file.total, file.covered / file.block_params
    ('params', 0.5, 0.8)
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    schema_version: Literal[1, 2]
    fingerprint: str
    accounting: Literal["params", "bytes"]
    asked: float = Field(gt=0, le=1)
    limit: int
    used: int
    total: int
    covered: int = Field(ge=1)
    block_params: int = Field(ge=1)
    allocator: str
    seed: int
    error_unit: ErrorUnit
    predicted: float | None
    bound: float | None
    layers: tuple[LayerEntry, ...]
    limits: LimitsEntry | None = None
    embeddings: tuple[EmbeddingEntry, ...] = ()

    @property
    def matrices(self) -> tuple[Embedding, ...]:
        """The embeddings that the budget counts, as they are stored."""
        return tuple(entry.embedding for entry in self.embeddings)

    @property
    def budget(self) -> Budget:
        """The budget of the layers alone."""
        total = self.total - dense_bytes(self.matrices)
        return Budget(min(self.limit - stored_bytes(self.matrices), total), total, self.accounting)

    @property
    def served(self) -> Limits:
        """The serving limits of the search."""
        return NO_LIMITS if self.limits is None else Limits(**self.limits.model_dump())

    @property
    def plans(self) -> tuple[LayerPlan, ...]:
        """The layers with their dense costs, as reports show them."""
        budget = self.budget
        return tuple(
            LayerPlan(**entry.model_dump(), dense_cost=budget.cost(Target.dense(entry.spec), entry.spec))
            for entry in self.layers
        )

    @property
    def allocation(self) -> Allocation:
        """The allocation of the layers that the file records."""
        lost = measured(self.matrices)
        return Allocation(
            {entry.name: entry.target for entry in self.layers},
            self.budget,
            self.used - stored_bytes(self.matrices),
            math.nan if self.predicted is None else self.predicted - lost,
            self.allocator,
            None if self.bound is None else self.bound - lost,
        )

    def check(self, source: Path) -> BudgetFile:
        """Check that targets, costs, limit and totals agree, and return the file.

        Raises:
            ArtefactError: they do not; it names `source` and the first that is wrong.
        """
        try:
            embeddings = self.matrices
            budget = Budget(self.limit, self.total, self.accounting)
            costs = [budget.cost(entry.target.check(entry.spec), entry.spec) for entry in self.layers]
            for entry in self.layers:
                self.served.check(entry.target, entry.spec)
        except GlobalOptError as cause:
            raise ArtefactError(f"{source}: {cause}") from None
        if self.schema_version != schema_of((entry.target for entry in self.layers), embeddings):
            raise ArtefactError(
                f"{source}: schema {self.schema_version} is not that of its storages: it is 1 where all have 16 "
                "bits and no embeddings are counted, else 2."
            )
        self._check_embeddings(source)
        for entry, cost in zip(self.layers, costs, strict=True):
            if cost != entry.cost:
                raise ArtefactError(f"{source}: layer {entry.name} says cost {entry.cost}, its target costs {cost}.")
        if len({entry.name for entry in self.layers}) != len(self.layers):
            raise ArtefactError(f"{source}: a layer is listed twice.")
        listed = "layers and embeddings" if embeddings else "layers"
        dense = sum(budget.cost(Target.dense(entry.spec), entry.spec) for entry in self.layers)
        if (dense := dense + dense_bytes(embeddings)) != self.total:
            raise ArtefactError(f"{source}: total says {self.total}, the listed {listed} have {dense}.")
        if (used := sum(costs) + stored_bytes(embeddings)) > self.limit:
            raise ArtefactError(
                f"{source} exceeds its budget: the {listed} use {used} of {self.limit} {self.accounting}. "
                "It was edited; lower some targets or search again."
            )
        if used != self.used:
            raise ArtefactError(f"{source}: used says {self.used}, the {listed} add up to {used}.")
        return self

    def _check_embeddings(self, source: Path) -> None:
        """Raise `ArtefactError` where embeddings are not counted in bytes, cost something else, or are listed twice."""
        if self.embeddings and self.accounting != "bytes":
            raise ArtefactError(f"{source}: embeddings are counted in bytes, the budget is in {self.accounting}.")
        if len({entry.name for entry in self.embeddings}) != len(self.embeddings):
            raise ArtefactError(f"{source}: an embedding is listed twice.")
        for entry in self.embeddings:
            if entry.cost != entry.embedding.bytes:
                raise ArtefactError(
                    f"{source}: embedding {entry.name} says cost {entry.cost}, in {entry.bits} bits it takes "
                    f"{entry.embedding.bytes}."
                )

    def for_model(self, fingerprint: str, specs: tuple[LayerSpec, ...], source: Path) -> Allocation:
        """Return the allocation, after checking that the file belongs to the model with these layers.

        Raises:
            ArtefactError: the file belongs to another model.
        """
        mine = {(spec.name, spec.d_out, spec.d_in) for spec in specs}
        listed = {(entry.name, entry.d_out, entry.d_in) for entry in self.layers}
        if mine != listed:
            name = min(mine ^ listed)[0]
            raise ArtefactError(
                f"{source} belongs to another model: it has {len(listed)} layers, this one {len(mine)}; "
                f"they differ first at {name}."
            )
        if fingerprint != self.fingerprint:
            raise ArtefactError(f"{source} belongs to another model: same layers, other type or vocabulary.")
        return self.allocation


def schema_of(targets: Iterable[Target], embeddings: Sequence[Embedding] = ()) -> Literal[1, 2]:
    """Return the version of the schema that a file of these targets needs, and of `embeddings` that it counts.

    >>> schema_of([Target(0, 8)]), schema_of([Target(0, 8), Target(0, 8, storage=Storage(4, 8))])
    (1, 2)
    """
    plain = all(target.storage.plain for target in targets) and not embeddings
    return SCHEMA_VERSION if plain else STORAGE_VERSION
