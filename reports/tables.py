"""The report of one run as terminal tables; every table fits 80 columns and reads the same without colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from globalopt.values.decomposition import Status
from globalopt.values.results import (
    ErrorUnit,
    Evaluation,
    LayerPlan,
    LayerResult,
    MatchResult,
    Metrics,
    Search,
    StageCost,
    Summary,
)
from reports import formats
from reports.groups import Group, by_block, by_kind
from reports.shaded_grid import kept_grid
from reports.size import size_facts
from reports.surrogate import FEWEST, Surrogate, chosen, whole

GAP = 2  # spaces between columns

# Rules below the header and above a total, no other lines.
_RULES = box.Box("    \n    \n ── \n    \n ── \n    \n    \n    \n")


def render(summary: Summary, console: Console, verbose: bool = False) -> None:
    """Print the whole report; `verbose` adds the layers one by one, the splits and the versions."""
    sign = "+-" if console.options.ascii_only else "±"
    parts: list[RenderableType] = [
        heading(summary),
        budget(summary),
        quality(summary, sign),
        *([searched(summary, summary.search)] if summary.search is not None else []),
        by_kind_table(summary),
        by_block_table(summary),
        kept_grid(summary.layers),
        *([matched(summary.matching)] if summary.matching else []),
        facts("Size", size_facts(summary)),
        stages(summary),
    ]
    if verbose:
        parts += [layer_allocation(summary), layer_results(summary), provenance(summary)]
    remarks = notes(summary)
    if remarks is not None:
        parts.append(remarks)
    for part in parts:
        console.print(Padding(part, (0, 0, 1, 0)))


def heading(summary: Summary) -> Text:
    """The command and the model, two lines."""
    model = model_name(summary.model)
    return Text.assemble(
        (summary.command, "bold"),
        "\n",
        f"{model}: {len(summary.layers)} layers, {formats.count(summary.total)} "
        f"dense {unit_name(summary.accounting)}, seed {summary.seed}",
        overflow="fold",
    )


def model_name(model: str) -> str:
    """A model as reports call it."""
    return "the bundled reference model" if model == "reference" else model


def budget(summary: Summary) -> Table:
    """Asked, limit, used, prediction, certificate and coverage, one per row."""
    return facts("Budget", budget_facts(summary))


def budget_facts(summary: Summary) -> list[tuple[str, str]]:
    """Labels and what they say about the budget."""
    unit = unit_name(summary.accounting)
    rows = [
        ("asked", f"keep {summary.asked:g} of the compressible {unit}"),
        ("limit", f"{formats.count(summary.limit)} of {formats.count(summary.total)} {unit}"),
        ("used", f"{formats.count(summary.used)} {unit}, {formats.percent(summary.used, summary.limit)} of the limit"),
        ("accounting", summary.accounting),
        ("allocator", summary.allocator),
        ("solver", summary.solver),
        *prediction("predicted loss", summary.predicted, summary.bound, f"{summary.budget_unit}, summed over layers"),
        *against_uniform(summary),
        (
            "covered",
            f"{formats.count(summary.covered)} of {formats.count(summary.block_params)} block parameters, "
            f"{formats.percent(summary.covered, summary.block_params)}",
        ),
    ]
    if summary.skipped:
        left = "; ".join(f"{name} {formats.count(params)}" for name, params in summary.skipped.items())
        rows.append(("not covered", left))
    return rows


def against_uniform(summary: Summary) -> list[tuple[str, str]]:
    """What the uniform allocation is predicted to lose and, in a search on the true loss, what candidates lose."""
    uniform, search = summary.uniform, summary.search
    if uniform is None or not summary.predicted:
        return []
    times = formats.significant(uniform.predicted / summary.predicted)
    rows = [("uniform", f"predicted {formats.significant(uniform.predicted)}, {times} times as much")]
    if search is not None and search.loss > 0 and uniform.measured is not None:
        loss, times = formats.significant(uniform.measured), formats.significant(uniform.measured / search.loss)
        rows.append(("", f"candidates lose {loss} against {formats.significant(search.loss)}, {times} times"))
    return rows


def prediction(label: str, predicted: float | None, bound: float | None, unit: str) -> list[tuple[str, str]]:
    """The predicted loss of an allocation and its certificate, as rows of facts."""
    if predicted is None:
        return [(label, "nothing: the budget was not found by a search")]
    return [(label, f"{formats.significant(predicted)} {unit}"), ("certificate", formats.certificate(predicted, bound))]


SEARCH_NOTE = (
    "first, best, chosen: mean KL to dense on the whole selection text. The best of",
    "many looks better there than it is; the quality above is on other text.",
)


def searched(summary: Summary, search: Search) -> Stack:
    """What a search on the true loss spent, asked and found, and how well the surrogate foretold it."""
    return footed(facts("Search on the true loss", search_facts(summary, search)), *SEARCH_NOTE)


def search_facts(summary: Summary, search: Search) -> list[tuple[str, str]]:
    """Labels and what they say about a search."""
    evaluations = whole(summary, search)
    first, best, choice = evaluations[0], min(evaluations, key=lambda e: e.loss), chosen(summary, search)
    parts = sum(not e.whole for e in search.evaluations)

    def found(evaluation: Evaluation) -> str:
        against = f", {formats.change(first.loss, evaluation.loss)}" if evaluation != first and first.loss > 0 else ""
        when = f"after {formats.count(evaluation.tokens)} tokens"
        return f"{formats.significant(evaluation.loss)} nats per token{against}, {when}"

    measured = f"{formats.count(len(evaluations))} on the whole selection text"
    return [
        ("tokens", f"{formats.count(search.tokens)} spent of {formats.count(search.limit)}"),
        ("candidates", f"made of {search.candidates}s"),
        ("measured", measured + (f", {formats.count(parts)} on parts of it" if parts else "")),
        ("first", found(first)),
        ("best", "the first" if best == first else found(best)),
        ("chosen", "the best" if choice == best else "the first" if choice == first else found(choice)),
        *_foretold(Surrogate.of(evaluations)),
        ("dense", f"top {search.top} tokens, {formats.share(search.tail)} of the probability outside, counted as one"),
    ]


def _foretold(surrogate: Surrogate) -> list[tuple[str, str]]:
    """Rank correlation and fit of the surrogate, or why there are none."""
    if surrogate.count < FEWEST:
        return [("surrogate", f"too few distinct whole evaluations to judge it: {surrogate.count}, least {FEWEST}")]
    over = f"{formats.count(surrogate.count)} distinct whole evaluations"
    if surrogate.correlation is None:
        return [("surrogate", f"no correlation: one side is constant in {over}")]
    rows = [("surrogate", f"rank correlation {surrogate.correlation:.2f} (Spearman) in {over}")]
    if surrogate.slope is not None and surrogate.intercept is not None:
        sign = "-" if surrogate.intercept < 0 else "+"
        rows.append(("", f"log measured = {surrogate.slope:.2f} log predicted {sign} {abs(surrogate.intercept):.2f}"))
    # Picked for a low loss, they agree less with the surrogate than allocations in general do.
    return [*rows, ("", "among allocations that the search picked, no sample of all")]


def facts(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    """A table of labels and what they say."""
    table = report_table(title, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, Text(value))
    return table


def quality(summary: Summary, sign: str = "±") -> Stack:
    """Dense and compressed perplexity and KL per split, with standard errors over windows.

    The error of a perplexity is `perplexity * stderr(nll)`. `sign` stands before every standard error.
    """
    if not summary.compressed:
        return Stack(Text("Quality: not evaluated", "bold"))
    lines = [windows_line(m) for m in summary.compressed]
    table = report_table(f"Quality ({sign} standard error over windows)")
    table.add_column("\nsplit")
    add_numbers(table, ("dense\nperplexity", "compressed\nperplexity", "\nchange", "KL to dense,\nnats per token"))
    for dense, compressed in zip(summary.dense, summary.compressed, strict=True):
        table.add_row(
            Text(compressed.split),
            perplexity(dense, sign),
            perplexity(compressed, sign),
            formats.change(dense.perplexity, compressed.perplexity),
            divergence(compressed, sign),
        )
    return footed(table, *lines)


def metrics_table(metrics: Sequence[Metrics], sign: str = "±") -> Stack:
    """Perplexity, and KL where it was measured, of one model per split."""
    table = report_table(f"Quality ({sign} standard error over windows)")
    table.add_column("\nsplit")
    add_numbers(table, ("\nperplexity", "KL to dense,\nnats per token"))
    for m in metrics:
        table.add_row(Text(m.split), perplexity(m, sign), "-" if m.kl is None else divergence(m, sign))
    return footed(table, *(windows_line(m) for m in metrics))


def windows_line(m: Metrics) -> str:
    """How many windows of which text the metrics are of."""
    return (
        f"{m.split}: {formats.count(m.windows)} windows of {formats.count(m.seqlen)} tokens, "
        f"{formats.count(m.tokens)} predicted, {m.dtype}, text {m.text_sha256[:8]}"
    )


def perplexity(metrics: Metrics, sign: str = "±") -> str:
    """Perplexity with its standard error, by the delta method from that of the mean negative log likelihood."""
    return formats.measured(metrics.perplexity, metrics.perplexity * metrics.nll_stderr, sign)


def divergence(metrics: Metrics, sign: str = "±") -> str:
    """KL to the dense model with its standard error, in nats per token; "-" for the dense model itself."""
    return "-" if metrics.kl is None else formats.measured(metrics.kl, metrics.kl_stderr, sign)


def by_kind_table(summary: Summary) -> Stack:
    """What each kind of layer got and lost, pooled as `Group` says, with a total row."""
    return group_table("Allocation by kind", "kind", by_kind(summary.layers), summary.layers, errors_unit(summary))


def by_block_table(summary: Summary) -> Stack:
    """What each block got and lost, pooled as `Group` says, with a total row."""
    return group_table("Allocation by block", "block", by_block(summary.layers), summary.layers, errors_unit(summary))


def group_table(title: str, label: str, groups: Sequence[Group], layers: Sequence[LayerPlan], unit: str) -> Stack:
    """Pooled layers with a row for all of them; errors are in `unit`."""
    rows = [*groups, Group.pool("all", layers)]
    errors: dict[str, list[float]] = {}
    # A column with a hole has nothing to compare: predictions in another unit, results not there yet.
    for name in ("predicted", "actual", "relative"):
        values = [getattr(row, name) for row in rows]
        if None not in values:
            errors[name] = values
    table = report_table(title)
    table.add_column(f"\n{label}", overflow="fold")
    add_numbers(table, ("\nlayers", "\nkept", "\ndensity", "mean\nrank", "rank\nshare"))
    add_numbers(table, [f"{name}\nerror" for name in errors])
    cells = list(zip(*map(formats.aligned, errors.values()), strict=True)) or [()] * len(rows)
    for row, texts in zip(rows, cells, strict=True):
        last = row is rows[-1]
        if last:
            table.add_section()
        table.add_row(
            Text(row.label),
            str(row.layers),
            f"{row.kept:.3f}",
            f"{row.density:.3f}",
            f"{row.rank:.1f}",
            f"{row.rank_share:.3f}",
            *texts,
            style="bold" if last else "",
        )
    summed = [name for name in errors if name != "relative"]
    means = ["rank", *(["relative"] if "relative" in errors else [])]
    parts = [f"{', '.join(summed)}: sums in {unit}"] if summed else []
    return footed(table, "; ".join([*parts, f"{', '.join(means)}: size-weighted means"]))


def matched(results: Sequence[MatchResult]) -> Stack:
    """What matching did to every block, and to the whole model: what it minimised, before and after."""
    table = report_table("Transformer matching")
    table.add_column("block")
    table.add_column("loss")
    add_numbers(table, ("before", "after", "change", "epochs", "kept", "time"))
    for result in results:
        table.add_row(
            "model" if result.block is None else str(result.block),
            Text(result.loss),
            formats.significant(result.before),
            formats.significant(result.after),
            formats.change(result.before, result.after) if result.before else "-",
            str(result.epochs),
            str(result.kept_epoch) if result.kept_epoch else "start",
            formats.duration(result.seconds),
        )
    return footed(table, "loss: on held-out calibration windows where there are any; kept: the epoch that was kept")


def mean_change(matching: Sequence[MatchResult]) -> str | None:
    """Geometric mean over blocks of what matching made of their loss; None where there is nothing to take it of."""
    ratios = [m.after / m.before for m in matching if m.block is not None and m.before > 0 and m.after > 0]
    return formats.change(1, math.exp(math.fsum(map(math.log, ratios)) / len(ratios))) if ratios else None


def whole_cost(stages: Sequence[StageCost]) -> tuple[float, int]:
    """Seconds of all stages, and the highest of their peaks in bytes."""
    return math.fsum(stage.seconds for stage in stages), max((stage.peak_bytes for stage in stages), default=0)


def stages(summary: Summary) -> Table:
    """Time and peak memory per stage; the total row sums the times and takes the largest peak."""
    table = report_table("Stages")
    table.add_column("stage", overflow="fold")
    add_numbers(table, ("time", "share", "peak memory"))
    seconds, peak = whole_cost(summary.stages)
    for stage in summary.stages:
        part = f"{100 * stage.seconds / seconds:.0f} %" if seconds else "-"
        table.add_row(Text(stage.name), formats.duration(stage.seconds), part, formats.memory(stage.peak_bytes))
    table.add_section()
    table.add_row("all", formats.duration(seconds), "", formats.memory(peak), style="bold")
    return table


def layer_allocation(summary: Summary) -> Table:
    """What every layer was given: shape, rank, nonzeros, pattern, cost and dense cost."""
    patterns = any(layer.pattern for layer in summary.layers)
    table = report_table(f"Layers: allocation (cost in {unit_name(summary.accounting)})", gap=1)
    table.add_column("\nblock", justify="right")
    table.add_column("\nkind", overflow="fold")
    add_numbers(table, ("d_out x\nd_in", "\nrank", "\nnnz", *(["\nN:M"] if patterns else []), "\ncost"))
    add_numbers(table, ("dense\ncost", "\nkept", "\ndensity", "rank\nshare"))
    for layer in summary.layers:
        table.add_row(
            str(layer.block),
            Text(layer.kind),
            f"{layer.d_out}x{layer.d_in}",
            str(layer.rank),
            formats.compact(layer.nnz),
            *([layer.pattern or "-"] if patterns else []),
            formats.compact(layer.cost),
            formats.compact(layer.dense_cost),
            f"{layer.kept:.3f}",
            f"{layer.density:.3f}",
            f"{layer.rank_share:.3f}",
        )
    return table


def layer_results(summary: Summary) -> Stack:
    """What came of every layer: errors, how the solver ended, damping and time."""
    prefix = common_prefix([layer.name for layer in summary.layers])
    under = f"names under {prefix}; " if prefix else ""
    table = report_table("Layers: result")
    table.add_column("\nlayer", overflow="fold")
    add_numbers(table, ("predicted\nerror", "actual\nerror", "relative\nerror"))
    table.add_column("\nstatus", no_wrap=True)
    add_numbers(table, ("\ndamping", "\ntime"))
    for layer in summary.layers:
        table.add_row(
            Text(layer.name.removeprefix(prefix)),
            "-" if layer.predicted is None else formats.scientific(layer.predicted),
            formats.scientific(layer.actual),
            formats.scientific(layer.relative),
            Text(layer.status, "" if Status(layer.status) is Status.CONVERGED else "red"),
            f"{layer.damping:g}",
            formats.duration(layer.seconds),
        )
    return footed(table, f"{under}predicted, actual error: {errors_unit(summary)}")


def notes(summary: Summary) -> Stack | None:
    """The run's notes and, per status other than converged, its layers with advice; None where there are none."""
    lines = [Text.assemble((f"{status.value}: ", "red"), advice) for status, advice in troubles(summary)]
    lines += [Text(note) for note in summary.notes]
    return Stack(Text("Notes", "bold"), *(Padding(line, (0, 0, 0, 2)) for line in lines)) if lines else None


