"""How noisy is each gradient estimator of the policy search at its start? All on the same samples, so at equal tokens.

    python benchmarks/estimators.py --out OUT [--budget 0.3] [--seeds 0 1 2] [--updates 64] [--samples 8]

The policy is `bernoulli`'s around the knapsack and does not move. Every update draws its samples and evaluates them on
one random chunk of the selection text, as the search does; every estimator makes its gradient of them: with the moving
average or leave-one-out as baseline, with and without the surrogate as control variate, and divided by the Fisher
information or not. Baselines and slopes come from earlier updates alone, of which the first `--pilot` are not counted.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cells
import torch
from allocator_contenders import Contender
from rich.console import Group as Stack
from torch import Tensor

from allocators._groups import Groups
from allocators._policy import Control, Policy, gradient_samples
from allocators.bernoulli import NO_LIMITS, Baseline, Bernoulli, History
from allocators.knapsack import Knapsack
from globalopt.errors import UsageError
from globalopt.objective.of_run import SearchObjective
from globalopt.pipeline.options import SearchOptions
from globalopt.runs.files import write_json
from globalopt.values.problem import Problem
from reports import formats
from reports.table_style import add_numbers, footed, report_table

BERNOULLI = Contender(Bernoulli.name)


@dataclass(frozen=True)
class Estimator:
    """How a gradient is made of an update's samples."""

    baseline: Baseline
    control_variate: bool
    natural: bool


ESTIMATORS = [Estimator(*choice) for choice in itertools.product(Baseline, (False, True), (False, True))]


@dataclass(frozen=True)
class Spread:
    """An estimator's noise.

    Args:
        variance: of an update's estimate, `E |g - E g|²`; of a natural one in the norm `sum variance_i g_i²` that
            measures its steps.
        relative: to the variance of the moving average without control variate in the same norm.
        noise: to `|E g|²`, as the quietest estimator has it; None where that is not told from zero.
    """

    variance: float
    relative: float
    noise: float | None


@dataclass(frozen=True)
class Cell:
    """One estimator on one seed."""

    seed: int
    estimator: Estimator
    spread: Spread
    tokens: int

    def record(self) -> dict[str, Any]:
        return {"seed": self.seed, **asdict(self.estimator), **asdict(self.spread), "tokens": self.tokens}


def estimates(
    problem: Problem, objective: SearchObjective, updates: int, pilot: int, samples: int
) -> tuple[dict[tuple[Baseline, bool], Tensor], Tensor]:
    """(updates, stacks) plain gradients by baseline and control variate, and (stacks,) the Fisher information.

    Raises:
        UsageError: the policy has one allocation only.
    """
    options = Bernoulli()
    groups = Groups(problem, Knapsack().allocate(problem).targets, options.groups)
    policy = Policy.around(groups, options.spread)
    if not policy.free:
        raise UsageError("At this budget the policy has nothing to choose; take one further from 0 and 1.")
    generator = torch.Generator().manual_seed(problem.seed)
    history = History()
    found: dict[tuple[Baseline, bool], list[Tensor]] = {}
    fisher = torch.empty(0)
    for update in range(pilot + updates):
        draws = policy.draw(samples + NO_LIMITS, generator)
        fisher = draws.variance
        chunk = int(torch.randint(objective.chunks, (), generator=generator))
        losses = objective.losses([groups.targets(counts) for counts in draws.counts[:samples]], [chunk]).mean(1)
        predicted = groups.predicted(draws.counts)
        free = gradient_samples(draws.scores[samples:], predicted[samples:]).mean(0)
        control = Control(history.alpha, predicted[:samples], free)
        if update >= pilot:
            for baseline, used in itertools.product(Baseline, (None, control)):
                level = history.level(used) if baseline is Baseline.MOVING_AVERAGE else None
                gradient = gradient_samples(draws.scores[:samples], losses, level, used).mean(0)
                found.setdefault((baseline, used is not None), []).append(gradient)
        history.add(losses, predicted[:samples])
    return {kind: torch.stack(gradients) for kind, gradients in found.items()}, fisher


