"""Name the units of predicted and actual errors."""

from __future__ import annotations

from enum import StrEnum


class ErrorUnit(StrEnum):
    """Name the unit of the predicted and actual errors of layers, as it stands in JSON files.

    `NATS`: increase of the mean loss in nats per token, `tr(A E G Eᵀ) / 2` with the output Gram `A`. `OUTPUT_ERROR`:
    `tr(E G Eᵀ)`, the squared error of the layer's output per token. `NOT_PREDICTED`: of budgets whose targets no search
    predicted anything for.

    >>> ErrorUnit("output error")
    <ErrorUnit.OUTPUT_ERROR: 'output error'>
    >>> f"3.1 {ErrorUnit.NATS}"
    '3.1 nats per token'
    """

    NATS = "nats per token"
    OUTPUT_ERROR = "output error"
    NOT_PREDICTED = "not predicted"
