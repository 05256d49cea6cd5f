"""A study of the coefficients of a warp, kept by Optuna. Imported where it is run: Optuna takes 25 MiB."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import optuna
import torch
from optuna.distributions import FloatDistribution
from optuna.samplers import GPSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial
from torch import Tensor

from allocators._trials import Trials, t_statistic
from allocators._warp import Sampler, Warp
from allocators.knapsack import relaxed_knapsack
from globalopt.errors import ArtefactError
from globalopt.values.budget import Target
from globalopt.values.option_table import OptionTable
from globalopt.values.problem import Problem
from globalopt.values.sizes import Floats, Sizes

Theta = tuple[float, ...]
Told = list[tuple[Theta, float]]

STAGES = (1 / 8, 1 / 4, 1 / 2, 1.0)
"""Parts of the selection text after which a trial may be pruned."""

PRUNE = 2.0
"""Paired t against the best trial so far above which a trial is pruned: one in 44 that are as good falls to a test."""


def nearest(table: OptionTable, warp: Warp, sizes: Sizes) -> Theta:
    """Estimate the coefficients under which targets are closest to a solution of the knapsack.

    In a solution the slope `-d error' / d cost` is the same for every layer: `features theta + constant = -log slope`,
    solved by least squares over the layers. Layers whose slope is not positive are left out.
    """
    slopes = _slopes(table, sizes)
    rising = slopes > 0
    if not rising.any():
        return (0.0,) * len(warp.names)
    share = table.shares(*sizes.arrays)
    rows = np.column_stack([warp.features(table.specs), share, np.ones(len(share))])[rising]
    solution = np.linalg.lstsq(rows, -np.log(slopes[rising]), rcond=None)[0]
    return tuple(solution[:-1].tolist())


def _slopes(table: OptionTable, sizes: Sizes) -> Floats:
    """Mean falls of the errors per unit of cost, from a tenth less to a tenth more of the free axis."""
    ranks = table.axis == "rank"
    here, top = (sizes.rank, table.most_rank[sizes.place]) if ranks else (sizes.nnz, table.numel[sizes.place])
    less = np.floor(0.9 * here).astype(np.int64)
    more = np.minimum(top, np.ceil(1.1 * here).astype(np.int64) + 1)
    ends = [(end, sizes.nnz) if ranks else (sizes.rank, end) for end in (less, more)]
    costs, errors = ([of(sizes.place, *end) for end in ends] for of in (table.costs, table.predict))
    cost = costs[1] - costs[0]
    return np.where(cost > 0, (errors[0] - errors[1]) / np.where(cost > 0, cost, 1), 0.0)


class WarpStudy:
    """One worker's part in a study; `sampler`, `size` (trials in the end) and the other options as in `OptunaWarp`."""

    def __init__(
        self,
        problem: Problem,
        trials: Trials,
        starts: Sequence[Mapping[str, Target]],
        sampler: Sampler,
        size: int,
        spread: float,
        worker: int,
        path: str = "",
    ) -> None:
        self.sampler = sampler
        self.size = size
        self.spread = spread
        self.worker = worker
        self.problem = problem
        self.trials = trials
        self.warp = Warp.of(problem.table.specs)
        self.space = {name: FloatDistribution(-spread, spread) for name in self.warp.names}
        self.path = path
        self.study = _open(path)
        self._solved: dict[Theta, dict[str, Target]] = {}
        self.knapsack = trials.judge([starts[0]])[0]
        near = [nearest(problem.table, self.warp, problem.table.sizes(start)) for start in starts[1:]]
        clipped = np.clip(near, -spread, spread)
        self.warm: list[Theta] = [(0.0,) * len(self.warp.names), *(tuple(theta.tolist()) for theta in clipped)]
        self._told = optuna.create_study()

    def run(self) -> None:
        """Add trials until the study holds enough of them; `OutOfTokens` where the tokens do not suffice."""
        self._evaluate_again()
        while len(told := self._finished()) < self.size:
            self._evaluate(self._propose([(self._theta(trial), trial.value or 0.0) for trial in told]))

    def improvements(self) -> Iterator[dict[str, Target]]:
        """Return the targets of every completed trial that was the best of the study so far."""
        least = math.inf
        for trial in self._finished():
            if trial.state is TrialState.COMPLETE and trial.value is not None and trial.value < least:
                least = trial.value
                yield self._targets(self._theta(trial))

    def _finished(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))

    def _theta(self, trial: FrozenTrial) -> Theta:
        if trial.distributions != self.space:
            raise ArtefactError(
                f"The study {self.path} searches other coefficients or another spread than this "
                "search; delete it, or set the spread it was made with."
            )
        return tuple(trial.params[name] for name in self.warp.names)

    def _targets(self, theta: Theta) -> dict[str, Target]:
        if theta not in self._solved:
            table = self.problem.table
            self._solved[theta] = table.targets(relaxed_knapsack(self.warp.apply(table, theta)))
        return self._solved[theta]

    def _evaluate_again(self) -> None:
        """Evaluate this worker's earlier trials again, so that the objective counts their tokens as it did then."""
        for trial in self._finished():
            if trial.user_attrs["worker"] == self.worker:
                theta = self._theta(trial)
                seen = 0
                for count in self._stages:
                    if count <= trial.user_attrs["chunks"]:
                        self.trials.objective.losses([self._targets(theta)], range(seen, count))
                        seen = count

    def _best(self) -> Tensor:
        """Compute (windows,) losses of the best completed trial so far, of any worker, or of the knapsack."""
        completed = [trial for trial in self._finished() if trial.state is TrialState.COMPLETE]
        best = min(completed, key=lambda trial: trial.value or 0.0, default=None)
        if best is None or (best.value or 0.0) >= float(self.knapsack.mean()):
            return self.knapsack
        # The losses of this worker's own trials are known already; those of another's cost tokens.
        known = best.user_attrs["worker"] == self.worker
        evaluator = self.trials.objective if known else self.trials
        return evaluator.losses([self._targets(self._theta(best))], self.trials.all_chunks)[0]

    @property
    def _stages(self) -> list[int]:
        """Numbers of chunks after which a trial may be pruned, and all of them."""
        return sorted({math.ceil(stage * len(self.trials.all_chunks)) for stage in STAGES})

    def _evaluate(self, theta: Theta) -> None:
        """Evaluate `theta` until it is pruned or known on all chunks, and add the trial to the study."""
        best, candidate = self._best(), self._targets(theta)
        losses, seen = torch.empty(0, dtype=torch.float64), 0
        for count in self._stages:
            losses = torch.cat((losses, self.trials.losses([candidate], range(seen, count))[0]))
            seen = count
            if t_statistic(losses - best[: len(losses)]) > PRUNE:
                break
        self.study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if seen == self._stages[-1] else TrialState.PRUNED,
                value=float(self.knapsack.mean() + (losses - self.knapsack[: len(losses)]).mean()),
                params=dict(zip(self.warp.names, theta, strict=True)),
                distributions=dict(self.space),
                user_attrs={"worker": self.worker, "chunks": seen},
            )
        )

    def _propose(self, told: Told) -> Theta:
        untold = [theta for theta in self.warm if theta not in dict(told)]
        if untold:
            return untold[self.worker % len(untold)]
        seed = random.Random(f"{self.problem.seed} {self.worker} {len(told)}").getrandbits(31)
        if self.sampler is Sampler.CMAES:
            return _cmaes(told, self.spread, seed)
        # Told as completed: the value of a pruned trial estimates the same mean, but the GP ignores pruned trials.
        known = len(self._told.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
        for theta, value in told[known:]:
            params = dict(zip(self.warp.names, theta, strict=True))
            self._told.add_trial(create_trial(value=value, params=params, distributions=dict(self.space)))
        self._told.sampler = TPESampler(seed=seed) if self.sampler is Sampler.TPE else GPSampler(seed=seed)
        asked = self._told.ask(dict(self.space))
        self._told.tell(asked, state=TrialState.FAIL)
        return tuple(asked.params[name] for name in self.warp.names)


def _cmaes(told: Told, spread: float, seed: int) -> Theta:
    """CMA-ES' next proposal, its state made anew from all full generations (Optuna's keeps a pickle in the study)."""
    import cmaes  # half a second, which the command line need not pay

    size = len(told[0][0])
    optimizer = cmaes.CMA(
        mean=np.zeros(size), sigma=spread / 3, bounds=np.tile([-spread, spread], (size, 1)), seed=seed
    )
    generation = optimizer.population_size
    for start in range(0, len(told) - generation + 1, generation):
        optimizer.tell([(np.array(theta), value) for theta, value in told[start : start + generation]])
    return tuple(optimizer.ask().tolist())


def _open(path: str) -> optuna.Study:
    """Return the study in the journal at `path`, made if it is not there; in memory where that is empty."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if not path:
        return optuna.create_study(study_name="warp")
    try:
        # The lock is a symbolic link to the journal: by a relative path Optuna would not find out how old it is.
        storage = JournalStorage(JournalFileBackend(str(Path(path).absolute())))
        return optuna.create_study(storage=storage, study_name="warp", load_if_exists=True)
    except (OSError, ValueError, KeyError) as cause:
        raise ArtefactError(f"{path} is no journal of a study ({cause}). Set option study to another file.") from None