def troubles(summary: Summary) -> list[tuple[Status, str]]:
    """Per status other than converged, its layers with advice."""
    troubled = sorted(
        (layer for layer in summary.layers if Status(layer.status) is not Status.CONVERGED), key=lambda la: la.status
    )
    grouped = groupby(troubled, key=lambda layer: Status(layer.status))
    return [(status, f"{_some_names(list(layers))}. {status.advice}") for status, layers in grouped]


def provenance(summary: Summary) -> Table:
    """How each split was made, and the versions that made the run."""
    rows = [
        (split, ", ".join(_fact(key, value) for key, value in made.items() if value is not None))
        for split, made in summary.splits.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in summary.versions.items())
    return facts("Made from", [*rows, ("versions", versions)])


def _fact(key: str, value: Any) -> str:
    """One recorded fact, short: hashes by their first digits, long lists by their length."""
    if isinstance(value, str) and key.endswith("sha256"):
        return f"{key} {value[:8]}"
    if isinstance(value, list | tuple) and len(value) > 2:
        return f"{len(value)} {key}"
    return f"{key} {value}"


def _some_names(layers: Sequence[LayerResult]) -> str:
    shown = ", ".join(layer.name for layer in layers[:3])
    return f"{shown} and {len(layers) - 3} more" if len(layers) > 3 else shown


