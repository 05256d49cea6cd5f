"""Allocators: they choose the rank and the nonzeros of every layer from error surfaces and a budget.

They never see the model: those that evaluate its loss do so through an `Objective`.
"""

from __future__ import annotations

from collections.abc import Mapping

from allocators.alpha import Alpha
from allocators.auto import Auto
from allocators.bernoulli import Bernoulli
from allocators.depth_ramp import DepthRamp
from allocators.evolution import Evolution
from allocators.knapsack import Knapsack
from allocators.optuna_warp import OptunaWarp
from allocators.owl import Owl
from allocators.uniform import Uniform
from globalopt import registry
from globalopt.protocols import Allocator

ALLOCATORS: dict[str, type[Allocator]] = {
    a.name: a for a in (Uniform, Owl, Alpha, DepthRamp, Knapsack, OptunaWarp, Evolution, Bernoulli, Auto)
}


def get_allocator(name: str, options: Mapping[str, str] | None = None) -> Allocator:
    """Make the allocator called `name`, with options given as text; see `registry.build` for the errors.

    >>> get_allocator("knapsack", {"exact": "false"})
    Knapsack(exact=False, gap=1e-06, nodes=2000)
    """
    return registry.build("allocator", ALLOCATORS, name, options)


__all__ = [
    "ALLOCATORS",
    "Alpha",
    "Auto",
    "Bernoulli",
    "DepthRamp",
    "Evolution",
    "Knapsack",
    "OptunaWarp",
    "Owl",
    "Uniform",
    "get_allocator",
]
