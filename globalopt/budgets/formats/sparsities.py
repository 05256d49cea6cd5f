"""Format sparsities: one sparsity per layer in model order, as llm-compressor's `SparseGPTModifier` takes them.

It is written with the names of the layers as `targets`, as the modifier assigns sparsities to them in order; with
`targets: Linear` the order would include `lm_head`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from globalopt.budgets.budget_file import BudgetFile, LayerEntry
from globalopt.budgets.formats.checks import bits_left_out, bits_of_like, check_names, parse_json, refuse_rank
from globalopt.errors import ArtefactError, UsageError
from globalopt.values.budget import Target
from globalopt.values.layer import NM

KEYS = ("targets", "sparsity", "mask_structure")
UNSTRUCTURED = "0:0"
LIST = "a list of sparsities"
TOLERANCE = 1e-6  # of a sparsity against its pattern's


@dataclass(frozen=True)
class Sparsities:
    """Convert numbers of nonzeros to and from sparsities, `1 - nnz / (d_out d_in)`.

    `mask_structure` N:M means N zeros of M weights, where our pattern N:M keeps N of M.

    >>> from globalopt.budgets.budget_file import without_rank
    >>> from globalopt.budgets.example import example_budget
    >>> text, notes = Sparsities().write(without_rank(example_budget()))
    >>> json.loads(text)["sparsity"]
    [0.5, 0.5]
    >>> targets, notes = Sparsities().read("[0.75, 0.25]", like=example_budget())
    >>> [target.nnz for target in targets.values()]
    [8, 24]
    """

    def write(self, file: BudgetFile) -> tuple[str, tuple[str, ...]]:
        """Write the modifier's arguments `targets`, `sparsity` and `mask_structure` as JSON."""
        refuse_rank(file, LIST)
        patterns = {entry.pattern for entry in file.layers}
        if len(patterns) > 1:
            named = ", ".join(sorted(pattern or "unstructured" for pattern in patterns))
            raise UsageError(f"The layers have different patterns ({named}); a list of sparsities has one. Use csv.")
        pattern = NM.parse(patterns.pop() or "unstructured")
        value = {
            "targets": [entry.name for entry in file.layers],
            "sparsity": [1 - entry.nnz / entry.spec.numel for entry in file.layers],
            "mask_structure": f"{pattern.of - pattern.keep}:{pattern.of}" if pattern else UNSTRUCTURED,
        }
        return json.dumps(value, indent=1) + "\n", bits_left_out(file, LIST)

    def read(self, text: str, like: BudgetFile) -> tuple[Mapping[str, Target], tuple[str, ...]]:
        """Parse a list by itself, or the object that `write` writes; one value per layer, per block, or one for all.

        Bits are those of `like`.
        """
        raw = parse_json(text)
        if not isinstance(raw, dict):
            raw = {"sparsity": raw}
        if "sparsity" not in raw:
            raise ArtefactError("it holds no sparsities: neither a list nor an object with a list under 'sparsity'.")
        if unknown := [key for key in raw if key not in KEYS]:
            raise ArtefactError(f"'{unknown[0]}' is not read; known are {', '.join(KEYS)}.")
        sparsity = _numbers(raw["sparsity"])
        pattern = _pattern(raw.get("mask_structure", UNSTRUCTURED))
        layers = _order(raw.get("targets"), like)
        blocks = sorted({entry.block for entry in like.layers})
        notes: tuple[str, ...] = ()
        if len(sparsity) == len(layers):
            given = dict(zip((entry.name for entry in layers), sparsity, strict=True))
        elif len(sparsity) in (1, len(blocks)) and "targets" not in raw:
            of_block = dict(zip(blocks, sparsity * len(blocks) if len(sparsity) == 1 else sparsity, strict=True))
            given = {entry.name: of_block[entry.block] for entry in layers}
            what = "one sparsity was given for all layers" if len(sparsity) == 1 else "one sparsity was given per block"
            notes = (f"{what}; all layers of a block have it.",)
        else:
            raise ArtefactError(
                f"it has {len(sparsity)} sparsities; the model has {len(layers)} layers in {len(blocks)} blocks."
            )
        targets = {entry.name: _target(given[entry.name], entry, pattern) for entry in layers}
        return targets, (*notes, *bits_of_like(like, LIST))


def _numbers(raw: Any) -> list[float]:
    """Check one sparsity or a list of them; `ArtefactError` naming the first that is none."""
    values = raw if isinstance(raw, list) else [raw]
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ArtefactError(f"sparsity {i + 1} is {str(value)[:40]!r}, no number from 0 to 1.")
    return [float(value) for value in values]


def _pattern(mask: Any) -> NM | None:
    """Parse `mask_structure`; None where it stands for no pattern."""
    zeros, colon, of = mask.partition(":") if isinstance(mask, str) else ("", "", "")
    if not (colon and zeros.isdecimal() and of.isdecimal() and len(mask) < 9):
        raise ArtefactError(f"mask_structure is {str(mask)[:40]!r}, not N:M such as 2:4, or {UNSTRUCTURED}.")
    if mask == UNSTRUCTURED:
        return None
    if not 0 < int(zeros) < int(of):
        raise ArtefactError(f"mask_structure {mask} must zero at least 1 and fewer than all of its group.")
    return NM(int(of) - int(zeros), int(of))


def _order(targets: Any, like: BudgetFile) -> tuple[LayerEntry, ...]:
    """Return the layers in the order of the sparsities: that of `targets`, or model order."""
    if targets is None:
        return like.layers
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise ArtefactError("'targets' must be a list of the names of the layers.")
    check_names(targets, like)
    if len(set(targets)) != len(targets):
        raise ArtefactError("'targets' names a layer twice.")
    entries = {entry.name: entry for entry in like.layers}
    return tuple(entries[name] for name in targets)


def _target(sparsity: float, entry: LayerEntry, pattern: NM | None) -> Target:
    """Convert a sparsity into a target; `ArtefactError` where it is not that of the pattern."""
    spec = entry.spec
    if pattern is None:
        return Target(0, round((1 - sparsity) * spec.numel), storage=entry.target.storage)
    nnz = pattern.nnz(spec)
    if abs(sparsity - (1 - nnz / spec.numel)) > TOLERANCE:
        raise ArtefactError(
            f"layer {spec.name} has sparsity {sparsity:g}, but pattern {pattern} means {1 - nnz / spec.numel:g}."
        )
    return Target(0, nnz, pattern, storage=entry.target.storage)
