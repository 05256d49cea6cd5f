"""Made-up runs of eight blocks: one layer is missing, one fell back."""

from __future__ import annotations

from typing import Any

from globalopt.values.layer_results import LayerResult, MatchResult
from globalopt.values.results import Summary
from globalopt.values.search_record import Search
from reports.example import (
    FALLBACK,
    MISSING,
    example_layers,
    example_matching,
    example_searched_summary,
    example_summary,
)
from reports.example import example_curve as make_curve
from reports.example import example_curves as make_curves
from reports.example import example_details as make_details
from reports.example import example_family as make_family
from reports.example import example_metrics as make_metrics
from reports.example import example_samples as make_samples
from reports.example import example_search as make_search

__all__ = [
    "FALLBACK",
    "MISSING",
    "make_curve",
    "make_curves",
    "make_details",
    "make_family",
    "make_layers",
    "make_matching",
    "make_metrics",
    "make_samples",
    "make_search",
    "make_searched",
    "make_summary",
]


def make_layers(blocks: int = 8, pattern: str | None = None) -> tuple[LayerResult, ...]:
    return example_layers(blocks, pattern)


def make_summary(blocks: int = 8, pattern: str | None = None, **changed: Any) -> Summary:
    return example_summary(blocks, pattern, **changed)


def make_searched(search: Search, **changed: Any) -> Summary:
    return example_searched_summary(search, **{"blocks": 8, **changed})


def make_matching(blocks: int = 8, model: bool = True) -> tuple[MatchResult, ...]:
    return example_matching(blocks, model)
