"""Make the page of a run: its summary, pictures and texts, section by section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from globalopt.values.decomposition import Status
from globalopt.values.layer_results import LayerResult, MatchResult
from globalopt.values.metrics import Metrics
from globalopt.values.results import Details, Summary
from globalopt.values.samples import Samples
from globalopt.values.stage_cost import StageCost
from reports import formats, quality_tables, table_style, tables
from reports.bits import NOTE, bits_text, few_bits
from reports.groups import Group, by_block, by_kind
from reports.html import Card, Cell, Code, Column, Facts, Lines, Page, Part, Picture, SampleText, Section, Table
from reports.menu import Menu
from reports.size import PARTS_NOTE, part_sizes, size_facts, size_title

MISSING = Cell("-", "")

CAPTIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "allocation": ("What every layer keeps and loses, block by kind", ()),
    "error": ("Predicted and actual error of every layer", ("On the dashed line the prediction came true.",)),
    "curves": (
        "Singular values and saliencies of a few layers, up to the rank and the nonzeros that they keep",
        ("The kept entries need not be the largest here: solvers use the whole Gram of the inputs, and move weights.",),
    ),
    "search": ("Predicted and measured loss of the candidates, and measured loss over the tokens of the search", ()),
    "convergence": (
        "Objective of the solver in every layer",
        ("Each layer in its own damped norm, over what keeping nothing would cost.",),
    ),
    "matching": ("Held-out loss of every block before and after matching", ()),
}
"""Alternative text of every picture and notes below it, by the picture's name."""


def run_page(summary: Summary, details: Details, pictures: Sequence[Path], menu: Menu | None = None) -> Page:
    """Make the page of a finished run.

    Args:
        details: curves, traces and samples of the run, as far as it has them.
        pictures: PNGs by `write_figures`, with an SVG beside each.
        menu: limits of what the search had on offer.

    >>> from reports.example import example_summary
    >>> run_page(example_summary(), Details(), pictures=[]).title
    'the bundled reference model, 50 % kept'
    """
    drawn = {path.stem: Picture.read(path, *CAPTIONS[path.stem]) for path in pictures}
    model = table_style.model_name(summary.model)
    unit = table_style.unit_name(summary.accounting)

    def picture(name: str) -> list[Part]:
        return [drawn[name]] if name in drawn else []

    search: list[Part] = []
    if summary.search is not None:
        rows = tables.search_facts(summary, summary.search)
        search = [Facts(rows, notes=(" ".join(tables.SEARCH_NOTE),)), *picture("search")]
    matching: list[Part] = [*picture("matching"), _matched(summary.matching)] if summary.matching else []
    return Page(
        title=f"{model}, {100 * summary.asked:g} % kept",
        lede=f"{summary.allocator} + {summary.solver}: {len(summary.layers)} layers, "
        f"{formats.count(summary.used)} of {formats.count(summary.total)} {unit}",
        cards=cards(summary),
        sections=[
            Section("quality", "Quality", [_quality(summary)]),
            Section("budget", "Budget", [Facts(tables.budget_facts(summary, menu))]),
            Section("size", "Size", [Facts(size_facts(summary)), *_parts(summary)]),
            Section("allocation", "Allocation", [*picture("allocation"), *_groups(summary), layer_table(summary)]),
            Section("curves", "Singular values and saliencies", picture("curves")),
            Section("errors", "Errors", picture("error")),
            Section("search", "Search", search),
            Section("solver", "Solver", picture("convergence")),
            Section("matching", "Matching", matching),
            Section("samples", "Samples", _samples(details.samples)),
            Section("cost", "Cost", [stage_table(summary.stages)]),
            Section("reproduce", "Reproduce", _made_from(summary)),
            Section("notes", "Notes", _notes(summary)),
        ],
        version=summary.versions.get("globalopt", ""),
    )


# ------------------------------------------------------------------------------------------------- cards


