"""Lay out a run: its budget, search, quality, layers, matching, stages and origin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from globalopt.values.decomposition import Status
from globalopt.values.layer_results import MatchResult
from globalopt.values.results import Summary
from globalopt.values.search_record import Evaluation, Search
from globalopt.values.stage_cost import StageCost
from reports import formats
from reports.bits import compressible, embedding_facts, stored_facts, summed_over
from reports.layer_tables import by_block_table, by_kind_table, layer_allocation, layer_results
from reports.menu import Menu
from reports.quality_tables import quality
from reports.shaded_grid import bits_grid, kept_grid
from reports.size import size_facts, size_table
from reports.surrogate import FEWEST, Surrogate, chosen, whole
from reports.table_style import _some_names, add_numbers, facts, footed, model_name, report_table, unit_name

# Rules below the header and above a total, no other lines.


def render(summary: Summary, console: Console, verbose: bool = False, menu: Menu | None = None) -> None:
    """Print the whole report; `verbose` adds the layers one by one, the splits and the versions.

    Args:
        menu: limits of what the search had on offer, where layers at one of them are to be named.

    >>> from reports.example import example_summary
    >>> render(example_summary(), Console(width=80, color_system=None))
    globalopt search --budget 0.5 --solver 3basil
    the bundled reference model: 14 layers, 1,449,984 dense parameters, seed 0
    ...
    """
    sign = "+-" if console.options.ascii_only else "±"
    parts: list[RenderableType | None] = [
        heading(summary),
        budget(summary, menu),
        quality(summary, sign),
        *([searched(summary, summary.search)] if summary.search is not None else []),
        by_kind_table(summary),
        by_block_table(summary),
        kept_grid(summary.layers),
        bits_grid(summary.layers),
        *([matched(summary.matching)] if summary.matching else []),
        facts("Size", size_facts(summary)),
        size_table(summary),
        stages(summary),
    ]
    if verbose:
        parts += [layer_allocation(summary), layer_results(summary), provenance(summary)]
    remarks = notes(summary)
    for part in filter(None, [*parts, remarks]):
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


def budget(summary: Summary, menu: Menu | None = None) -> Table:
    """Make the table of the budget: `budget_facts`, one per row.

    >>> from reports.example import example_summary
    >>> Console(width=80, color_system=None).print(budget(example_summary()))
    Budget
    asked           keep 0.5 of the compressible parameters
    ...
    """
    return facts("Budget", budget_facts(summary, menu))


def budget_facts(summary: Summary, menu: Menu | None = None) -> list[tuple[str, str]]:
    """List labels and values on the budget: asked, limit, used, bits, predicted loss, certificate, limits, coverage.

    >>> from reports.example import example_summary
    >>> budget_facts(example_summary())[0]
    ('asked', 'keep 0.5 of the compressible parameters')
    """
    unit = unit_name(summary.accounting)
    rows = [
        ("asked", f"keep {summary.asked:g} of {compressible(unit, summary.embeddings)}"),
        ("limit", f"{formats.count(summary.limit)} of {formats.count(summary.total)} {unit}"),
        ("used", f"{formats.count(summary.used)} {unit}, {formats.percent(summary.used, summary.limit)} of the limit"),
        ("accounting", summary.accounting),
        *stored_facts(summary.layers),
        *embedding_facts(summary.embeddings),
        ("allocator", summary.allocator),
        ("solver", summary.solver),
        *prediction(
            "predicted loss",
            summary.predicted,
            summary.bound,
            f"{summary.budget_unit}, {summed_over(summary.embeddings)}",
        ),
        *against_uniform(summary),
        # Without a prediction, no option was on offer.
        *(menu.facts(summary.layers) if menu is not None and summary.predicted is not None else ()),
        (
            "covered",
            f"{formats.count(summary.covered)} of {formats.count(summary.block_params)} block parameters, "
            f"{formats.percent(summary.covered, summary.block_params)}",
        ),
    ]
    if left := _not_covered(summary):
        words = "; ".join(f"{name} {formats.count(params)}" for name, params in left.items())
        rows.append(("not covered", words))
    return rows


def _not_covered(summary: Summary) -> dict[str, int]:
    """Count by category the parameters that the budget does not count."""
    left = dict(summary.skipped)
    # The token embedding comes first; a head of its own is counted as such.
    for category, each in zip(("embeddings", "lm_head"), summary.embeddings, strict=False):
        left[category] = left.get(category, 0) - each.rows * each.width
    return {category: params for category, params in left.items() if params > 0}


def against_uniform(summary: Summary) -> list[tuple[str, str]]:
    """List the predicted loss of uniform allocation and, of a search on the true loss, the measured ones of both.

    >>> from globalopt.values.search_record import Outcome
    >>> from reports.example import example_summary
    >>> against_uniform(example_summary(predicted=0.001, uniform=Outcome(1000, 0.0025, None, None)))
    [('uniform', 'predicted 0.00250, 2.50 times as much')]
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
    [('predicted', '1.00 nats per token'), ('certificate', 'the optimum of the surrogate, proved')]
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
        ("candidates", f"made of {search.candidates}"),
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


MATCHING_NOTE = "loss: on held-out calibration windows where there are any; kept: the epoch that was kept"


def matched(results: Sequence[MatchResult]) -> Stack:
    """Make the table of matching: the loss of every block, and of the whole model, before and after.

    >>> from reports.example import example_matching
    >>> Console(width=80, color_system=None).print(matched(example_matching()))
    Transformer matching
    block  loss    before     after   change  epochs   kept        time
    ...
    model  kl     0.00310   0.00240  -22.6 %       3      3  1 min 01 s
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