def spreads(gradients: Mapping[tuple[Baseline, bool], Tensor], fisher: Tensor) -> dict[Estimator, Spread]:
    """The noise of every estimator, from (updates, stacks) of each."""
    # The norm of natural gradients g / F is sum F (g / F)² = sum g² / F; F as the step divides by it.
    weights = {False: torch.ones_like(fisher), True: 1 / fisher.clamp_min(0.25)}
    variance = {
        Estimator(*kind, natural): float((made.var(0) * weight).sum())
        for kind, made in gradients.items()
        for natural, weight in weights.items()
    }
    found: dict[Estimator, Spread] = {}
    for natural, weight in weights.items():
        group = [estimator for estimator in variance if estimator.natural == natural]
        quiet = min(group, key=variance.__getitem__)
        made = gradients[quiet.baseline, quiet.control_variate]
        # The square of a mean is too large by the variance of the mean.
        signal = float((made.mean(0) ** 2 * weight).sum()) - variance[quiet] / len(made)
        plain = variance[Estimator(Baseline.MOVING_AVERAGE, False, natural)]
        for estimator in group:
            of = variance[estimator]
            found[estimator] = Spread(of, of / plain if plain > 0 else 1.0, of / signal if signal > 0 else None)
    return found


def measure(options: argparse.Namespace) -> list[Cell]:
    """All cells, in the order of seeds and estimators; the losses are in the journal of the seed's analysis."""
    made: list[Cell] = []
    for seed in options.seeds:
        plan = BERNOULLI.plan(SearchOptions(budget=options.budget, pattern=options.pattern, seed=seed))
        session = cells.set_up(options, seed)
        folder: Path = options.out / f"seed{seed}"
        analysed = cells.analysed(session, plan, folder / "analysis", cells.cache_of(options))
        problem = analysed.problem(plan)
        with analysed.objective(plan, problem) as objective:
            gradients, fisher = estimates(problem, objective, options.updates, options.pilot, options.samples)
            tokens = objective.tokens
        found = spreads(gradients, fisher)
        made += [Cell(seed, estimator, found[estimator], tokens) for estimator in ESTIMATORS]
        cells.err.print(f"seed {seed}  {formats.compact(tokens)} tokens", highlight=False)
    return made


def table(made: Sequence[Cell], updates: int, samples: int) -> Stack:
    """Means over the seeds."""
    rows = report_table("Noise of a gradient at the start")
    for header in ("baseline", "control variate", "natural"):
        rows.add_column(header)
    add_numbers(rows, ("variance", "relative", "noise / signal"))
    for estimator in ESTIMATORS:
        found = [cell.spread for cell in made if cell.estimator == estimator]
        noise = cells.mean([spread.noise for spread in found])
        rows.add_row(
            estimator.baseline,
            "yes" if estimator.control_variate else "no",
            "yes" if estimator.natural else "no",
            formats.scientific(sum(spread.variance for spread in found) / len(found)),
            cells.shown(cells.mean([spread.relative for spread in found])),
            "-" if noise is None else formats.significant(noise),
        )
    return footed(
        rows,
        f"means over {len({cell.seed for cell in made})} seeds; {updates} updates of {samples} samples each, the same "
        f"for all; {formats.compact(made[0].tokens)} tokens",
        "relative: to the moving average without control variate, seed by seed; a natural one in the norm of its step",
        "noise / signal: variance over the square of the mean gradient; -: a seed's mean is not told from zero",
    )


def work(options: argparse.Namespace, command: str) -> None:
    if options.updates < 2 or options.samples < 2 or options.pilot < 1:
        raise UsageError("--updates and --samples must be at least 2, and --pilot at least 1.")
    made = measure(options)
    records = [cell.record() for cell in made]
    write_json(options.out / "estimators.json", {"command": command, "budget": options.budget, "cells": records})
    cells.console().print(table(made, options.updates, options.samples))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cells.option_parser(__doc__)
    parser.add_argument("--budget", type=float, default=0.3, help="fraction kept (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=64, help="estimates per estimator (%(default)s)")
    parser.add_argument("--pilot", type=int, default=4, help="updates before them (%(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="per update (%(default)s)")
    parser.add_argument("--pattern", default="unstructured", help="unstructured, or KEEP:OF such as 2:4")
    return cells.run_script(work, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