def cards(summary: Summary) -> list[Card]:
    """Make the cards with the headline numbers of a run.

    >>> from reports.example import example_summary
    >>> [(card.label, card.value) for card in cards(example_summary())][:2]
    [('KL to dense', '0.00291'), ('Perplexity', '61.0')]
    """
    shown = []
    if summary.compressed:
        first, *others = zip(summary.dense, summary.compressed, strict=True)
        dense, compressed = first
        rest = "".join(f"; {other.split} {quality_tables.divergence(other)}" for _, other in others)
        shown.append(
            _measured_card(
                "KL to dense", quality_tables.divergence(compressed), f"nats per token, {compressed.split}{rest}"
            )
        )
        change = formats.change(dense.perplexity, compressed.perplexity)
        against = f"dense {quality_tables.perplexity(dense)}, {change}, {compressed.split}"
        shown.append(_measured_card("Perplexity", quality_tables.perplexity(compressed), against))
    else:
        shown.append(Card("KL to dense", "not measured", "the run left the evaluation out"))
    unit = table_style.unit_name(summary.accounting)
    of = f"{formats.compact(summary.used)} of {formats.compact(summary.total)} {unit}, asked {summary.asked:g}"
    shown.append(Card("Kept", formats.significant(summary.used / summary.total), of))
    if summary.predicted is not None:
        shown.append(_certificate(summary.predicted, summary.bound))
    if (gain := tables.mean_change(summary.matching)) is not None:
        blocks = sum(match.block is not None for match in summary.matching)
        shown.append(Card("Matching", gain, f"held-out loss of {blocks} blocks, geometric mean"))
    seconds, peak = tables.whole_cost(summary.stages)
    shown.append(Card("Cost", formats.duration(seconds), f"{formats.memory(peak)} at the peak"))
    return shown


def _measured_card(label: str, text: str, detail: str) -> Card:
    """Make a card of a value with its standard error."""
    value, sign, error = text.partition(" ±")
    return Card(label, value, detail, sign.strip() + error)


def _certificate(predicted: float, bound: float | None) -> Card:
    """Make the card of the gap to the proved bound."""
    said = formats.certificate(predicted, bound)
    if bound is None or bound <= 0:
        return Card("Certificate", "none", said)
    gap = max(0.0, predicted - bound) / bound
    return Card("Certificate", "optimal" if gap <= formats.EXACT else f"≤ {formats.at_most(gap)}", said)


# ------------------------------------------------------------------------------------------------- tables


def columns(*titles: str) -> list[Column]:
    """Make columns by their titles: of numbers, or of words where the title ends with a quote mark.

    >>> [(column.title, column.number) for column in columns("kind'", "kept")]
    [('kind', False), ('kept', True)]
    """
    return [Column(title.rstrip("'"), not title.endswith("'")) for title in titles]


def _quality(summary: Summary) -> Part:
    """Make the table of metrics, or say that the run was not measured."""
    if not summary.compressed:
        return Lines([f"{quality_tables.NOT_MEASURED.capitalize()}."])
    rows = [
        [Cell(compressed.split), *quality_cells(dense, compressed)]
        for dense, compressed in zip(summary.dense, summary.compressed, strict=True)
    ]
    heads = columns("split'", "perplexity, dense", "perplexity, compressed", "change", "KL to dense, nats per token")
    notes = ["± standard error over windows", *map(quality_tables.windows_line, summary.compressed)]
    return Table("On text that nothing was chosen on", heads, rows, notes=notes)


def quality_cells(dense: Metrics, compressed: Metrics) -> list[Cell]:
    """Make the cells of both perplexities, their change, and the KL.

    >>> from reports.example import example_metrics
    >>> cells = quality_cells(example_metrics("test", 60.0, None), example_metrics("test", 63.0, 0.003))
    >>> [cell.text for cell in cells]
    ['60.0 ±0.8', '63.0 ±0.8', '+5.0 %', '0.00300 ±0.00008']
    """
    change = Cell(formats.change(dense.perplexity, compressed.perplexity), compressed.perplexity / dense.perplexity)
    kl = Cell(quality_tables.divergence(compressed), "" if compressed.kl is None else compressed.kl)
    return [*(Cell(quality_tables.perplexity(of), of.perplexity) for of in (dense, compressed)), change, kl]


