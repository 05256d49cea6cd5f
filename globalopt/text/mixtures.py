"""Mix the windows of several texts by weight.

A mixture is written `TEXT:WEIGHT,TEXT:WEIGHT`. Of `n` windows a part of weight `w` gives `w n`, rounded so that all add
up to `n`, and those of every part are spread evenly over the split: the first windows of it, on which some stages
work alone, are a mixture too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from globalopt import reference
from globalopt.errors import CalibrationError, UsageError
from globalopt.text.regions import LEAST_WINDOWS, Region
from globalopt.text.windows import Split
from globalopt.values.own_text import NAME as SELF


@dataclass(frozen=True)
class Part:
    """Name a text of a mixture, with its share of the windows.

    Args:
        spec: file, folder, data set, `reference` or `self`.
        weight: share of the windows, in (0, 1]; 1 is a text that is not mixed.

    >>> Part("a.txt", 0.7).own
    False
    """

    spec: str
    weight: float = 1.0

    @property
    def own(self) -> bool:
        """Tell whether the dense model writes this text itself."""
        return self.spec == SELF

    @property
    def bundled(self) -> bool:
        """Tell whether it is the text that comes with the program."""
        return self.spec == reference.NAME


def parse_mixture(spec: str) -> tuple[Part, ...]:
    """Read the texts of `--calibration` with their weights, which are divided by their sum.

    The name of a file or a folder that exists is one text, whatever it holds, and so is a name without a comma.

    Raises:
        UsageError: a part has no weight or one that is not positive, or is named twice.

    >>> [(part.spec, part.weight) for part in parse_mixture("a.txt:3,reference:1")]
    [('a.txt', 0.75), ('reference', 0.25)]
    >>> parse_mixture("owner/name@config:train")
    (Part(spec='owner/name@config:train', weight=1.0),)
    """
    if "," not in spec or _is_there(spec):
        return (Part(spec),)
    found: dict[str, float] = {}
    for word in spec.split(","):
        name, colon, weight = (piece.strip() for piece in word.rpartition(":"))
        try:
            value = float(weight) if colon and name else math.nan
        except ValueError:
            value = math.nan
        if math.isnan(value):
            raise UsageError(
                f"Part '{word.strip()}' of --calibration has no weight; a mixture is TEXT:WEIGHT,TEXT:WEIGHT, and no "
                f"file is named '{spec}'."
            )
        if not 0 < value < math.inf:
            raise UsageError(f"Part '{name}' of --calibration has the weight {weight}; weights are positive numbers.")
        if name in found:
            raise UsageError(f"Part '{name}' of --calibration is named twice; give it once, with one weight.")
        found[name] = value
    total = sum(found.values())
    return tuple(Part(name, value / total) for name, value in found.items())


def _is_there(name: str) -> bool:
    """Tell whether there is a file or folder of this name; a mixture may be too long for one."""
    try:
        return Path(name).exists()
    except OSError:
        return False


def apportion(count: int, parts: Sequence[Part]) -> list[int]:
    """Divide a number of windows in proportion to weights: shares rounded down, and the rest to the largest remainders.

    >>> apportion(8, [Part("a.txt", 0.7), Part("b.txt", 0.3)])
    [6, 2]
    """
    shares = [count * part.weight for part in parts]
    # A share such as 3.0000000000000004 or 2.9999999999999996 is a whole number.
    found = [math.floor(share + 1e-9) for share in shares]
    rest = sorted(range(len(parts)), key=lambda i: (found[i] - shares[i], i))
    for i in rest[: count - sum(found)]:
        found[i] += 1
    return found


def mixed(spec: str, parts: Sequence[tuple[Part, Region]], count: int | None, seqlen: int, seed: int) -> Split:
    """Choose the windows of one split from the regions of several texts, by their weights.

    Args:
        spec: the mixture, as the user gave it.
        parts: with the region of each for this split.
        count: calibration windows; of other splits the most, where a short text makes them fewer in all parts alike;
            None is as many as there are.
        seed: of random windows, and of the order in which calibration windows of different parts follow each other.
    Raises:
        CalibrationError: a part gets no window.

    >>> made = [Region("test", name, name, torch.arange(20) + i, 0, 20, 0) for i, name in ((0, "a"), (100, "b"))]
    >>> split = mixed("a:2,b:1", [(Part("a", 2 / 3), made[0]), (Part("b", 1 / 3), made[1])], 3, seqlen=2, seed=0)
    >>> split.windows.tolist()
    [[0, 1], [100, 101], [2, 3]]
    """
    name = parts[0][1].name
    counts = _counts(name, parts, count, seqlen)
    splits = [region.fill(n, seqlen, seed) for n, (_, region) in zip(counts, parts, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    places: list[tuple[float, int, int]] = []
    for i, n in enumerate(counts):
        # Where the first window of a part stands: by chance, but in the same place in texts that are measured on.
        offset = float(torch.rand((), generator=generator)) if name == "calibration" else 0.5
        places += [((k + offset) / n, i, k) for k in range(n)]
    windows = torch.stack([splits[i].windows[k] for _, i, k in sorted(places)])
    hashed = hashlib.sha256("".join(split.text_sha256 for split in splits).encode()).hexdigest()
    body = splits[0].body
    return replace(
        splits[0],
        windows=windows,
        starts=tuple(body * i for i in range(len(windows))),
        region=(0, body * len(windows)),
        source=spec,
        text_sha256=hashed,
        special_tokens=sum(split.special_tokens for split in splits),
        seed=seed if name == "calibration" else None,
        details={},
        parts=tuple((part.weight, split) for (part, _), split in zip(parts, splits, strict=True)),
    )


def share_out(name: str, count: int, parts: Sequence[Part]) -> list[int]:
    """Divide the windows of a split over the parts of a mixture; `CalibrationError` naming one that gets none.

    >>> share_out("validation", 10, [Part("a.txt", 0.5), Part("self", 0.5)])
    [5, 5]
    """
    found = apportion(count, parts)
    if 0 in found:
        part = parts[found.index(0)]
        option = "--nsamples" if name == "calibration" else "--eval-windows"
        raise CalibrationError(
            f"Part '{part.spec}' of --calibration, of weight {part.weight:.3g}, gets none of {count} {name} windows. "
            f"Raise its weight or {option}."
        )
    return found


def _counts(name: str, parts: Sequence[tuple[Part, Region]], count: int | None, seqlen: int) -> list[int]:
    """Divide the windows of a split over its parts: all of them for calibration, else as many as every part has."""
    weighted = [part for part, _ in parts]
    room = [region.capacity(seqlen) for _, region in parts]
    most = sum(room) if count is None else count
    found = share_out(name, most, weighted)
    if name == "calibration":
        # Random windows may overlap.
        return found
    for n in range(most, LEAST_WINDOWS - 1, -1):
        found = apportion(n, weighted)
        if all(0 < k <= has for k, has in zip(found, room, strict=True)):
            return found
    part, has = min(zip(weighted, room, strict=True), key=lambda pair: pair[1] / pair[0].weight)
    raise CalibrationError(
        f"Part '{part.spec}' of --calibration has room for {has} {name} windows of {seqlen} tokens, too few for its "
        f"weight {part.weight:.3g} beside the others. Give a longer text, or lower its weight or --seqlen."
    )
