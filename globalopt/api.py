"""Search and compress a model that is in memory, from Python: `globalopt.search`, `globalopt.compress`."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from globalopt.budgets import budget_file
from globalopt.budgets.budget_file import BudgetFile
from globalopt.budgets.serving_limits import get_profile
from globalopt.errors import UsageError
from globalopt.evaluation.samples import PROMPTS
from globalopt.models.loading import load_model
from globalopt.pipeline.compress import compress as run_compress
from globalopt.pipeline.direct import plan_direct
from globalopt.pipeline.effort import get_effort
from globalopt.pipeline.live import Documents, live_session
from globalopt.pipeline.options import SENSITIVITIES, RefineOptions, SearchOptions, TextOptions, check_word, unit_of
from globalopt.pipeline.plan import resolve, resolve_refinement
from globalopt.pipeline.reporter import Reporter
from globalopt.pipeline.search import search as run_search
from globalopt.pipeline.session import Session
from globalopt.protocols import Allocator, Progress, Solver
from globalopt.runs.cache import Cache
from globalopt.runs.folder import Run
from globalopt.values.decomposition import Decomposition
from globalopt.values.problem import Allocation
from globalopt.values.results import Summary
from reports import make_progress, render
from solvers import get_solver

MATCH_BLOCKS = RefineOptions(match="block")
"""Refinement with block matching, the default."""


@dataclass(frozen=True, eq=False)
class Compressed:
    """Hold a compressed model, its layers, its budget and its evaluation.

    Args:
        model: an ordinary model whose weights are the dense sums of the parts, in the type and on the device of the
            dense model.
        layers: sparse part and factors of every compressed layer, by name, as saved.
        budget: the targets of all layers; `compress` accepts it, and `budget_file.write` saves it.
        summary: perplexities, KL divergences, and errors and costs of layers.
        folder: the run folder, which every command reads; None if `out` was not given.

    >>> from globalopt.pipeline.example import example_text, example_tokenizer
    >>> from globalopt.reference.tiny import tiny_llama
    >>> sizes = {"nsamples": 4, "seqlen": 16, "eval_windows": 2, "progress": False}
    >>> method = {"solver": "wanda", "allocator": "uniform", "refining": RefineOptions()}
    >>> found = search(tiny_llama(), example_tokenizer(), example_text(), budget=0.25, **method, **sizes)
    >>> sum(layer.nnz for layer in found.layers.values()), found.allocation.used
    (1088, 1088)
    """

    model: PreTrainedModel
    layers: Mapping[str, Decomposition]
    budget: BudgetFile
    summary: Summary
    folder: Path | None

    @property
    def allocation(self) -> Allocation:
        """Return the target of every layer."""
        return self.budget.allocation

    def show(self, verbose: bool = False) -> None:
        """Print the tables that the commands print after a run."""
        render(self.summary, Console(), verbose)


def search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Documents,
    budget: float = 0.5,
    *,
    eval_text: Documents | None = None,
    text_column: str | None = None,
    prompts: str | Path | None = None,
    allocator: str | Allocator | None = None,
    allocator_options: Mapping[str, Any] | None = None,
    solver: str = "3basil",
    solver_options: Mapping[str, Any] | None = None,
    accounting: str | None = None,
    storage: str = "16",
    embeddings: str | None = None,
    pattern: str | None = None,
    serving_profile: str = "dense",
    rank_multiple: int | None = None,
    max_rank: int | None = None,
    sensitivity: str = "fisher",
    effort: str = "default",
    search_tokens: int | None = None,
    correct: bool = True,
    refining: RefineOptions | None = None,
    nsamples: int | None = None,
    seqlen: int = 256,
    eval_windows: int | None = None,
    batch_size: int = 8,
    bos: str = "auto",
    samples: int = PROMPTS,
    evaluate: bool = True,
    seed: int = 0,
    out: str | Path | None = None,
    fresh: bool = False,
    cache: bool | str | Path = True,
    progress: bool | Progress = True,
) -> Compressed:
    """Search an allocation for a copy of `model`, and compress the copy to it, as `globalopt search` does.

    Args:
        model: a causal language model of transformers, on one device; it is not changed.
        text: text of calibration and search: documents as strings, or what `--calibration` takes: the name of a file, a
            folder or a hub data set, "self" for text that the model writes, "reference", or a mixture of these such as
            "my-text.txt:0.7,self:0.3".
        budget: fraction kept of the compressible layers, in (0, 1].
        eval_text: the test split; without it a part of `text` is held out.
        text_column: column of the text or of its messages, where the text is a table.
        prompts: file of prompts that the model goes on with where it writes its own text.
        allocator: a name, with `allocator_options`; None is that of `effort`; or an object of your own: a frozen
            dataclass, whose fields and source are recorded so that runs can be told apart.
        solver: a name, with `solver_options`.
        accounting, storage, embeddings, pattern, serving_profile, rank_multiple, max_rank, sensitivity, effort,
            search_tokens, correct, nsamples, seqlen, eval_windows, batch_size, bos, samples, seed: as the options of
            `globalopt search`.
        evaluate: False leaves the evaluation and the samples out.
        refining: how layers are refined and matched; None matches blocks, `RefineOptions()` nothing.
        out: run folder, in which an interrupted run is continued; without it nothing stays on the disk.
        fresh: delete an earlier run in `out`.
        cache: artefacts that runs share: True is a folder beside `out`, False shares nothing, a path is a folder.
        progress: True shows progress on stderr, False shows nothing; or a display of your own.
    Raises:
        GlobalOptError: one of its subclasses, whose message says what was wrong and what to do.

    >>> from globalopt.pipeline.example import example_text, example_tokenizer
    >>> from globalopt.reference.tiny import tiny_llama
    >>> sizes = {"nsamples": 4, "seqlen": 16, "eval_windows": 2, "progress": False}
    >>> method = {"solver": "sparsegpt", "allocator": "knapsack", "refining": RefineOptions()}
    >>> found = search(tiny_llama(), example_tokenizer(), example_text(), budget=0.5, **method, **sizes)
    >>> found.summary.used / found.summary.total, found.summary.solver
    (0.5, 'sparsegpt')
    >>> found.model.generate(**example_tokenizer()("a", return_tensors="pt"), max_new_tokens=3).shape
    torch.Size([1, 4])
    """
    level = get_effort(effort)
    chosen = level.allocator if allocator is None else allocator
    own = None if isinstance(chosen, str) else chosen
    options = SearchOptions(
        budget=budget,
        accounting=unit_of(accounting, storage, embeddings),
        storage=storage,
        embeddings=embeddings,
        **get_profile(serving_profile).choices(pattern),
        serving_profile=serving_profile,
        rank_multiple=rank_multiple,
        max_rank=max_rank,
        allocator=chosen if isinstance(chosen, str) else chosen.name,
        allocator_options=_texts(allocator_options),
        solver=solver,
        solver_options=level.solver_options(solver, _texts(solver_options)),
        sensitivity=sensitivity,
        seed=seed,
        search_tokens=level.search_tokens if search_tokens is None else search_tokens,
        correct=correct,
        probe_steps=level.probe_steps,
    )
    if refining is None:
        refining = RefineOptions(match="block", match_options=level.match_options("block", {}))
    plan = resolve(options, refining, own)
    texts = TextOptions(
        nsamples=level.nsamples if nsamples is None else nsamples,
        seqlen=seqlen,
        eval_windows=level.eval_windows if eval_windows is None else eval_windows,
        batch_size=batch_size,
        bos=bos,
        samples=samples,
        text_column=text_column,
        prompts=None if prompts is None else str(prompts),
        evaluate=evaluate,
    )
    reporter = Reporter(_progress(progress))
    with _folder(out) as folder:
        shared = _cache(folder, cache)
        session = live_session(model, tokenizer, text, eval_text, texts, seed, reporter, cache=shared)
        found = run_search(session, reporter, plan, folder, "globalopt.search", shared, fresh)
        return _compressed(session, *found, out)


def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Documents,
    budget: BudgetFile | float | str | Path,
    *,
    eval_text: Documents | None = None,
    text_column: str | None = None,
    prompts: str | Path | None = None,
    allocator: str | Allocator | None = None,
    allocator_options: Mapping[str, Any] | None = None,
    rank_share: float | None = None,
    pattern: str | None = None,
    accounting: str | None = None,
    storage: str | None = None,
    embeddings: str | None = None,
    solver: str | Solver = "3basil",
    solver_options: Mapping[str, Any] | None = None,
    sensitivity: str = "fisher",
    refining: RefineOptions | None = None,
    nsamples: int = 128,
    seqlen: int = 256,
    eval_windows: int = 128,
    batch_size: int = 8,
    bos: str = "auto",
    samples: int = PROMPTS,
    evaluate: bool = True,
    seed: int = 0,
    out: str | Path | None = None,
    fresh: bool = False,
    cache: bool | str | Path = True,
    progress: bool | Progress = True,
) -> Compressed:
    """Compress a copy of `model` to a fraction kept or to an existing budget, as `globalopt compress` does.

    Args:
        budget: fraction kept of the compressible layers, in (0, 1]; or the path of a budget file; or
            `Compressed.budget` as `search` returns it.
        allocator, allocator_options, rank_share, pattern, accounting, storage, embeddings: how a fraction is divided;
            see `plan_direct`. They are refused with a budget file.
        refining: how layers are refined and matched; None matches nothing for a fraction, and blocks for a budget file.
        solver: a name, with `solver_options`, or an object of your own: a frozen dataclass, whose fields and source
            are recorded so that runs can be told apart.
        model, tokenizer, text, eval_text, text_column, prompts, sensitivity, nsamples, seqlen, eval_windows,
            batch_size, bos, samples, evaluate, seed, out, fresh, cache, progress: as in `search`.
    Raises:
        GlobalOptError: one of its subclasses, whose message says what was wrong and what to do.

    >>> from globalopt.pipeline.example import example_text, example_tokenizer
    >>> from globalopt.reference.tiny import tiny_llama
    >>> model, tokenizer, text = tiny_llama(), example_tokenizer(), example_text()
    >>> sizes = {"nsamples": 4, "seqlen": 16, "eval_windows": 2, "progress": False}
    >>> method = {"solver": "wanda", "refining": RefineOptions()}
    >>> first = search(model, tokenizer, text, budget=0.5, allocator="uniform", **method, **sizes)
    >>> again = compress(model, tokenizer, text, first.budget, **method, **sizes)
    >>> again.summary.used == first.summary.used
    True
    >>> found = compress(model, tokenizer, text, budget=0.5, solver="wanda", **sizes)
    >>> [stage.name for stage in found.summary.stages]
    ['load', 'allocate', 'refine', 'save', 'evaluate', 'samples']
    """
    check_word("sensitivity", sensitivity, SENSITIVITIES)
    options = _texts(solver_options)
    chosen = get_solver(solver, options) if isinstance(solver, str) else solver
    texts = TextOptions(
        text_column=text_column,
        nsamples=nsamples,
        seqlen=seqlen,
        eval_windows=eval_windows,
        batch_size=batch_size,
        bos=bos,
        samples=samples,
        prompts=None if prompts is None else str(prompts),
        evaluate=evaluate,
    )
    reporter = Reporter(_progress(progress))
    if isinstance(budget, int | float):
        direct = plan_direct(
            budget,
            chosen,
            options,
            allocator or "uniform",
            _texts(allocator_options),
            rank_share,
            pattern or "unstructured",
            unit_of(accounting, storage or "16", embeddings),
            sensitivity,
            refining,
            seed,
            storage or "16",
            embeddings,
        )
        with _folder(out) as folder:
            shared = _cache(folder, cache)
            session = live_session(model, tokenizer, text, eval_text, texts, seed, reporter, cache=shared)
            found = run_search(session, reporter, direct, folder, "globalopt.compress", shared, fresh)
            return _compressed(session, *found, out)
    divided = {
        "allocator": allocator,
        "allocator_options": allocator_options,
        "rank_share": rank_share,
        "pattern": pattern,
        "accounting": accounting,
        "storage": storage,
        "embeddings": embeddings,
    }
    if given := [name for name, value in divided.items() if value is not None]:
        raise UsageError(f"{given[0]} divides a fraction kept; the layers of a budget file have their targets.")
    source = Path(budget) if isinstance(budget, str | Path) else Path("the budget given")
    file = budget if isinstance(budget, BudgetFile) else budget_file.read(source)
    plan = resolve_refinement(refining or MATCH_BLOCKS, chosen, fisher=sensitivity != "none", seed=seed)
    with _folder(out) as folder:
        shared = _cache(folder, cache)
        session = live_session(model, tokenizer, text, eval_text, texts, seed, reporter, cache=shared)
        found = run_compress(session, reporter, plan, source, file, folder, "globalopt.compress", shared, fresh)
        return _compressed(session, *found, out)


def _cache(folder: Path, wanted: bool | str | Path) -> Cache | None:
    """Open the artefact cache: beside the run folder or in a given one; None is a folder of the run."""
    if isinstance(wanted, bool):
        return Cache.beside(folder) if wanted else None
    return Cache(Path(wanted))


def _texts(options: Mapping[str, Any] | None) -> dict[str, str]:
    """Convert option values to text, as the command line gives them to solvers and allocators."""
    return {name: str(value) for name, value in (options or {}).items()}


def _progress(wanted: bool | Progress) -> Progress:
    """Return the display: on stderr, none, or the caller's."""
    if isinstance(wanted, bool):
        return make_progress(Console(stderr=True), quiet=not wanted)
    return wanted


@contextlib.contextmanager
def _folder(out: str | Path | None) -> Iterator[Path]:
    """Yield the run folder, or a temporary one."""
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="globalopt-") as folder:
        yield Path(folder) / "run"


def _compressed(session: Session, summary: Summary, run: Run, out: str | Path | None) -> Compressed:
    """Load the results of a finished run into memory."""
    stored = str(session.loaded.checkpoint_dtype).removeprefix("torch.")
    model = load_model(run.model_folder, stored, str(session.loaded.device), lazily=False).model
    model.config.name_or_path = session.name if out is None else str(run.model_folder)
    model.config.use_cache = True
    layers = {spec.name: run.layer(spec) for spec in session.layers.specs}
    file = budget_file.read(run.budget_path)
    return Compressed(model, layers, file, summary, None if out is None else run.folder)