def _groups(summary: Summary) -> list[Part]:
    """Make the tables of layers pooled by kind and by block."""
    unit = table_style.errors_unit(summary)
    whole, few = Group.pool("all", summary.layers), few_bits(summary.layers)
    found: list[Part] = []
    for title, label, groups in (
        ("By kind", "kind'", by_kind(summary.layers)),
        ("By block", "block", by_block(summary.layers)),
    ):
        heads = columns(label, "layers", "kept", "density", "mean rank", "rank share", *(["bits"] if few else []))
        heads += columns("predicted", "actual", "relative")
        rows = [_pooled(group, few) for group in groups]
        notes = [f"predicted, actual: sums in {unit}; rank, relative: means weighted by size", *([NOTE] if few else [])]
        found.append(Table(title, heads, rows, _pooled(whole, few), notes, tall=len(rows) > 16))
    return found


def _parts(summary: Summary) -> list[Part]:
    """Make the table of the bytes of the layers by part; nothing where all layers have 16 bits."""
    sizes = [
        [
            Cell(size.label),
            Cell(formats.count(size.bytes), size.bytes),
            Cell(f"{100 * size.share:.2f} %", size.share, bar=round(100 * size.share, 1)),
            Cell(f"{size.per_weight:.3f}", size.per_weight),
        ]
        for size in part_sizes(summary)
    ]
    whole = "of layers and embeddings" if summary.embeddings else "of the dense layers"
    heads = columns("part'", "bytes", whole, "bits per weight")
    return [Table(size_title(summary), heads, sizes[:-1], sizes[-1], (PARTS_NOTE,))] if sizes else []


def _pooled(group: Group, few: bool) -> list[Cell]:
    """Make the row of pooled layers, with their mean bits where `few`."""
    label = Cell(group.label, int(group.label) if group.label.isdecimal() else None)
    return [
        label,
        Cell(str(group.layers)),
        share_cell(group.kept),
        Cell(f"{group.density:.3f}", group.density),
        Cell(f"{group.rank:.1f}", group.rank),
        Cell(f"{group.rank_share:.3f}", group.rank_share),
        *([Cell(bits_text(group.bits), "" if group.bits is None else group.bits)] if few else []),
        *(_error(value) for value in (group.predicted, group.actual, group.relative)),
    ]


def share_cell(value: float) -> Cell:
    """Make the cell of a fraction, with a bar.

    >>> share_cell(0.25).text, share_cell(0.25).bar
    ('0.250', 25.0)
    """
    return Cell(f"{value:.3f}", value, bar=round(100 * value, 1))


def _error(value: float | None) -> Cell:
    """Make the cell of an error."""
    return MISSING if value is None else Cell(formats.scientific(value), value)


def layer_table(summary: Summary) -> Table:
    """Make the table of all layers: targets, costs, errors, and how the solver ended.

    >>> from reports.example import example_summary
    >>> table = layer_table(example_summary())
    >>> len(table.rows), [cell.text for cell in table.rows[2]][:5]
    (14, ['3', '0', 'v_proj', '128 x 256', '0'])
    """
    patterns = any(layer.pattern for layer in summary.layers)
    few = few_bits(summary.layers)
    heads = columns("layer", "block", "kind'", "shape'", "rank", "nonzeros", *(["N:M'"] if patterns else []))
    heads += columns("bits'") if few else []
    heads += columns("kept", "cost", "density", "rank share", "predicted", "actual", "relative")
    heads += columns("status'", "damping", "time")
    rows = [_layer(n, layer, patterns, few) for n, layer in enumerate(summary.layers, 1)]
    notes = (
        f"cost: {table_style.unit_name(summary.accounting)}; predicted, actual: {table_style.errors_unit(summary)}",
    )
    return Table("Layer by layer", heads, rows, notes=notes, tall=True)


def _layer(number: int, layer: LayerResult, patterns: bool, few: bool) -> list[Cell]:
    """Make the row of a layer, with its pattern where there are `patterns`, and its bits where `few`."""
    return [
        Cell(str(number)),
        Cell(str(layer.block)),
        Cell(layer.kind),
        Cell(f"{layer.d_out} x {layer.d_in}", layer.d_out * layer.d_in),
        Cell(str(layer.rank)),
        Cell(formats.count(layer.nnz), layer.nnz),
        *([Cell(layer.pattern or "-")] if patterns else []),
        *([Cell(layer.storage)] if few else []),
        share_cell(layer.kept),
        Cell(formats.count(layer.cost), layer.cost),
        Cell(f"{layer.density:.3f}", layer.density),
        Cell(f"{layer.rank_share:.3f}", layer.rank_share),
        *(_error(value) for value in (layer.predicted, layer.actual, layer.relative)),
        Cell(layer.status, alert=Status(layer.status) is not Status.CONVERGED),
        Cell(f"{layer.damping:g}", layer.damping),
        Cell(formats.duration(layer.seconds), layer.seconds),
    ]


