"""Record what a run chose for every layer, and what solving and matching reached."""

from __future__ import annotations

from dataclasses import dataclass, field

from globalopt.values.budget import Target
from globalopt.values.layer import NM
from globalopt.values.storage import PLAIN, Storage


@dataclass(frozen=True)
class LayerPlan:
    """Describe one layer and the target that an allocation gives it.

    Args:
        name, block, kind, d_out, d_in: as in `LayerSpec`.
        rank, nnz, pattern: the target; `pattern` as text ("2:4") or None.
        cost: parameters or bytes used, in the budget's accounting. dense_cost: those of the dense layer.
        predicted: the layer's predicted loss at the target, in the unit of the layer errors; None where the allocation
            was made in another unit.
        storage: bits of the stored numbers, as text ("16", "4/8").
        signs: whether the target has a plane of signs.

    >>> size = dict(rank=8, nnz=1024, pattern=None, cost=2048, dense_cost=4096)
    >>> plan = LayerPlan("q_proj", 0, "q_proj", 64, 64, **size, predicted=0.01)
    >>> plan.kept, plan.density, plan.rank_share
    (0.5, 0.25, 0.5)
    """

    name: str
    block: int
    kind: str
    d_out: int
    d_in: int
    rank: int
    nnz: int
    pattern: str | None
    cost: int
    dense_cost: int
    predicted: float | None
    storage: str = field(default=str(PLAIN), kw_only=True)
    signs: bool = field(default=False, kw_only=True)

    @property
    def target(self) -> Target:
        """The layer's target."""
        pattern = NM.parse(self.pattern) if self.pattern else None
        return Target(self.rank, self.nnz, pattern, self.signs, Storage.parse(self.storage))

    @property
    def kept(self) -> float:
        """Compute the fraction of the layer that is kept, in the budget's accounting."""
        return self.cost / self.dense_cost

    @property
    def density(self) -> float:
        """Compute the nonzeros of `S` as a fraction of all weights."""
        return self.nnz / (self.d_out * self.d_in)

    @property
    def rank_params(self) -> int:
        """Count the parameters of the low-rank factors."""
        return self.rank * (self.d_out + self.d_in)

    @property
    def rank_share(self) -> float:
        """Compute the share of the kept parameters that lies in the factors `U` and `V`; 0 where nothing is kept."""
        kept = self.rank_params + self.nnz
        return self.rank_params / kept if kept else 0.0

    @property
    def number_bits(self) -> int:
        """Count the bits of the values of `S` and of the entries of `U` and `V`, without scales and index."""
        storage = Storage.parse(self.storage)
        return storage.values * self.nnz + storage.factors * self.rank_params


@dataclass(frozen=True)
class LayerResult(LayerPlan):
    """Record one refined layer: its target, and the error that the solver reached.

    Args:
        actual: error of the refined layer in `Summary.error_unit`: `tr(A E G Eᵀ) / 2` in nats, or `tr(E G Eᵀ)`.
        relative: `tr(E G Eᵀ) / tr(W G Wᵀ)`, undamped, on the inputs of the refinement.
        status: the value of the solver's `Status`.
        damping: the damping that the solver needed, as a fraction of the mean of the Gram's diagonal.
        seconds: time of the solver.
        bytes: size in its storage with the cheapest index (`Target.bytes`); 0 where it was not counted.

    >>> target = dict(rank=8, nnz=1024, pattern=None, cost=2048, dense_cost=4096, predicted=0.010)
    >>> found = dict(actual=0.012, relative=0.05, status="converged", damping=0.01, seconds=0.4)
    >>> layer = LayerResult("q_proj", 0, "q_proj", 64, 64, **target, **found)
    >>> round(layer.actual / layer.predicted, 2), layer.kept
    (1.2, 0.5)
    """

    actual: float
    relative: float
    status: str
    damping: float
    seconds: float
    bytes: int = 0


@dataclass(frozen=True)
class MatchResult:
    """Record the loss before and after matching one block, or the whole model, to the dense one.

    Args:
        block: index of the block; None for the whole model.
        loss: the loss that was minimised: "sum", "token", "nats" (`globalopt.matching.block.Loss`), or "kl".
        before, after: the loss on held-out calibration windows, or on all of them where none were held out.
        epochs: epochs trained. kept_epoch: the epoch whose parameters were kept; 0 is the start.
        seconds: time of the training.

    >>> match = MatchResult(3, "token", before=0.20, after=0.15, epochs=4, kept_epoch=4, seconds=2.0)
    >>> f"{1 - match.after / match.before:.0%} less"
    '25% less'
    """

    block: int | None
    loss: str
    before: float
    after: float
    epochs: int
    kept_epoch: int
    seconds: float
