"""Show the report of one run as terminal tables, which fit 80 columns and read the same without colour."""

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
    """Print the whole report; `verbose` adds the layers one by one, the splits and the versions.

    >>> from reports.example import example_summary
    >>> render(example_summary(), Console(width=80, color_system=None))
    globalopt search --budget 0.5 --solver 3basil
    the bundled reference model: 14 layers, 1,449,984 dense parameters, seed 0
    ...
    """
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
    """Format the command and the model in two lines.

    >>> from reports.example import example_summary
    >>> heading(example_summary()).plain.splitlines()[0]
    'globalopt search --budget 0.5 --solver 3basil'
    """
    model = model_name(summary.model)
    return Text.assemble(
        (summary.command, "bold"),
        "\n",
        f"{model}: {len(summary.layers)} layers, {formats.count(summary.total)} "
        f"dense {unit_name(summary.accounting)}, seed {summary.seed}",
        overflow="fold",
    )


def model_name(model: str) -> str:
    """Name a model as reports do.

    >>> model_name("reference")
    'the bundled reference model'
    """
    return "the bundled reference model" if model == "reference" else model


def budget(summary: Summary) -> Table:
    """Make the table of the budget: `budget_facts`, one per row.

    >>> from reports.example import example_summary
    >>> Console(width=80, color_system=None).print(budget(example_summary()))
    Budget
    asked           keep 0.5 of the compressible parameters
    ...
    """
    return facts("Budget", budget_facts(summary))


def budget_facts(summary: Summary) -> list[tuple[str, str]]:
    """List labels and values on the budget: requested, limit, used, predicted loss, certificate, coverage.

    >>> from reports.example import example_summary
    >>> budget_facts(example_summary())[0]
    ('asked', 'keep 0.5 of the compressible parameters')
    """
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
    """List the predicted loss of uniform allocation and, of a search on the true loss, the measured ones of both.

    >>> from globalopt.values.results import Outcome
    >>> from reports.example import example_summary
    >>> against_uniform(example_summary(predicted=0.001, uniform=Outcome(1000, 0.0025, None, None)))
    [('uniform', 'predicted 0.002500, 2.500 times as much')]
    """
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
    """List the predicted loss of an allocation and its certificate.

    >>> prediction("predicted", 1.0, 1.0, "nats per token")
    [('predicted', '1.000 nats per token'), ('certificate', 'the optimum of the surrogate, proved')]
    """
    if predicted is None:
        return [(label, "nothing: the budget was not found by a search")]
    return [(label, f"{formats.significant(predicted)} {unit}"), ("certificate", formats.certificate(predicted, bound))]


SEARCH_NOTE = (
    "first, best, chosen: mean KL to dense on the whole selection text. The best of",
    "many looks better there than it is; the quality above is on other text.",
)


def searched(summary: Summary, search: Search) -> Stack:
    """Make the table of a search on the true loss: `search_facts`, one per row.

    >>> from reports.example import example_search, example_searched_summary
    >>> search = example_search()
    >>> Console(width=80, color_system=None).print(searched(example_searched_summary(search), search))
    Search on the true loss
    tokens      1,925,120 spent of 2,117,632
    ...
    """
    return footed(facts("Search on the true loss", search_facts(summary, search)), *SEARCH_NOTE)


def search_facts(summary: Summary, search: Search) -> list[tuple[str, str]]:
    """List labels and values on a search: tokens, evaluations, best losses, and agreement with predicted losses.

    >>> from reports.example import example_search, example_searched_summary
    >>> search = example_search()
    >>> search_facts(example_searched_summary(search), search)[2]
    ('measured', '40 on the whole selection text, 150 on parts of it')
    """
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
        *_agreement(Surrogate.of(evaluations)),
        ("dense", f"top {search.top} tokens, {formats.share(search.tail)} of the probability outside, counted as one"),
    ]


