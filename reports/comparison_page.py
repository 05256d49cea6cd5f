"""Make the page that compares several runs with the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from globalopt.values.metrics import WindowLosses
from globalopt.values.results import Summary
from reports import formats, quality_tables, table_style, tables
from reports.bits import few_bits, stored_facts
from reports.comparison import TOKENS_NOTE, common_split, differences_to_first, measured_runs, not_compared, not_paired
from reports.groups import by_kind
from reports.html import Card, Cell, Code, Facts, Lines, Page, Part, Picture, Section, Table
from reports.paired import CONFIDENCE, Difference, Interval, incomparable
from reports.run_page import MISSING, columns, quality_cells, share_cell

CAPTIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "quality": ("KL to the dense model and perplexity of every run", ()),
    "allocations": (
        "What every layer keeps and loses, run by run, block by kind",
        ("A column has the same colours in every run.",),
    ),
}
"""Alternative text of every picture and notes below it, by the picture's name."""


def comparison_page(
    summaries: Sequence[Summary],
    labels: Sequence[str],
    losses: Sequence[tuple[WindowLosses, ...]],
    pictures: Sequence[Path],
) -> Page:
    """Make the page of at least two runs.

    Args:
        labels: names of the runs.
        losses: losses of the windows of each run, empty where they are not known.
        pictures: PNGs by `write_comparison_figures`, with an SVG beside each.

    >>> from reports.example import example_losses, example_summary
    >>> runs = [example_summary(), example_summary(allocator="uniform")]
    >>> page = comparison_page(runs, ["a", "b"], [example_losses(run) for run in runs], pictures=[])
    >>> page.title, [section.title for section in page.sections]
    ('2 runs compared', ['Quality', 'Against a', 'Allocation', 'Cost', 'Reproduce'])
    """
    drawn = {path.stem: Picture.read(path, *CAPTIONS[path.stem]) for path in pictures}
    apart = differences_to_first(summaries, labels, losses)
    reasons = incomparable(measured_runs(summaries, labels), common_split(summaries))
    models = dict.fromkeys(table_style.model_name(summary.model) for summary in summaries)

    def picture(name: str) -> list[Part]:
        return [drawn[name]] if name in drawn else []

    commands: list[Part] = [Code(summary.command, label) for label, summary in zip(labels, summaries, strict=True)]
    return Page(
        title=f"{len(summaries)} runs compared",
        lede=", ".join(models),
        cards=_cards(summaries, labels, apart, comparable=not reasons),
        sections=[
            Section(
                "quality", "Quality", [*_not_comparable(reasons), _quality(summaries, labels), *picture("quality")]
            ),
            Section("apart", f"Against {labels[0]}", _apart(apart)),
            Section(
                "allocation",
                "Allocation",
                [_kinds(summaries, labels), *_bits(summaries, labels), *picture("allocations")],
            ),
            Section("cost", "Cost", [_costs(summaries, labels)]),
            Section("reproduce", "Reproduce", commands),
        ],
        version=summaries[0].versions.get("globalopt", ""),
    )


def _cards(
    summaries: Sequence[Summary], labels: Sequence[str], apart: Sequence[Difference], comparable: bool
) -> list[Card]:
    """Make the cards: number of runs, lowest KL, and how many runs are better than the first.

    A lowest KL of runs that do not compare, or that keep different fractions, would be that of no contest.
    """
    split = common_split(summaries)
    kept = dict.fromkeys(f"{summary.asked:g}" for summary in summaries)
    shown = [Card("Runs", str(len(summaries)), f"kept {', '.join(kept)}")]
    if not comparable:
        return [*shown, Card("Comparable", "no", "the reasons are below")]
    found = [
        (metrics.kl, label, metrics)
        for label, summary in zip(labels, summaries, strict=True)
        for metrics in summary.compressed
        if metrics.split == split and metrics.kl is not None
    ]
    if found and len(kept) == 1:
        _, label, metrics = min(found, key=lambda one: one[0])
        value, sign, error = quality_tables.divergence(metrics).partition(" ±")
        shown.append(Card("Lowest KL", value, f"{label}, nats per token, {split}", sign.strip() + error))
    judged = [one.verdict for one in apart if one.split == split and one.kl is not None]
    if judged:
        others = f"{judged.count('worse')} worse, {judged.count('undecided')} undecided"
        detail = f"than {labels[0]} by KL on {split}; {others}"
        shown.append(Card("Better", f"{judged.count('better')} of {len(judged)}", detail))
    return shown


