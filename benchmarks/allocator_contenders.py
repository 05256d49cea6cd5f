"""Allocators as benchmarks are given them, `NAME[:OPTION=VALUE[,OPTION=VALUE]][@TOKENS]`, and two of their own."""

from __future__ import annotations

import argparse
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import cells

from allocators import ALLOCATORS
from allocators._fractions import check_rank_share
from allocators._spend import spend
from allocators.knapsack import Knapsack
from allocators.uniform import Uniform
from globalopt import registry
from globalopt.analysis.grid import NNZ_LEVELS
from globalopt.errors import UsageError
from globalopt.pipeline.options import RefineOptions, SearchOptions
from globalopt.pipeline.plan import SearchPlan, resolve
from globalopt.protocols import Allocator, Objective, Reads
from globalopt.values.budget import Target
from globalopt.values.problem import Allocation, Problem
from globalopt.values.surface import ErrorSurface
from solvers import SOLVERS

UNIFORM = Uniform.name
RANK_SHARE = "rank_share"
TYPED = re.compile(r"(?P<name>[a-z][\w-]*(@share)?)(:(?P<options>[^@]+))?(@(?P<limit>\d+))?")


@dataclass(frozen=True)
class OneShare:
    """The exact knapsack with one rank share for all layers: what a free share per layer is to be compared with.

    Of the options of a layer that keep about the same number of parameters, only the one whose rank share is nearest
    to `rank_share` is offered.
    """

    name: ClassVar[str] = "knapsack@share"
    paper: ClassVar[str] = Knapsack.paper
    reads: ClassVar[Reads] = Reads.SURFACES
    version: ClassVar[int] = 1
    rank_share: float = 0.1

    def __post_init__(self) -> None:
        check_rank_share(self.rank_share)

    def allocate(self, problem: Problem, objective: Objective | None = None) -> Allocation:
        """Return the knapsack's allocation of what is offered; the bound is of the same options."""
        offered = replace(problem, surfaces=tuple(self._offered(surface) for surface in problem.surfaces))
        found = Knapsack().allocate(offered)
        # Between the options that are left, losses are still predicted by the whole surface.
        return problem.finish(spend(problem, found.targets), by=self.name, bound=found.bound)

    def _offered(self, surface: ErrorSurface) -> ErrorSurface:
        spec = surface.spec
        step = -(-spec.numel // NNZ_LEVELS)
        nearest: dict[int, tuple[float, int, Target, float]] = {}
        for target, error in zip(surface.targets, surface.error, strict=True):
            distance = abs(target.rank_share(spec) - self.rank_share)
            level = -(-target.params(spec) // step)
            found = (distance, target.rank, target, error)
            if level not in nearest or found[:2] < nearest[level][:2]:
                nearest[level] = found
        kept = nearest.values()
        return ErrorSurface(spec, tuple(target for _, _, target, _ in kept), tuple(error for *_, error in kept))


@dataclass(frozen=True)
class Disturbed:
    """The knapsack on surfaces that are off by a random factor per layer: one of many allocations that make some sense.

    Args:
        number: which of them; with the problem's seed it decides the factors.
        spread: standard deviation of their logarithms.
    """

    name: ClassVar[str] = "disturbed"
    paper: ClassVar[str] = Knapsack.paper
    reads: ClassVar[Reads] = Reads.SURFACES
    version: ClassVar[int] = 1
    number: int = 0
    spread: float = 1.0

    def allocate(self, problem: Problem, objective: Objective | None = None) -> Allocation:
        """Return the allocation, with the loss that the true surfaces predict."""
        draw = random.Random(f"{problem.seed} {self.number}")
        factors = {name: math.exp(draw.gauss(0, self.spread)) for name in sorted(spec.name for spec in problem.specs)}
        found = Knapsack(exact=False).allocate(problem.scaled(factors))
        return problem.finish(found.targets, by=self.name)


TABLE: Mapping[str, type[Allocator]] = {**ALLOCATORS, OneShare.name: OneShare, Disturbed.name: Disturbed}


@dataclass(frozen=True)
class Contender:
    """An allocator with options as typed.

    Args:
        limit: tokens that it may spend on the objective; None where it uses none, or where no limit was given.
    """

    allocator: str
    options: tuple[tuple[str, str], ...] = ()
    limit: int | None = None

    @classmethod
    def parse(cls, text: str) -> Contender:
        typed = TYPED.fullmatch(text)
        if typed is None:
            raise argparse.ArgumentTypeError(f"takes NAME[:OPTION=VALUE[,OPTION=VALUE]][@TOKENS]; got '{text}'")
        pairs = (typed["options"] or "").split(",") if typed["options"] else []
        limit = int(typed["limit"]) if typed["limit"] else None
        return cls(typed["name"], tuple(cells.option_pair(pair) for pair in pairs), limit)

    @property
    def method(self) -> str:
        """Name and options."""
        options = ",".join(f"{name}={value}" for name, value in self.options)
        return f"{self.allocator}:{options}" if options else self.allocator

    @property
    def label(self) -> str:
        """What is typed for it."""
        return self.method if self.limit is None else f"{self.method}@{self.limit}"

    @property
    def reads(self) -> Reads:
        return self.make().reads

    @property
    def predicted(self) -> bool:
        """Whether it reads predicted losses, which need gradients; else Grams are enough, or the spans made of them."""
        heuristic = self.allocator in (UNIFORM, "owl", "alpha")
        return not heuristic and (self.allocator, dict(self.options).get("preset")) != ("bernoulli", "cap")

    def make(self) -> Allocator:
        """The allocator; `UsageError` for names, options and values that there are not."""
        return registry.build("allocator", TABLE, self.allocator, dict(self.options))

    def plan(self, search: SearchOptions, refining: RefineOptions | None = None) -> SearchPlan:
        """Resolve `search` by this allocator, with its limit; `UsageError` or `UnknownNameError` for a bad option."""
        found = replace(search, allocator=self.allocator, allocator_options=dict(self.options))
        if self.limit is not None:
            found = replace(found, search_tokens=self.limit)
        return resolve(found, refining, self.make())

    def at(self, limits: Sequence[int]) -> list[Contender]:
        """It at each of `limits` where it uses the objective and has no limit of its own."""
        if Reads.OBJECTIVE in self.reads:
            return [self] if self.limit else [replace(self, limit=limit) for limit in limits]
        if self.limit:
            raise UsageError(f"Allocator '{self.allocator}' does not use the objective; leave out @{self.limit}.")
        return [self]


def told_apart(contenders: Sequence[Contender], solver: str, pattern: str) -> list[Contender]:
    """Those that differ for a solver and a pattern: where rank is no choice, a rank share makes no difference."""
    if pattern == "unstructured" and SOLVERS[solver].low_rank:
        return list(dict.fromkeys(contenders))
    without = (
        replace(contender, options=tuple(pair for pair in contender.options if pair[0] != RANK_SHARE))
        for contender in contenders
        if contender.allocator != OneShare.name
    )
    return list(dict.fromkeys(without))
