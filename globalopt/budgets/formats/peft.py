"""Format peft: ranks as PEFT's `LoraConfig` reads them from `adapter_config.json`, which cannot express sparsity.

A key of `rank_pattern` is a regular expression that must match a layer's name from the start of one of its parts to the
end; the first that matches is used. PEFT scales an adapter by `alpha / r`, so that alpha is written as the rank.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from globalopt.budgets.budget_file import BudgetFile
from globalopt.budgets.formats.checks import bits_left_out, bits_of_like, parse_json
from globalopt.errors import ArtefactError, UsageError
from globalopt.values.budget import Target

ALL_LINEAR = "all-linear"

# They change the layers that a pattern matches, in ways that depend on PEFT's defaults.
NOT_READ = ("layers_to_transform", "layers_pattern", "exclude_modules", "layer_replication")


@dataclass(frozen=True)
class Peft:
    """Convert ranks to and from a PEFT config; the sparse parts belong to the model under the adapter.

    >>> from globalopt.budgets.example import example_budget
    >>> text, notes = Peft().write(example_budget())
    >>> json.loads(text)["rank_pattern"].values()
    dict_values([1])
    >>> targets, notes = Peft().read('{"r": 2, "target_modules": ["down_proj"]}', like=example_budget())
    >>> {name: target.rank for name, target in targets.items()}
    {'model.layers.0.mlp.up_proj': 0, 'model.layers.0.mlp.down_proj': 2}
    """

    def write(self, file: BudgetFile) -> tuple[str, tuple[str, ...]]:
        """Write a config with one pattern per rank: PEFT tries every pattern on every layer, and `re` caches few."""
        ranks = {entry.name: entry.rank for entry in file.layers if entry.rank}
        if not ranks:
            raise UsageError("No layer has a low-rank part; a PEFT config would be empty. Convert to csv.")
        names = defaultdict(list)
        for name, rank in ranks.items():
            names[rank].append(re.escape(name))
        patterns = {f"(?:{'|'.join(names[rank])})": rank for rank in sorted(names)}
        most = max(ranks.values())
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": most,
            "lora_alpha": most,
            "target_modules": list(ranks),
            "rank_pattern": patterns,
            "alpha_pattern": patterns,
        }
        sparse = sum(1 for entry in file.layers if entry.nnz)
        notes = [f"the nonzeros of {sparse} layers are not in it: PEFT knows ranks only."] if sparse else []
        return json.dumps(config, indent=1) + "\n", (*notes, *bits_left_out(file, "PEFT"))

    def read(self, text: str, like: BudgetFile) -> tuple[Mapping[str, Target], tuple[str, ...]]:
        """Parse a config, or a `rank_pattern` by itself; nonzeros, N:M patterns and bits are those of `like`."""
        raw = parse_json(text)
        if not isinstance(raw, dict):
            raise ArtefactError("it is no PEFT config: not an object.")
        if "rank_pattern" not in raw and "r" not in raw:
            raw = {"rank_pattern": raw}
        if used := [name for name in NOT_READ if raw.get(name) not in (None, [], {})]:
            raise ArtefactError(f"'{used[0]}' is not read. List the layers in full under target_modules.")
        patterns = _patterns(raw.get("rank_pattern") or {})
        names = [entry.name for entry in like.layers]
        rank = raw.get("r")
        modules = raw.get("target_modules")
        if rank is None:
            chosen = set(names)
        elif modules is None:
            raise ArtefactError("it has no target_modules: which layers have rank r is not said.")
        else:
            chosen = _targeted(modules, names)
        default = 0 if rank is None else _rank(rank, "r")
        found: dict[str, int] = {}
        used_patterns: set[str] = set()
        for name in names:
            pattern = next((key for key, compiled in patterns.items() if compiled[0].match(name)), None)
            if pattern is not None:
                used_patterns.add(pattern)
            found[name] = 0 if name not in chosen else default if pattern is None else patterns[pattern][1]
        if unused := patterns.keys() - used_patterns:
            raise ArtefactError(f"rank_pattern '{min(unused)[:60]}' matches no layer of the model.")
        targets = {}
        for entry in like.layers:
            targets[entry.name] = replace(entry.target, rank=found[entry.name])
        return targets, ("the nonzeros are those of --like: PEFT knows ranks only.", *bits_of_like(like, "PEFT"))


def _patterns(raw: Any) -> dict[str, tuple[re.Pattern[str], int]]:
    """Parse a `rank_pattern`: by key, the compiled expression and the rank."""
    if not isinstance(raw, dict):
        raise ArtefactError("rank_pattern must map patterns to ranks.")
    patterns = {}
    for key, rank in raw.items():
        try:
            compiled = re.compile(rf"(.*\.)?({key})$")
        except (re.error, OverflowError, RecursionError) as cause:
            raise ArtefactError(f"rank_pattern '{key[:60]}' is no regular expression ({cause}).") from None
        patterns[key] = compiled, _rank(rank, f"rank_pattern '{key[:60]}'")
    return patterns


def _rank(value: Any, where: str) -> int:
    """Check a rank; `ArtefactError` naming the place `where` it is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ArtefactError(f"{where} is {str(value)[:40]!r}, no rank.")
    return value


def _targeted(modules: Any, names: list[str]) -> set[str]:
    """Find the layers that `target_modules` selects: a list by whole last parts of names, a string as an expression."""
    if modules == ALL_LINEAR:
        return set(names)
    if isinstance(modules, str):
        try:
            return {name for name in names if re.fullmatch(modules, name)}
        except re.error as cause:
            raise ArtefactError(f"target_modules is no regular expression ({cause}).") from None
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise ArtefactError("target_modules must be a list of names, or a regular expression.")
    reached = set()
    for module in modules:
        these = {name for name in names if name == module or name.endswith(f".{module}")}
        if not these:
            raise ArtefactError(f"target_modules names '{module[:60]}', which is no compressible layer of the model.")
        reached |= these
    return reached
