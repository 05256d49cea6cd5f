"""Compare several runs in terminal tables: their metrics, paired differences to the first, and reasons against it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group as Stack
from rich.text import Text

from globalopt.errors import UsageError
from globalopt.values.metrics import Metrics, WindowLosses
from globalopt.values.results import Summary
from reports import formats
from reports.paired import CONFIDENCE, Difference, Interval, Measured, difference, incomparable
from reports.quality_tables import divergence, perplexity
from reports.shaded_grid import WIDTH
from reports.table_style import GAP, add_numbers, footed, report_table

TOKENS_NOTE = "tokens: forward tokens that the search spent"


def comparison(
    summaries: Sequence[Summary],
    labels: Sequence[str] = (),
    split: str | None = None,
    sign: str = "±",
    losses: Sequence[tuple[WindowLosses, ...]] = (),
) -> Stack:
    """Make a table of runs, one per row, and one of their differences to the first run, with confidence intervals.

    The columns are budget, allocator, solver, seed, used, KL, perplexity and its change against the dense model, and
    the forward tokens of searches on the true loss.

    Args:
        summaries: at least one.
        labels: names of the runs; 1, 2, ... without.
        split: of the metrics; without, "test" where every run has it, else the last split of the first run.
        sign: put before every standard error.
        losses: losses of the windows of each run, empty where they are not known; without, of none.
    Raises:
        UsageError: no run is given, or not one label per run.

    >>> from rich.console import Console
    >>> from reports.example import example_losses, example_summary
    >>> runs = [example_summary(), example_summary(allocator="uniform")]
    >>> losses = [example_losses(runs[0]), example_losses(runs[1], worse=0.01)]
    >>> Console(width=80, color_system=None).print(comparison(runs, ["found", "even"], losses=losses))
    Comparison on test
    run    allocator   used                KL  perplexity  change
    ─────────────────────────────────────────────────────────────
    found  knapsack   0.457  0.00302 ±0.00008   62.4 ±0.8  +0.4 %
    even   uniform    0.457  0.00302 ±0.00008   62.4 ±0.8  +0.4 %
    ...
    """
    if not summaries:
        raise UsageError("There is no run to compare; name at least one.")
    names = list(labels) or [str(i) for i in range(1, len(summaries) + 1)]
    if len(names) != len(summaries):
        raise UsageError(f"{len(names)} labels were given for {len(summaries)} runs; give one each.")
    split = split or common_split(summaries)
    runs = measured_runs(summaries, names, losses)
    table = _rows(runs, split, sign)
    reasons = incomparable(runs, split)
    verdict = [Text("Not comparable", "bold red"), *(Text(f"  {reason}", "red") for reason in reasons)]
    apart = difference_table(differences_to_first(summaries, names, losses))
    return Stack(table, *(verdict if reasons else ()), *([Text(), apart] if apart is not None else ()))


def measured_runs(
    summaries: Sequence[Summary], labels: Sequence[str], losses: Sequence[tuple[WindowLosses, ...]] = ()
) -> list[Measured]:
    """Join each run with its label and the losses of its windows; without `losses`, with none.

    >>> from reports.example import example_summary
    >>> [run.label for run in measured_runs([example_summary(), example_summary()], ["a", "b"])]
    ['a', 'b']
    """
    known = list(losses) or [()] * len(summaries)
    return [Measured(*run) for run in zip(labels, summaries, known, strict=True)]


def differences_to_first(
    summaries: Sequence[Summary], labels: Sequence[str], losses: Sequence[tuple[WindowLosses, ...]] = ()
) -> list[Difference]:
    """Compare every run but the first with the first, on every split of the first.

    >>> from reports.example import example_losses, example_summary
    >>> runs = [example_summary(), example_summary()]
    >>> losses = [example_losses(runs[0]), example_losses(runs[1], worse=0.01)]
    >>> [(one.split, one.verdict) for one in differences_to_first(runs, ["found", "even"], losses)]
    [('validation', 'worse'), ('test', 'worse')]
    """
    first, *others = measured_runs(summaries, labels, losses)
    splits = [metrics.split for metrics in first.summary.compressed]
    return [difference(run, first, split) for run in others for split in splits]


def difference_table(found: Sequence[Difference]) -> Stack | None:
    """Make the table of differences with their intervals, and reasons where there are none; None for no difference.

    >>> from rich.console import Console
    >>> from reports.example import example_losses, example_summary
    >>> runs = [example_summary(), example_summary()]
    >>> losses = [example_losses(runs[0]), example_losses(runs[1], worse=0.01)]
    >>> found = differences_to_first(runs, ["found", "even"], losses)
    >>> Console(width=80, color_system=None).print(difference_table(found[-1:]))
    Against found (95 % confidence intervals)
    run   split           KL to dense        perplexity  by KL
    ──────────────────────────────────────────────────────────
    even  test               +0.00997          +1.002 %  worse
                 [+0.00980, +0.01014]  [+0.985, +1.019]
    KL: difference in nats per token; perplexity: change; each interval by itself
    """
    if not found:
        return None
    shown = [one for one in found if not one.reasons]
    lines = not_compared(found)
    against = f"Against {found[0].against}"
    if not shown:
        return Stack(Text(against, "bold"), *(Text(f"  {line}", "red") for line in lines))
    table = report_table(f"{against} ({CONFIDENCE:.0%} confidence intervals)".replace("%", " %"))
    table.add_column("run", overflow="fold")
    table.add_column("split")
    add_numbers(table, ("KL to dense", "perplexity"))
    table.add_column("by KL")
    for one in shown:
        kl = "-" if one.kl is None else _interval(one.kl)
        perplexity = "-" if one.perplexity is None else _interval(one.perplexity, 100, " %")
        table.add_row(Text(one.run), Text(one.split), Text(kl), Text(perplexity), _verdict(one))
    lines.append("KL: difference in nats per token; perplexity: change; each interval by itself")
    return footed(table, *lines, *not_paired(shown))


def not_compared(found: Sequence[Difference]) -> list[str]:
    """Write a line for every run that does not compare, with the reasons.

    >>> not_compared([Difference("b", "a", "test", None, None, 0, False, ("accounting differs",))])
    ['b: not compared, accounting differs']
    """
    return list(dict.fromkeys(f"{one.run}: not compared, {'; '.join(one.reasons)}" for one in found if one.reasons))


def not_paired(found: Sequence[Difference]) -> list[str]:
    """Write a line that names the runs whose intervals are too wide, where there are any.

    >>> not_paired([Difference("b", "a", "test", Interval(0.1, 0.0, 0.2), None, 64, False, ())])
    ['not paired by windows, so too wide: b (a windows.json is missing)']
    """
    loose = dict.fromkeys(one.run for one in found if not one.paired)
    return [f"not paired by windows, so too wide: {', '.join(loose)} (a windows.json is missing)"] if loose else []


def _interval(found: Interval, scale: float = 1.0, unit: str = "") -> str:
    """Format a difference above its interval, with the decimals that show half its width in two digits."""
    value, low, high = found.texts(scale)
    return f"{value}{unit}\n[{low}, {high}]"


def _verdict(one: Difference) -> Text:
    """Colour the verdict of a difference."""
    return Text(one.verdict, {"better": "green", "worse": "red", "undecided": "dim"}.get(one.verdict, ""))


def common_split(summaries: Sequence[Summary]) -> str:
    """Choose the split to compare on: "test" where every run has it, else the last of the first evaluated run.

    >>> from reports.example import example_summary
    >>> common_split([example_summary()])
    'test'
    """
    if all(any(metrics.split == "test" for metrics in summary.compressed) for summary in summaries):
        return "test"
    return next((s.compressed[-1].split for s in summaries if s.compressed), "test")


def _rows(runs: Sequence[Measured], split: str, sign: str) -> Stack:
    """Make the table of runs, one per row."""
    summaries = [run.summary for run in runs]
    columns = {
        "run": [run.label for run in runs],
        "budget": [f"{s.asked:g}" for s in summaries],
        "allocator": [s.allocator for s in summaries],
        "solver": [s.solver for s in summaries],
        "seed": [str(s.seed) for s in summaries],
        "used": [formats.significant(s.used / s.total) for s in summaries],
    }
    lines = ["used: of the dense size; KL to dense, nats per token; change: of perplexity"]
    if any(s.search for s in summaries):
        columns["tokens"] = [formats.compact(s.search.tokens) if s.search else "-" for s in summaries]
        lines.append(TOKENS_NOTE)
    figures = zip(*(_figures(run.metrics(split), sign) for run in runs), strict=True)
    columns |= {name: list(cells) for name, cells in zip(("KL", "perplexity", "change"), figures, strict=True)}
    # Settings that all runs share stand in a line below, which leaves their width to the metrics.
    settings = ("budget", "allocator", "solver", "seed", "tokens")
    same = [name for name in settings if name in columns and len(set(columns[name])) == 1]
    shared = {name: columns[name][0] for name in same if len(summaries) > 1}
    columns = {name: cells for name, cells in columns.items() if name not in shared}
    width = sum(max(map(len, [name, *cells])) for name, cells in columns.items()) + GAP * (len(columns) - 1)
    if width > WIDTH:
        for name in ("KL", "perplexity"):
            columns[name] = [cell.replace(f" {sign}", f"\n{sign}") for cell in columns[name]]
    table = report_table(f"Comparison on {split}", gap=GAP)
    for name in columns:
        # Names may break, numbers may not.
        if name in ("run", "allocator", "solver"):
            table.add_column(name, overflow="fold")
        else:
            add_numbers(table, [name])
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, cells))
    if shared:
        lines.insert(0, "all runs: " + ", ".join(f"{name} {value}" for name, value in shared.items()))
    return footed(table, *lines)


def _figures(pair: tuple[Metrics, Metrics] | None, sign: str) -> tuple[str, str, str]:
    """Format KL, perplexity and the change of the perplexity; "-" where the run has no metrics."""
    if pair is None:
        return "-", "-", "-"
    dense, compressed = pair
    change = formats.change(dense.perplexity, compressed.perplexity)
    return divergence(compressed, sign), perplexity(compressed, sign), change
