"""Values that stages hand on through artefacts: anchor solutions, choices of metrics, predictions, solved layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from globalopt.values.budget import Target
from globalopt.values.decomposition import Decomposition
from globalopt.values.embeddings import Embedding
from globalopt.values.search_record import Outcome, Search
from globalopt.values.surface import ErrorSurface


@dataclass(frozen=True, eq=False)
class AnchorSolutions:
    """Hold the solutions of the probe solver at the anchors of one layer.

    Args:
        rows: the anchors, in rows of equal rank share, ascending in what they keep.
        values: one solution per anchor, row by row.

    >>> import torch
    >>> half = Decomposition(torch.eye(2), torch.zeros(2, 0), torch.zeros(0, 2))
    >>> AnchorSolutions(((Target(0, 2),),), (half,)).anchors
    (Target(rank=0, nnz=2),)
    """

    rows: tuple[tuple[Target, ...], ...]
    values: Sequence[Decomposition]

    @property
    def anchors(self) -> tuple[Target, ...]:
        """The anchors of all rows, one after the other."""
        return tuple(anchor for row in self.rows for anchor in row)


@dataclass(frozen=True)
class CheckedLoss:
    """Compare a predicted loss of a layer with what the model loses when that layer alone is replaced.

    Args:
        target: at which the layer was solved.
        predicted: nats per token, by the metric with the output Gram.
        weighted: nats per token after a solution in `tr(A E G Eᵀ)`.
        plain: nats per token after a solution in `tr(E G Eᵀ)`.

    >>> CheckedLoss(Target(0, 2), predicted=0.001, weighted=0.02, plain=0.01).plain
    0.01
    """

    target: Target
    predicted: float
    weighted: float
    plain: float


@dataclass(frozen=True)
class MetricChoice:
    """Choose between the two metrics in which a layer can be solved.

    Args:
        checked: ascending in what is kept; empty where no loss gave a reason to compare.

    >>> MetricChoice((CheckedLoss(Target(0, 2), predicted=0.001, weighted=0.02, plain=0.01),)).uses_output_gram
    False
    >>> MetricChoice().uses_output_gram
    True
    """

    checked: tuple[CheckedLoss, ...] = ()

    @property
    def uses_output_gram(self) -> bool:
        """Whether the layer is to be solved in its output Gram `A` too: where it keeps most, that is no worse."""
        return not self.checked or self.checked[-1].weighted <= self.checked[-1].plain

    @property
    def losses(self) -> dict[Target, float]:
        """The measured losses in the metric that is chosen, by target."""
        uses = self.uses_output_gram
        return {loss.target: loss.weighted if uses else loss.plain for loss in self.checked}


@dataclass(frozen=True, eq=False)
class Prediction:
    """Hold the predicted losses of a layer's options.

    Args:
        surface: predicted loss of every option.
        overlap: (anchors, anchors) float64, cosines between the anchor residuals in the norm of the predictions; None
            without anchor solutions.

    >>> from globalopt.values.layer import LayerSpec
    >>> spec = LayerSpec("up", 0, "in", "up", 2, 2)
    >>> Prediction(ErrorSurface(spec, (Target.zero(), Target.dense(spec)), (1.0, 0.0)), None).surface.error
    (1.0, 0.0)
    """

    surface: ErrorSurface
    overlap: Tensor | None


@dataclass(frozen=True)
class Allocated:
    """Hold the targets that an allocator chose, and what was found out on the way.

    Args:
        targets: by layer name, in model order.
        bound: a proved lower bound on the predicted loss, or None.
        search: evaluations of the objective, where the allocator made some.
        uniform: the loss of the uniform allocation beside it.
        embeddings: how the embeddings are stored; empty where the budget does not count them.

    >>> Allocated({"up": Target(0, 2)}, None, None, Outcome(2, 0.1, None, None)).targets["up"].nnz
    2
    """

    targets: Mapping[str, Target]
    bound: float | None
    search: Search | None
    uniform: Outcome
    embeddings: tuple[Embedding, ...] = ()


@dataclass(frozen=True, eq=False)
class SolvedLayer:
    """Hold a layer as its solver left it, with what refinement recorded of it: errors, status, damping, seconds, trace.

    >>> import torch
    >>> kept = Decomposition(torch.eye(2), torch.zeros(2, 0), torch.zeros(0, 2))
    >>> SolvedLayer(kept, {"status": "converged"}).value.nnz
    2
    """

    value: Decomposition
    metadata: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Matched:
    """Hold what matching left of a block or of a model, and what it recorded.

    Args:
        values: layers by name.
        norms: parameters of norms by name.

    >>> Matched({}, {}, {"epochs": 3}).metadata["epochs"]
    3
    """

    values: Mapping[str, Decomposition]
    norms: Mapping[str, Tensor]
    metadata: Mapping[str, Any]