def common_prefix(names: Sequence[str]) -> str:
    """The dotted path shared by all names; empty for one name alone."""
    first, *others = (name.split(".")[:-1] for name in names)
    shared = []
    for i, part in enumerate(first if others else ()):
        if any(other[i : i + 1] != [part] for other in others):
            break
        shared.append(f"{part}.")
    return "".join(shared)


def errors_unit(summary: Summary) -> str:
    """The unit of the layers' errors, in plain text."""
    return "tr(E G E^T)" if summary.error_unit == ErrorUnit.OUTPUT_ERROR else summary.error_unit


def unit_name(accounting: str) -> str:
    """What a budget counts: parameters or bytes."""
    return "parameters" if accounting == "params" else accounting


def report_table(title: str, show_header: bool = True, gap: int = GAP) -> Table:
    """An empty table in the house's look, with `gap` spaces between its columns."""
    return Table(
        title=Text(title, "bold"),
        title_justify="left",
        show_header=show_header,
        header_style="dim",
        box=_RULES,
        show_edge=False,
        pad_edge=False,
        # The box's blank divider is the last space of the gap.
        padding=(0, gap - 1, 0, 0),
    )


def add_numbers(table: Table, headers: Sequence[str]) -> None:
    """Add right-aligned columns that never break a number."""
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)


def footed(table: Table, *lines: str) -> Stack:
    """A table with footnotes, which may be wider than it is."""
    return Stack(table, *(Text(line, "dim") for line in lines))
