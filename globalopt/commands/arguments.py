"""Read the words of options: a model, a folder, NAME=VALUE pairs, a cache."""

# Heavy imports are inside the functions: `globalopt --help` must not wait for torch.
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from globalopt.commands.console import err

if TYPE_CHECKING:
    from globalopt.pipeline.effort import Effort
    from globalopt.pipeline.options import ModelOptions, RefineOptions
    from globalopt.pipeline.reporter import Reporter
    from globalopt.runs.cache import Cache


def pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    """Read NAME=VALUE pairs, separated by commas and repeated, for the registries; `UsageError` names the `option`."""
    from globalopt.errors import UsageError

    found: dict[str, str] = {}
    for text in (part for given in texts or () for part in given.split(",")):
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals and value):
            raise UsageError(f"{option} takes NAME=VALUE; got '{text}'.")
        found[name.replace("-", "_")] = value
    return found


def one_model(argument: str | None, option: str | None) -> str | None:
    """Return the one model named by MODEL or --model; `UsageError` if they name two."""
    from globalopt.errors import UsageError

    if argument and option and argument != option:
        raise UsageError(f"Two models were given: {argument} and --model {option}. Give one.")
    return named(argument or option)


def named(model: str | None) -> str | None:
    """Return the model as the pipeline names it: None for the bundled model, which reports call `reference`."""
    from globalopt.pipeline.options import REFERENCE

    return None if model == REFERENCE else model


def default_folder(models: ModelOptions, name: str) -> Path:
    """Name the run folder of a run without --out."""
    if models.model is None:
        return Path("runs") / f"reference-{name}"
    path = Path(models.model)
    # Of "." and ".." only the resolved path has a name; of a hub id only its own.
    base = path.resolve() if path.exists() else path
    file = models.gguf_file or base.name
    return Path("runs") / f"{Path(file).stem if file.lower().endswith('.gguf') else base.name}-{name}"


def refine_options(
    sequential: str,
    match: str,
    match_set: list[str] | None,
    distill_set: list[str] | None,
    effort: Effort | None = None,
) -> RefineOptions:
    """Read the options of a refinement; `UsageError` if they contradict each other.

    Args:
        effort: completes the options of block matching.
    """
    from globalopt.pipeline.options import RefineOptions

    matching, distilling = pairs(match_set, "--match-set"), pairs(distill_set, "--distill-set")
    if effort is not None:
        matching = effort.match_options(match, matching)
    return RefineOptions(sequential, match, matching, distilling)


def reporter(quiet: bool, verbose: bool = False) -> Reporter:
    """Make the reporter that shows stages on stderr.

    Args:
        verbose: whether every process of a job shows its own, else the first one alone.
    """
    from globalopt.machine import ranks
    from globalopt.pipeline.reporter import Reporter
    from reports import make_progress

    name = f"process {ranks.number()}" if verbose and ranks.several() else ""
    return Reporter(make_progress(err, quiet or not (ranks.writer() or verbose), name))


def chosen_cache(folder: Path, cache: Path | None, no_cache: bool) -> Cache | None:
    """Choose the cache of a run folder, None to share nothing; `UsageError` where both options are given."""
    from globalopt.errors import UsageError
    from globalopt.runs.cache import Cache

    if no_cache:
        if cache is not None:
            raise UsageError(f"Give --cache {cache} or --no-cache, not both.")
        return None
    return Cache(cache) if cache is not None else Cache.beside(folder)