def _matched(matching: Sequence[MatchResult]) -> Table:
    """Make the table of matching."""
    heads = columns("block", "loss'", "before", "after", "change", "epochs", "kept", "time")
    rows = [
        [
            Cell("model", "") if match.block is None else Cell(str(match.block)),
            Cell(match.loss),
            Cell(formats.significant(match.before), match.before),
            Cell(formats.significant(match.after), match.after),
            Cell(formats.change(match.before, match.after), match.after / match.before) if match.before else MISSING,
            Cell(str(match.epochs)),
            Cell(str(match.kept_epoch) if match.kept_epoch else "start", match.kept_epoch),
            Cell(formats.duration(match.seconds), match.seconds),
        ]
        for match in matching
    ]
    return Table("Block by block", heads, rows, notes=(tables.MATCHING_NOTE,), tall=len(rows) > 16)


def stage_table(stages: Sequence[StageCost]) -> Table:
    """Make the table of time and peak memory per stage.

    >>> table = stage_table([StageCost("capture", 2.0, 2**30), StageCost("refine", 6.0, 2**30)])
    >>> [cell.text for cell in table.rows[1]]
    ['refine', '6.00 s', '75 %', '1 GiB']
    """
    whole, peak = tables.whole_cost(stages)
    rows = [
        [
            Cell(stage.name),
            Cell(formats.duration(stage.seconds), stage.seconds),
            _part(stage.seconds, whole),
            Cell(formats.memory(stage.peak_bytes), stage.peak_bytes),
        ]
        for stage in stages
    ]
    total = [Cell("all"), Cell(formats.duration(whole)), Cell(""), Cell(formats.memory(peak))]
    return Table("Time and memory of every stage", columns("stage'", "time", "share", "peak memory"), rows, total)


def _part(seconds: float, whole: float) -> Cell:
    """Make the cell of a stage's share of the time, with a bar."""
    share = 100 * seconds / whole if whole else 0.0
    return Cell(f"{share:.0f} %", share, bar=round(share, 1))


# ------------------------------------------------------------------------------------------------- texts


def _samples(samples: Samples | None) -> list[Part]:
    """Make the parts of the section on samples."""
    if samples is None:
        return []
    if samples.skipped is not None:
        return [Lines([f"None: {samples.skipped}."])]
    note = (
        f"Beginnings of {samples.split} windows, {samples.prompt_tokens} tokens, and the {samples.new_tokens} most "
        "likely next ones. Marked: from where the models part."
    )
    found: list[SampleText] = []
    for sample in samples.samples:
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(sample.dense, sample.compressed, strict=False))
        shared = "".join(one for one, _ in alike)
        ends = [text.removeprefix(shared) for text in (sample.dense, sample.compressed)]
        agreed = f"{sample.agreed} of {samples.new_tokens} tokens before the first that differs"
        if sample.agreed == samples.new_tokens:
            agreed = f"the same {sample.agreed} tokens"
        found.append(SampleText(sample.prompt, shared, ends[0], ends[1], agreed))
    return [*found[:-1], replace(found[-1], notes=(note,))] if found else []


def _made_from(summary: Summary) -> list[Part]:
    """Make the parts that tell how to reproduce the run."""
    splits = [
        (name, ", ".join(f"{key} {_short(value)}" for key, value in made.items() if value is not None))
        for name, made in summary.splits.items()
    ]
    return [
        Code(summary.command, "Command"),
        Facts([("seed", str(summary.seed)), *summary.versions.items()], "Versions"),
        Facts(splits, "Text"),
    ]


def _short(value: object) -> str:
    """Format a value of the metadata; lists by their length."""
    return f"({len(value)} of them)" if isinstance(value, list | tuple) and len(value) > 2 else str(value)


def _notes(summary: Summary) -> list[Part]:
    """List statuses other than converged with advice, and the run's notes."""
    lines = [f"{status.value}: {advice}" for status, advice in tables.troubles(summary)]
    lines += summary.notes
    return [Lines(lines)] if lines else []
