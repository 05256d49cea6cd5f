"""Sparse plus low-rank with a sign plane (SLaB) against sparse plus low-rank, at equal bits per weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from contenders import Contender, Outcome, measure, repetitions, say
from finished_cells import Cells
from layer_problems import RANK_SHARE, Problem, geometric_mean
from rich.console import Group as Stack
from rich.text import Text

from globalopt.errors import UsageError
from globalopt.values.budget import BYTES_PER_VALUE, Budget, Target
from globalopt.values.layer import LayerSpec
from reports import formats
from reports.table_style import add_numbers, footed, report_table


@dataclass(frozen=True)
class BitsCell:
    """One contender on one problem at `bits` per weight; `used` is what its target takes of them."""

    problem: str
    bits: float
    used: float
    contender: str
    outcome: Outcome

    def record(self) -> dict[str, Any]:
        outcome = {**asdict(self.outcome), "gemms": self.outcome.gemms}
        return {"problem": self.problem, "bits": self.bits, "used": self.used, "contender": self.contender, **outcome}


def target_at(bits: float, spec: LayerSpec, contender: Contender) -> Target:
    """As many nonzeros as `bits` per weight hold, indices counted, beside rank and signs.

    With signs the rank is 1, as published; without them `RANK_SHARE` of the bits go to the factors, none where the
    contender has no low rank.

    Raises:
        UsageError: the bits are not above 0 and at most 16, or do not hold the signs.
    """
    dense = BYTES_PER_VALUE * spec.numel
    if not 0 < bits <= 8 * BYTES_PER_VALUE:
        raise UsageError(f"--bits are per weight, above 0 and at most {8 * BYTES_PER_VALUE}; got {bits:g}.")
    budget = Budget(limit=max(1, math.floor(bits * spec.numel / 8)), total=dense, accounting="bytes")
    if contender.signs:
        least = Target(1, 0, signs=True)
    elif contender.low_rank:
        factors = BYTES_PER_VALUE * (spec.d_out + spec.d_in)
        least = Target(min(spec.max_rank, math.floor(RANK_SHARE * budget.limit / factors)), 0)
    else:
        least = Target(0, 0)
    target = budget.grow(least, spec, "nnz", spec.numel, budget.limit)
    if target.nnz == 0:
        raise UsageError(
            f"Layer {spec.name}: {bits:g} bits per weight leave {contender.label} no nonzero; raise --bits."
        )
    return target


def measure_all(
    problems: Sequence[Problem], field: Sequence[Contender], bits: Sequence[float], repeats: int, cells: Cells
) -> list[BitsCell]:
    """All cells, in the order of problems, bits, contenders; finished ones are read back."""
    wanted = [
        (problem, share, contender, target_at(share, problem.spec, contender))
        for problem in problems
        for share in bits
        for contender in field
    ]
    made: list[BitsCell] = []
    for problem, share, contender, target in wanted:
        what, times = f"{problem.name} {share:g}-bits {contender.label}", repetitions(problem, repeats)
        outcome = cells.get(
            Outcome,
            what,
            {"problem": problem.sha256, "repeats": times, "target": asdict(target)},
            partial(measure, problem, target, contender, times),
        )
        used = 8 * target.bytes(problem.spec) / problem.spec.numel
        made.append(BitsCell(problem.name, share, used, contender.label, outcome))
        say(len(made), len(wanted), what, outcome)
    return made


def table(made: Sequence[BitsCell]) -> Stack:
    """Every problem and number of bits as a row with the errors of all contenders, then their geometric means."""
    labels = list(dict.fromkeys(cell.contender for cell in made))
    problems = list(dict.fromkeys(cell.problem for cell in made))
    sizes = list(dict.fromkeys(cell.bits for cell in made))
    found = {(cell.problem, cell.bits, cell.contender): cell.outcome.rel_error for cell in made}
    rows = report_table("Relative error at equal bits per weight")
    add_numbers(rows, ("bits",))
    rows.add_column("problem", overflow="fold")
    add_numbers(rows, labels)
    for bits in sizes:
        for problem in problems:
            rows.add_row(
                f"{bits:g}", Text(problem), *(formats.scientific(found[problem, bits, label]) for label in labels)
            )
        means = [geometric_mean([found[problem, bits, label] for problem in problems]) for label in labels]
        rows.add_row(f"{bits:g}", "geometric mean", *map(formats.scientific, means), style="bold")
        rows.add_section()
    return footed(
        rows,
        f"means over: {', '.join(problems)}",
        f"every target uses at least {min(cell.used / cell.bits for cell in made):.2%} of its bits",
        "counted: factors and values at 16 bits, the cheapest index, the sign plane at 1 bit per weight",
        f"with signs rank 1; otherwise {RANK_SHARE:g} of the bits in the factors",
    )
