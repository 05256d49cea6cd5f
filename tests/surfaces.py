"""Synthetic problems for allocators: convex, non-convex, tied and N:M surfaces, without a model."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from globalopt.analysis.spans import compute_span
from globalopt.values.budget import NO_LIMITS, Budget, Limits, Target
from globalopt.values.layer import NM, LayerSpec
from globalopt.values.problem import Problem, Profile
from globalopt.values.span import Span
from globalopt.values.storage import PLAIN, Storage
from globalopt.values.surface import ErrorSurface

SHAPES = ((8, 12), (16, 16), (24, 8), (12, 20))


def surface(
    name: str,
    d_out: int,
    d_in: int,
    importance: float,
    rng: random.Random,
    pattern: NM | None = None,
    limits: Limits = NO_LIMITS,
    storages: tuple[Storage, ...] = (PLAIN,),
):
    """A grid of ranks and counts; the error falls with both, with a seeded ripple that makes it non-convex.

    What is kept has an error of its own in few bits, four times as large for every bit less.
    """
    spec = LayerSpec(name, int(name.rsplit(".", 1)[-1]) // 4, name, "kind", d_out, d_in)
    targets: list[Target] = []
    errors: list[float] = []
    ranks = range(4) if limits.sparse else range((spec.numel - 1) // (d_out + d_in) + 1)
    for rank in (rank for rank in ranks if limits.floor(rank) == rank):
        for step in range(9) if limits.sparse else (0, 8):
            nnz = pattern.nnz(spec) if pattern else spec.numel * step // 8
            target = Target(rank, nnz, pattern)
            if (pattern and step) or (target.params(spec) > spec.numel and nnz < spec.numel):
                continue
            if rank and nnz == spec.numel:
                continue
            left = (1 - nnz / spec.numel) ** 2 * 0.8**rank
            targets.append(target)
            errors.append(importance * left * (1 + 0.2 * rng.random()) if nnz < spec.numel else 0.0)
    every = [
        (replace(target, storage=storage), error + rounding(target, spec, storage, importance))
        for storage in storages
        for target, error in zip(targets, errors, strict=True)
    ]
    return ErrorSurface(spec, tuple(target for target, _ in every), tuple(error for _, error in every))


def rounding(target: Target, spec: LayerSpec, storage: Storage, importance: float) -> float:
    """The error that rounding adds."""
    values, factors = (0.0 if bits == 16 else 2.0 * 4.0**-bits for bits in (storage.values, storage.factors))
    return importance * (values * target.nnz + factors * target.rank * (spec.d_out + spec.d_in)) / spec.numel


def problem(
    kept: float,
    seed: int = 0,
    layers: int = 6,
    accounting: str = "params",
    pattern: NM | None = None,
    limits: Limits = NO_LIMITS,
    storages: tuple[Storage, ...] = (PLAIN,),
) -> Problem:
    """A problem of `layers` layers of mixed shapes whose importances differ by up to a hundredfold."""
    rng = random.Random(seed)
    surfaces = tuple(
        surface(f"layer.{i}", *SHAPES[i % len(SHAPES)], 10 ** rng.uniform(-1, 1), rng, pattern, limits, storages)
        for i in range(layers)
    )
    profiles = {
        s.spec.name: Profile({m: rng.uniform(0.0, 0.1) / m for m in (3, 5, 7, 10)}, rng.uniform(2.0, 6.0))
        for s in surfaces
    }
    budget = Budget.fraction(kept, [s.spec for s in surfaces], accounting)
    specs = {s.spec.name: s.spec for s in surfaces}

    def span(name: str) -> Span:
        """Of a random weight."""
        generator = torch.Generator().manual_seed(len(name))
        return compute_span(torch.randn(specs[name].d_out, specs[name].d_in, generator=generator), scaling="none")

    return Problem(surfaces, budget, pattern, seed, profiles, limits, span)
