"""Allocators: which rank and how many nonzeros every layer gets. They see surfaces and a budget, never the model."""

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
    """The allocator called `name`, with options given as text; see `registry.build` for the errors."""
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