def _agreement(surrogate: Surrogate) -> list[tuple[str, str]]:
    """List rank correlation and fit of predicted to measured losses, or the reason why there are none."""
    if surrogate.count < FEWEST:
        return [("surrogate", f"too few distinct whole evaluations to judge it: {surrogate.count}, least {FEWEST}")]
    over = f"{formats.count(surrogate.count)} distinct whole evaluations"
    if surrogate.correlation is None:
        return [("surrogate", f"no correlation: one side is constant in {over}")]
    rows = [("surrogate", f"rank correlation {surrogate.correlation:.2f} (Spearman) in {over}")]
    if surrogate.slope is not None and surrogate.intercept is not None:
        sign = "-" if surrogate.intercept < 0 else "+"
        rows.append(("", f"log measured = {surrogate.slope:.2f} log predicted {sign} {abs(surrogate.intercept):.2f}"))
    # Allocations that were picked for a low loss agree less with the surrogate than random ones.
    return [*rows, ("", "among allocations that the search picked, no sample of all")]


def facts(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    """Make a table of labels and values.

    >>> Console(width=80, color_system=None).print(facts("Size", [("of the layers", "45 %")]))
    Size
    of the layers  45 %
    """
    table = report_table(title, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, Text(value))
    return table


def quality(summary: Summary, sign: str = "±") -> Stack:
    """Make the table of dense and compressed perplexity and KL per split, with standard errors over windows.

    The standard error of a perplexity is `perplexity * stderr(nll)`. `sign` is put before every standard error.

    >>> from reports.example import example_summary
    >>> Console(width=80, color_system=None).print(quality(example_summary()))
    Quality (± standard error over windows)
                      dense   compressed                KL to dense,
    split        perplexity   perplexity  change      nats per token
    ────────────────────────────────────────────────────────────────
    validation  60.87 ±0.79  61.02 ±0.79  +0.2 %  0.002910 ±0.000073
    test        62.21 ±0.81  62.44 ±0.81  +0.4 %  0.003020 ±0.000076
    validation: 64 windows of 512 tokens, 32,704 predicted, float32, text 22222222
    test: 64 windows of 512 tokens, 32,704 predicted, float32, text 11111111
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
    """Make the table of perplexity, and KL where it was measured, of one model per split.

    >>> from reports.example import example_metrics
    >>> Console(width=80, color_system=None).print(metrics_table([example_metrics("test", 62.4, 0.003)]))
    Quality (± standard error over
    windows)
                              KL to dense,
    split   perplexity      nats per token
    ──────────────────────────────────────
    test   62.40 ±0.81  0.003000 ±0.000075
    test: 64 windows of 512 tokens, 32,704 predicted, float32, text 11111111
    """
    table = report_table(f"Quality ({sign} standard error over windows)")
    table.add_column("\nsplit")
    add_numbers(table, ("\nperplexity", "KL to dense,\nnats per token"))
    for m in metrics:
        table.add_row(Text(m.split), perplexity(m, sign), "-" if m.kl is None else divergence(m, sign))
    return footed(table, *(windows_line(m) for m in metrics))


def windows_line(m: Metrics) -> str:
    """Write a line on the windows and the text of metrics.

    >>> from reports.example import example_metrics
    >>> windows_line(example_metrics("test", 62.4, 0.003))
    'test: 64 windows of 512 tokens, 32,704 predicted, float32, text 11111111'
    """
    return (
        f"{m.split}: {formats.count(m.windows)} windows of {formats.count(m.seqlen)} tokens, "
        f"{formats.count(m.tokens)} predicted, {m.dtype}, text {m.text_sha256[:8]}"
    )


def perplexity(metrics: Metrics, sign: str = "±") -> str:
    """Format the perplexity with its standard error, by the delta method from that of the mean loss.

    >>> from reports.example import example_metrics
    >>> perplexity(example_metrics("test", 62.4, 0.003))
    '62.40 ±0.81'
    """
    return formats.measured(metrics.perplexity, metrics.perplexity * metrics.nll_stderr, sign)


def divergence(metrics: Metrics, sign: str = "±") -> str:
    """Format the KL to the dense model with its standard error, in nats per token; "-" for the dense model itself.

    >>> from reports.example import example_metrics
    >>> divergence(example_metrics("test", 62.4, 0.003))
    '0.003000 ±0.000075'
    """
    return "-" if metrics.kl is None else formats.measured(metrics.kl, metrics.kl_stderr, sign)


def by_kind_table(summary: Summary) -> Stack:
    """Make the table of targets and errors pooled by kind of layer (`Group`), with a total row.

    >>> from reports.example import example_summary
    >>> Console(width=80, color_system=None).print(by_kind_table(example_summary()))
    Allocation by kind
                                              mean   rank  predicted    actual ...
    kind       layers   kept  density         rank  share      error     error ...
    ...
    """
    return group_table("Allocation by kind", "kind", by_kind(summary.layers), summary.layers, errors_unit(summary))


def by_block_table(summary: Summary) -> Stack:
    """Make the table of targets and errors pooled by block (`Group`), with a total row.

    >>> from reports.example import example_summary
    >>> Console(width=80, color_system=None).print(by_block_table(example_summary()))
    Allocation by block
    ...
    rank, relative: size-weighted means
    """
    return group_table("Allocation by block", "block", by_block(summary.layers), summary.layers, errors_unit(summary))


def group_table(title: str, label: str, groups: Sequence[Group], layers: Sequence[LayerPlan], unit: str) -> Stack:
    """Make a table of pooled layers, with a row for all of them; errors are in `unit`.

    >>> from globalopt.budgets.example import example_budget
    >>> plans = example_budget().plans
    >>> shown = group_table("By kind", "kind", by_kind(plans), plans, "nats per token")
    >>> Console(width=80, color_system=None).print(shown)
    By kind
                                       mean   rank
    kind       layers   kept  density  rank  share
    ──────────────────────────────────────────────
    up_proj         1  0.500    0.125   1.0  0.750
    down_proj       1  0.500    0.500   0.0  0.000
    ──────────────────────────────────────────────
    all             2  0.500    0.312   0.5  0.375
    rank: size-weighted means
    """
    rows = [*groups, Group.pool("all", layers)]
    errors: dict[str, list[float]] = {}
    # Columns with a missing value are left out: predictions in another unit, layers that are not refined yet.
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


MATCHING_NOTE = "loss: on held-out calibration windows where there are any; kept: the epoch that was kept"


def matched(results: Sequence[MatchResult]) -> Stack:
    """Make the table of matching: the loss of every block, and of the whole model, before and after.

    >>> from reports.example import example_matching
    >>> Console(width=80, color_system=None).print(matched(example_matching()))
    Transformer matching
    block  loss      before      after   change  epochs   kept    time
    ...
    model  kl      0.003100   0.002400  -22.6 %       3      3  1 min 01 s
    loss: on held-out calibration windows where there are any; kept: the epoch that was kept
    """
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
    return footed(table, MATCHING_NOTE)


def mean_change(matching: Sequence[MatchResult]) -> str | None:
    """Format the geometric mean over blocks of the change of the loss by matching; None without a matched block.

    >>> mean_change([MatchResult(0, "nats", 4.0, 2.0, 8, 8, 1.0), MatchResult(1, "nats", 8.0, 1.0, 8, 8, 1.0)])
    '-75.0 %'
    """
    ratios = [m.after / m.before for m in matching if m.block is not None and m.before > 0 and m.after > 0]
    return formats.change(1, math.exp(math.fsum(map(math.log, ratios)) / len(ratios))) if ratios else None


def whole_cost(stages: Sequence[StageCost]) -> tuple[float, int]:
    """Sum the seconds of all stages, and take the highest of their memory peaks in bytes.

    >>> whole_cost([StageCost("capture", 2.0, 2**30), StageCost("refine", 6.0, 2**29)])
    (8.0, 1073741824)
    """
    return math.fsum(stage.seconds for stage in stages), max((stage.peak_bytes for stage in stages), default=0)


def stages(summary: Summary) -> Table:
    """Make the table of time and peak memory per stage; the total row has the sum of times and the largest peak.

    >>> from reports.example import example_summary
    >>> Console(width=80, color_system=None).print(stages(example_summary(stages=example_summary().stages[:2])))
    Stages
    stage      time  share  peak memory
    ───────────────────────────────────
    capture  11.9 s   34 %      912 MiB
    span     23.4 s   66 %      940 MiB
    ───────────────────────────────────
    all      35.3 s             940 MiB
    """
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
    """Make the table of the targets of all layers: shape, rank, nonzeros, pattern, cost and dense cost.

    >>> from reports.example import example_summary
    >>> layer_allocation(example_summary()).row_count
    14
    """
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
    """Make the table of the results of all layers: errors, status of the solver, damping and time.

    >>> from reports.example import example_summary
    >>> layer_results(example_summary()).renderables[0].row_count
    14
    """
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
    """List the run's notes and, per status other than converged, its layers with advice; None where there are none.

    >>> from reports.example import example_summary
    >>> Console(width=80, color_system=None).print(notes(example_summary()))
    Notes
      The model was stored in bfloat16 and computed in float32.
    """
    lines = [Text.assemble((f"{status.value}: ", "red"), advice) for status, advice in troubles(summary)]
    lines += [Text(note) for note in summary.notes]
    return Stack(Text("Notes", "bold"), *(Padding(line, (0, 0, 0, 2)) for line in lines)) if lines else None


def troubles(summary: Summary) -> list[tuple[Status, str]]:
    """List the layers of every status other than converged, with advice.

    >>> from dataclasses import replace
    >>> from reports.example import example_layers, example_summary
    >>> first, *others = example_layers()
    >>> found = troubles(example_summary(layers=(replace(first, status="fallback"), *others)))
    >>> [(status.value, text.partition(". ")[0]) for status, text in found]
    [('fallback', 'model.layers.0.self_attn.q_proj')]
    """
    troubled = sorted(
        (layer for layer in summary.layers if Status(layer.status) is not Status.CONVERGED), key=lambda la: la.status
    )
    grouped = groupby(troubled, key=lambda layer: Status(layer.status))
    return [(status, f"{_some_names(list(layers))}. {status.advice}") for status, layers in grouped]


def provenance(summary: Summary) -> Table:
    """Make the table of the sources of the splits, and of the versions of packages.

    >>> from reports.example import example_summary
    >>> Console(width=80, color_system=None).print(provenance(example_summary()))
    Made from
    calibration  source wikitext-2, sha256 33333333, windows 64, 64 starts
    test         source wikitext-2, sha256 11111111, windows 64
    versions     globalopt 0.1.0, torch 2.13.0
    """
    rows = [
        (split, ", ".join(_fact(key, value) for key, value in made.items() if value is not None))
        for split, made in summary.splits.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in summary.versions.items())
    return facts("Made from", [*rows, ("versions", versions)])


def _fact(key: str, value: Any) -> str:
    """Format an entry of metadata: hashes by their first digits, long lists by their length."""
    if isinstance(value, str) and key.endswith("sha256"):
        return f"{key} {value[:8]}"
    if isinstance(value, list | tuple) and len(value) > 2:
        return f"{len(value)} {key}"
    return f"{key} {value}"


def _some_names(layers: Sequence[LayerResult]) -> str:
    """List the names of up to three layers, and count the others."""
    shown = ", ".join(layer.name for layer in layers[:3])
    return f"{shown} and {len(layers) - 3} more" if len(layers) > 3 else shown


def common_prefix(names: Sequence[str]) -> str:
    """Find the dotted path that all names share; empty for one name alone.

    >>> common_prefix(["model.layers.0.q", "model.layers.1.q"])
    'model.layers.'
    """
    first, *others = (name.split(".")[:-1] for name in names)
    shared = []
    for i, part in enumerate(first if others else ()):
        if any(other[i : i + 1] != [part] for other in others):
            break
        shared.append(f"{part}.")
    return "".join(shared)


def errors_unit(summary: Summary) -> str:
    """Return the unit of the layers' errors in plain text.

    >>> from reports.example import example_summary
    >>> errors_unit(example_summary(error_unit=ErrorUnit.OUTPUT_ERROR))
    'tr(E G E^T)'
    """
    return "tr(E G E^T)" if summary.error_unit == ErrorUnit.OUTPUT_ERROR else summary.error_unit


def unit_name(accounting: str) -> str:
    """Name the unit of an accounting.

    >>> unit_name("params")
    'parameters'
    """
    return "parameters" if accounting == "params" else accounting


def report_table(title: str, show_header: bool = True, gap: int = GAP) -> Table:
    """Make an empty table in the style of all reports, with `gap` spaces between its columns.

    >>> report_table("Size").title.plain
    'Size'
    """
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
    """Add right-aligned columns that never break a number.

    >>> table = report_table("Size")
    >>> add_numbers(table, ("rank", "kept"))
    >>> [column.justify for column in table.columns]
    ['right', 'right']
    """
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)


def footed(table: Table, *lines: str) -> Stack:
    """Put footnotes, which may be wider than the table, below it.

    >>> len(footed(report_table("Size"), "kept: of the dense size").renderables)
    2
    """
    return Stack(table, *(Text(line, "dim") for line in lines))