def _not_comparable(reasons: Sequence[str]) -> list[Part]:
    """List the reasons why the runs do not compare."""
    return [Lines([f"Not comparable: {reason}" for reason in reasons])] if reasons else []


def _quality(summaries: Sequence[Summary], labels: Sequence[str]) -> Table:
    """Make the table of metrics of every run and split."""
    searched = any(summary.search for summary in summaries)
    heads = columns("run'", "split'", "perplexity, dense", "perplexity, compressed", "change", "KL to dense")
    heads += columns("kept", "allocator'", "solver'", "seed", "used", *(["tokens"] if searched else []))
    rows = []
    for label, summary in zip(labels, summaries, strict=True):
        used = summary.used / summary.total
        tokens = summary.search.tokens if summary.search else None
        made = [
            Cell(f"{summary.asked:g}", summary.asked),
            Cell(summary.allocator),
            Cell(summary.solver),
            Cell(str(summary.seed)),
            Cell(formats.significant(used), used),
            *([MISSING if tokens is None else Cell(formats.compact(tokens), tokens)] if searched else []),
        ]
        pairs = list(zip(summary.dense, summary.compressed, strict=True))
        rows += [[Cell(label), Cell(of.split), *quality_cells(dense, of), *made] for dense, of in pairs]
        if not pairs:
            rows.append([Cell(label), Cell("not measured"), *[MISSING] * 4, *made])
    notes = ["± standard error over windows; KL: nats per token; used: of the dense size"]
    notes += [TOKENS_NOTE] if searched else []
    return Table("Every run", heads, rows, notes=notes, tall=len(rows) > 20)


def _apart(found: Sequence[Difference]) -> list[Part]:
    """Make the table of differences to the first run, and list the runs that do not compare."""
    shown = [one for one in found if not one.reasons]
    parts: list[Part] = [Lines(lines)] if (lines := not_compared(found)) else []
    if not shown:
        return parts
    heads = columns("run'", "split'", "KL", "from", "to", "perplexity, %", "from", "to", "by KL'")
    rows = [
        [
            Cell(one.run),
            Cell(one.split),
            *_interval(one.kl),
            *_interval(one.perplexity, 100),
            Cell(one.verdict, alert=one.verdict == "worse"),
        ]
        for one in shown
    ]
    notes = [
        f"ends of {100 * CONFIDENCE:g} % confidence intervals, each by itself",
        "KL: difference in nats per token; perplexity: change; below zero the run is better",
        *not_paired(shown),
    ]
    return [*parts, Table("Differences in loss", heads, rows, notes=notes, tall=len(rows) > 20)]


def _interval(found: Interval | None, scale: float = 1.0) -> list[Cell]:
    """Make the cells of a difference and the ends of its interval."""
    if found is None:
        return [MISSING] * 3
    ends = found.value, found.low, found.high
    return [Cell(text, scale * end) for text, end in zip(found.texts(scale), ends, strict=True)]


def _kinds(summaries: Sequence[Summary], labels: Sequence[str]) -> Table:
    """Make the table of kept fractions by kind, with a column per run."""
    groups = [{group.label: group for group in by_kind(summary.layers)} for summary in summaries]
    kinds = dict.fromkeys(kind for of in groups for kind in of)
    rows = [[Cell(kind), *(share_cell(of[kind].kept) if kind in of else MISSING for of in groups)] for kind in kinds]
    return Table("Kept fraction by kind", columns("kind'", *labels), rows)


def _bits(summaries: Sequence[Summary], labels: Sequence[str]) -> list[Part]:
    """List the bits in which every run stores its numbers; nothing where all have 16."""
    if not any(few_bits(summary.layers) for summary in summaries):
        return []
    rows = [
        (label, text)
        for label, summary in zip(labels, summaries, strict=True)
        for _, text in stored_facts(summary.layers) or [("", "all layers in 16 bits")]
    ]
    return [Facts(rows, "Stored")]


def _costs(summaries: Sequence[Summary], labels: Sequence[str]) -> Table:
    """Make the table of time and memory of every run."""
    rows = []
    for label, summary in zip(labels, summaries, strict=True):
        seconds, peak = tables.whole_cost(summary.stages)
        rows.append([Cell(label), Cell(formats.duration(seconds), seconds), Cell(formats.memory(peak), peak)])
    return Table("Time and memory of every run", columns("run'", "time", "peak memory"), rows)
