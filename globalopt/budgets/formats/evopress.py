"""Format evopress: a line `layer: level` per layer, as EvoPress's search over sparsities writes and loads it.

The sparsity of a layer is `sparsity + level step / numel`, with one `sparsity` and one `step`, a number of weights, for
all layers. Both belong to the database of pruned layers (`prune.py --sparsity --weights_diff`) and are not in the file.
Source: EvoPress, arXiv:2410.14649.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from globalopt.budgets.budget_file import BudgetFile
from globalopt.budgets.formats.checks import bits_left_out, bits_of_like, check_names, refuse_rank
from globalopt.errors import ArtefactError, UsageError
from globalopt.values.budget import Target

MOST_WEIGHTS = 2**53  # whole numbers of float64
LEVELS = 8  # each way, which EvoPress makes unless told otherwise


@dataclass(frozen=True)
class EvoPress:
    """Convert numbers of nonzeros to and from levels of `step` weights, with level 0 at `sparsity`.

    Args:
        sparsity: of level 0, in [0, 1); None: that of the whole budget, for writing only.
        step: weights per level.
    Raises:
        UsageError: `sparsity` or `step` is out of its range.

    >>> from globalopt.budgets.budget_file import without_rank
    >>> from globalopt.budgets.example import example_budget
    >>> text, notes = EvoPress(sparsity=0.75, step=4).write(without_rank(example_budget()))
    >>> print(text)
    model.layers.0.mlp.up_proj: -2
    model.layers.0.mlp.down_proj: -2
    """

    sparsity: float | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise UsageError(f"--level-sparsity is the sparsity of level 0, in [0, 1); got {self.sparsity:g}.")
        if self.step is not None and not 1 <= self.step <= MOST_WEIGHTS:
            raise UsageError(f"--level-step is a number of weights, from 1 to 2^53; got {self.step}.")

    def write(self, file: BudgetFile) -> tuple[str, tuple[str, ...]]:
        """Write the nearest level of every layer; notes tell the rounding, and the options that read the file back."""
        refuse_rank(file, "EvoPress")
        if patterned := [entry.name for entry in file.layers if entry.pattern]:
            raise UsageError(f"Layer {patterned[0]} has a pattern, which EvoPress cannot carry. Convert to csv.")
        step = self._step()
        nnz = sum(entry.nnz for entry in file.layers)
        sparsity = 1 - nnz / sum(entry.spec.numel for entry in file.layers) if self.sparsity is None else self.sparsity
        levels = {entry.name: round(((1 - sparsity) * entry.spec.numel - entry.nnz) / step) for entry in file.layers}
        made = {entry.name: _nnz(sparsity, step, levels[entry.name], entry.spec.numel) for entry in file.layers}
        notes = [f"--level-sparsity {sparsity!r} --level-step {step} reads them back; the file does not say it."]
        off = [abs(made[entry.name] - entry.nnz) for entry in file.layers]
        if rounded := sum(map(bool, off)):
            change = sum(made.values()) - nnz
            notes.append(
                f"{rounded} layers do not lie on a level and were rounded, by at most {max(off)} nonzeros; "
                f"{change:+d} in all."
            )
        if (most := max(map(abs, levels.values()))) > LEVELS:
            notes.append(f"the farthest level is {most}; EvoPress makes {LEVELS} each way by default (--num_levels).")
        notes += bits_left_out(file, "EvoPress")
        return "\n".join(f"{name}: {level}" for name, level in levels.items()), tuple(notes)

    def read(self, text: str, like: BudgetFile) -> tuple[Mapping[str, Target], tuple[str, ...]]:
        """Parse lines in any order; every rank is 0, bits are those of `like`."""
        step = self._step()
        if self.sparsity is None:
            raise UsageError(
                "Levels mean nothing without the sparsity of level 0: add --level-sparsity (prune.py --sparsity)."
            )
        levels: dict[str, int] = {}
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            name, _, level = (part.strip() for part in line.rpartition(":"))
            if not name or not re.fullmatch(r"-?[0-9]{1,9}", level):
                raise ArtefactError(f"line {number} is '{line[:60]}', not 'layer: level'.")
            if name in levels:
                raise ArtefactError(f"line {number} lists layer {name} a second time.")
            levels[name] = int(level)
        check_names(levels, like)
        targets = {}
        for entry in like.layers:
            nnz = _nnz(self.sparsity, step, levels[entry.name], entry.spec.numel)
            if not 0 <= nnz <= entry.spec.numel:
                raise ArtefactError(
                    f"level {levels[entry.name]} of layer {entry.name} would leave {nnz} of its {entry.spec.numel} "
                    "weights; --level-sparsity or --level-step is not that of the database."
                )
            targets[entry.name] = Target(0, nnz, storage=entry.target.storage)
        return targets, bits_of_like(like, "EvoPress")

    def _step(self) -> int:
        """Return the step; `UsageError` where none was given."""
        if self.step is None:
            raise UsageError("EvoPress's levels need --level-step, the weights per level (prune.py --weights_diff).")
        return self.step


def _nnz(sparsity: float, step: int, level: int, numel: int) -> int:
    """Compute the number of nonzeros at a level."""
    return round((1 - sparsity) * numel - level * step)
