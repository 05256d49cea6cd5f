"""Hold the rows and results of `peers.py`, and write them as tables in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

from environments import HERE, Cost

NONE = "-"
"""What stands for a figure that there is none of."""


@dataclass(frozen=True)
class Row:
    """Describe one method in the programs that have it.

    Args:
        title: in tables.
        peer: what the job of llm-compressor says of it; None: it has no such method.
        ours: command and options of globalopt; none: it has no such method.
        against: the row whose result by llm-compressor it is compared with; "" is this one.
    """

    title: str
    peer: Mapping[str, Any] | None = None
    ours: tuple[str, ...] = ()
    against: str = ""

    @property
    def bits(self) -> int:
        """Return the bits to which weights are rounded; 0 where they are not."""
        return (self.peer or {}).get("bits", 0)

    @property
    def pattern(self) -> str:
        """Return the pattern of the pruned weights, in the words of globalopt."""
        structure = (self.peer or {}).get("mask_structure", "0:0")
        return "unstructured" if structure == "0:0" else structure


@dataclass(frozen=True)
class Made:
    """Hold what one run of a program took.

    Args:
        cost: of the whole process.
        sha256: of the weights that were saved.
        versions: of its packages.
    """

    cost: Cost
    sha256: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Quality:
    """Hold the size and the losses of a model.

    Args:
        kept, bytes: shares of the parameters and of the 16-bit bytes of the compressed layers.
        nll, kl: of every window, in nats per token.
    """

    kept: float
    bytes: float
    perplexity: float
    dense_perplexity: float
    nll: tuple[float, ...]
    kl: tuple[float, ...]


@dataclass(frozen=True)
class Result:
    """Hold the repeats of one program on one row, and the quality of the first."""

    row: str
    program: str
    made: tuple[Made, ...]
    quality: Quality


def mean_and_error(values: Sequence[float], digits: int = 4, sign: str = "") -> str:
    """Format the mean of values and its standard error.

    >>> mean_and_error([0.1, 0.3])
    '0.2000 ± 0.1000'
    """
    error = stdev(values) / len(values) ** 0.5
    return f"{fmean(values):{sign}.{digits}f} ± {error:.{digits}f}"


def ratio_of(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """Format the median of ratios of values that belong together, and their range where there are several.

    >>> ratio_of([1.0, 3.0, 2.0], [2.0, 2.0, 2.0])
    '1.00 (0.50 to 1.50)'
    """
    ratios = [a / b for a, b in zip(mine, theirs, strict=False)]
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{median(ratios):.2f}{spread}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table whose first two columns are words.

    >>> print(table(["method", "by", "s"], [["Wanda", "us", "3"]]))
    | method | by | s |
    |---|---|--:|
    | Wanda | us | 3 |
    """
    rule = ["---"] * 2 + ["--:"] * (len(columns) - 2)
    lines = [columns, *rows]
    return "\n".join(
        [f"| {' | '.join(lines[0])} |", f"|{'|'.join(rule)}|", *(f"| {' | '.join(line)} |" for line in lines[1:])]
    )


def compared(rows: Mapping[str, Row], results: Sequence[Result], result: Result) -> Result | None:
    """Return the result of llm-compressor that one of globalopt is compared with, if there is one."""
    if result.program != HERE:
        return None
    name = rows[result.row].against or result.row
    return next((each for each in results if each.row == name and each.program != HERE), None)


def quality_table(rows: Mapping[str, Row], results: Sequence[Result]) -> str:
    """Format sizes and losses, the dense model first."""
    dense = f"{results[0].quality.dense_perplexity:.2f}"
    lines = [["dense", "", "1.000", "1.000", dense, *[NONE] * 4]]
    for result in results:
        own, other = result.quality, compared(rows, results, result)
        line = [rows[result.row].title, result.program, f"{own.kept:.4f}", f"{own.bytes:.4f}"]
        line += [f"{own.perplexity:.2f}", mean_and_error(own.kl)]
        if other is None:
            line += [NONE] * 3
        else:
            theirs = other.quality
            line.append(f"{fmean(own.kl) / fmean(theirs.kl):.3f}")
            for mine, his in ((own.kl, theirs.kl), (own.nll, theirs.nll)):
                line.append(mean_and_error([a - b for a, b in zip(mine, his, strict=True)], sign="+"))
        lines.append(line)
    columns = ["method", "program", "kept", "bytes", "perplexity", "KL to dense", "ratio", "difference", "in log ppl"]
    return table(columns, lines)


def cost_table(rows: Mapping[str, Row], results: Sequence[Result]) -> str:
    """Format what the programs took, medians over repeats."""
    fields: tuple[tuple[Callable[[Cost], float], str], ...] = (
        (lambda cost: cost.cpu, ".1f"),
        (lambda cost: cost.wall, ".1f"),
        (lambda cost: cost.peak / 2**30, ".2f"),
    )
    lines = []
    for result in results:
        other = compared(rows, results, result)
        line = [rows[result.row].title, result.program]
        for field, digits in fields:
            own = [field(made.cost) for made in result.made]
            line.append(f"{median(own):{digits}}")
            line.append(ratio_of(own, [field(made.cost) for made in other.made]) if other else NONE)
        lines.append(line)
    return table(["method", "program", "CPU s", "ratio", "wall s", "ratio", "peak GiB", "ratio"], lines)


def versions_of(results: Sequence[Result]) -> list[str]:
    """Describe the packages of every program, once each."""
    lines = []
    for program in dict.fromkeys(result.program for result in results):
        found = {
            ", ".join(f"{name} {version}" for name, version in made.versions.items())
            for result in results
            if result.program == program
            for made in result.made
        }
        lines.append(f"* {program}: {'; or '.join(sorted(found))}.")
    return lines


def document(rows: Mapping[str, Row], facts: Mapping[str, Any], results: Sequence[Result]) -> str:
    """Write the tables, with what they were measured on."""
    unstable = [
        f"{rows[each.row].title} by {each.program}" for each in results if len({made.sha256 for made in each.made}) > 1
    ]
    repeats = max(len(result.made) for result in results)
    notes = [
        f"* Model {facts['model']}: {facts['layers']} layers of {facts['weights']:,} weights.",
        f"* Calibration: {facts['calibration']}. Evaluation: {facts['evaluation']}.",
        f"* Threads: {facts['threads']}. Windows in a batch: {facts['batch_size']}. Repeats: {repeats}.",
        *versions_of(results),
        *([f"* Repeats saved different models: {', '.join(unstable)}."] if unstable else []),
    ]
    legend = (
        "kept, bytes: shares of the parameters and of the 16-bit bytes of the compressed layers. KL and differences in "
        "nats per token, ± standard errors over windows, differences paired by window. Ratios and differences are to "
        "llm-compressor; ratios of costs are medians over repeats."
    )
    return "\n\n".join(
        [
            f"# {facts['model']}, by llm-compressor and by globalopt",
            "\n".join(notes),
            quality_table(rows, results),
            cost_table(rows, results),
            legend + "\n",
        ]
    )
