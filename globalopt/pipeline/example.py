"""Make small sessions and plans for the examples of this package: a random Llama and a made-up text.

Every job runs on them within a second; their losses are those of random weights and of no use.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from allocators import Uniform
from globalopt.budgets import budget_file
from globalopt.budgets.budget_file import BudgetFile
from globalopt.pipeline.live import live_session
from globalopt.pipeline.options import RefineOptions, SearchOptions, TextOptions
from globalopt.pipeline.plan import RefinementPlan, SearchPlan, resolve, resolve_refinement
from globalopt.pipeline.reporter import Reporter
from globalopt.pipeline.session import Session
from globalopt.reference.tiny import tiny_llama
from globalopt.values.budget import Budget, Target
from globalopt.values.error_unit import ErrorUnit
from globalopt.values.problem import Problem
from globalopt.values.surface import ErrorSurface
from reports import QuietProgress
from solvers import get_solver

CHARACTERS = " abcdefghijklmnopqrstuvwxyz.,"
"""The tokens, one character each, of `example_tokenizer`."""


def example_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per character, all within the vocabulary of `tiny_llama`.

    >>> example_tokenizer()("a cab").input_ids
    [2, 1, 4, 2, 3]
    """
    vocabulary = {"?": 0, **{character: i for i, character in enumerate(CHARACTERS, 1)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


def example_text() -> list[str]:
    """Make documents of 4 to 9 words that differ from each other, about 1200 characters in all.

    >>> example_text()[0]
    'rank weight layer budget.'
    """
    words = ("rank", "weight", "layer", "budget", "gram", "loss", "sparse", "factor", "token", "block", "sum")
    return [" ".join(words[(i * j + j) % len(words)] for j in range(4 + i % 6)) + "." for i in range(30)]


def example_session(windows: int = 4) -> Session:
    """Set up a session of `tiny_llama`, with 14 layers of together 4352 weights.

    Args:
        windows: windows of calibration, of 16 tokens each.

    >>> session = example_session()
    >>> len(session.layers.specs), tuple(session.splits.calibration.windows.shape)
    (14, (4, 16))
    """
    texts = TextOptions(nsamples=windows, seqlen=16, eval_windows=2)
    return live_session(
        tiny_llama(),
        example_tokenizer(),
        example_text(),
        None,
        texts,
        seed=0,
        reporter=example_reporter(),
        allow_low_coverage=True,
    )


def example_reporter() -> Reporter:
    """Make a reporter that shows nothing.

    >>> example_reporter().note("not shown")
    """
    return Reporter(QuietProgress())


def example_plan(budget: float = 0.5, refining: RefineOptions | None = None, **options: Any) -> SearchPlan:
    """Resolve the plan of a quick search: uniform allocation, solved by Wanda, without matching.

    Args:
        budget: fraction kept.
        refining: how the layers are refined; None is without matching.
        options: fields of `SearchOptions` in place of these.

    >>> plan = example_plan(0.3)
    >>> plan.rule.kept, plan.allocator.name, plan.refinement.solver.name
    (0.3, 'uniform', 'wanda')
    """
    return resolve(SearchOptions(budget, **{"allocator": "uniform", "solver": "wanda", **options}), refining)


def example_refinement(solver: str = "wanda") -> RefinementPlan:
    """Resolve the plan of a refinement by a named solver, without matching.

    >>> example_refinement("sparsegpt").matching is None
    True
    """
    return resolve_refinement(RefineOptions(), get_solver(solver), fisher=True, seed=0)


def example_budget(session: Session, kept: float = 0.5) -> BudgetFile:
    """Make a budget file that keeps the same fraction of every layer of a session's model, as nonzeros alone.

    >>> example_budget(example_session()).limit
    2176
    """
    specs, coverage = session.layers.specs, session.layers.coverage
    # Between dropping a layer and keeping it whole, the predicted error of these surfaces is linear.
    surfaces = tuple(ErrorSurface(spec, (Target.zero(), Target.dense(spec)), (1.0, 0.0)) for spec in specs)
    problem = Problem(surfaces, Budget.fraction(kept, specs))
    allocation = Uniform(rank_share=0.0).allocate(problem)
    unit = ErrorUnit.OUTPUT_ERROR
    return budget_file.make(
        allocation, problem, session.fingerprint, coverage.covered, coverage.block_params, kept, unit
    )
