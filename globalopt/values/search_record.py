"""Record the candidates of a search, and the loss of an allocation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Evaluation:
    """Record one candidate of a search and its loss.

    Args:
        tokens: forward tokens that the search had spent by then.
        loss: mean KL(dense || candidate) over `windows` windows of the selection text, nats per token.
        windows: number of windows the loss was taken on.
        whole: whether these were all windows of the text, so that losses can be compared.
        predicted: sum of the layers' predicted losses, in the budget's unit.

    >>> tried = (Evaluation(4096, 0.031, 8, True, 0.029), Evaluation(8192, 0.027, 8, True, 0.030))
    >>> min(tried, key=lambda evaluation: evaluation.loss).tokens
    8192
    """

    tokens: int
    loss: float
    windows: int
    whole: bool
    predicted: float


@dataclass(frozen=True)
class Search:
    """Record a search that evaluated candidates on the model's true loss.

    Args:
        tokens, limit: forward tokens spent, and allowed.
        candidates: how the layers of candidates were made: "anchors" (from anchor solutions) or "span" (from spans).
        top, tail: number of log probabilities of the dense model kept per position, and the mean probability of all
            other tokens.
        loss: loss of the chosen allocation on the whole selection text.
        evaluations: in the order they were made.

    >>> tried = (Evaluation(4096, 0.031, 8, True, 0.029), Evaluation(8192, 0.027, 8, True, 0.030))
    >>> search = Search(8192, 500_000, "anchors", top=1024, tail=0.01, loss=0.027, evaluations=tried)
    >>> search.loss == min(evaluation.loss for evaluation in search.evaluations if evaluation.whole)
    True
    """

    tokens: int
    limit: int
    candidates: str
    top: int
    tail: float
    loss: float
    evaluations: tuple[Evaluation, ...]


@dataclass(frozen=True)
class Outcome:
    """Compare the predicted loss of an allocation with the measured loss of a candidate made for it.

    Args:
        used: cost of the allocation, in the budget's unit.
        predicted: sum of the layers' predicted losses.
        measured: mean KL(dense || candidate) on the selection text in nats per token, or None.
        stderr: its standard error over windows, or None.

    >>> outcome = Outcome(used=2048, predicted=0.030, measured=0.033, stderr=0.001)
    >>> round(outcome.measured / outcome.predicted, 2)
    1.1
    """

    used: int
    predicted: float
    measured: float | None
    stderr: float | None
