"""Modules import only what lies below them.

4  globalopt/__init__, __main__, api, cli, commands, family, pipeline, refining, stages   everything
3  solvers, allocators, reports                    below, and their own folder; never each other
2  other modules of globalopt
1  globalopt/kernels
0  globalopt/types, protocols, errors, summary     of other people's packages, torch alone
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("globalopt", "allocators", "solvers", "reports")
BOTTOM = {"types", "protocols", "errors", "summary"}
TOP = {"__main__", "api", "cli", "commands", "family", "pipeline", "refining", "stages"}

Sources = dict[str, str]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def our_sources() -> Sources:
    return {module_name(path): path.read_text() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}


def layer(module: str) -> int:
    first, *rest = module.split(".")
    if first != "globalopt":
        return 3
    if not rest or rest[0] in TOP:
        return 4
    if rest[0] in BOTTOM:
        return 0
    return 1 if rest[0] == "kernels" else 2


def imported(module: str, source: str, modules: Sources, is_package: bool) -> Iterator[str]:
    """Modules that `source` imports, wherever in it; `from a import b` is `a.b` where that is a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if name in modules else base


def violations(modules: Sources) -> list[str]:
    packages = {name.rpartition(".")[0] for name in modules} | set(FOLDERS)
    found = []
    for module, source in sorted(modules.items()):
        for other in imported(module, source, modules, module in packages):
            ours = other.split(".")[0] in FOLDERS
            if not ours:
                outside = other.split(".")[0]
                if layer(module) == 0 and outside != "torch" and outside not in sys.stdlib_module_names:
                    found.append(f"{module} imports {other}; of other people's packages it may import torch alone")
            elif layer(other) > layer(module):
                found.append(f"{module} (layer {layer(module)}) imports {other} (layer {layer(other)})")
            elif layer(module) == layer(other) == 3 and module.split(".")[0] != other.split(".")[0]:
                found.append(f"{module} imports {other}; these folders never import each other")
    return found


def test_no_module_imports_what_lies_above_it():
    assert violations(our_sources()) == []


def test_every_folder_was_looked_at():
    assert {name.split(".")[0] for name in our_sources()} == set(FOLDERS)
    assert {"globalopt.types", "globalopt.kernels.cholesky"} <= set(our_sources())


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("globalopt.types", "import numpy", "globalopt.types imports numpy"),
        ("globalopt.types", "import torch, bisect", None),
        ("globalopt.errors", "from globalopt.kernels import svd", "imports globalopt.kernels.svd (layer 1)"),
        ("globalopt.kernels.svd", "from ..capture import Gram", "imports globalopt.capture (layer 2)"),
        ("globalopt.kernels.svd", "def f():\n    import solvers.oats", "imports solvers.oats (layer 3)"),
        ("globalopt.kernels.svd", "from globalopt.types import Gram\nimport scipy", None),
        ("globalopt.capture", "from globalopt import pipeline", "imports globalopt.pipeline (layer 4)"),
        ("globalopt.capture", "import globalopt", "imports globalopt (layer 4)"),
        ("globalopt.capture", "from globalopt import types\nfrom .kernels import svd", None),
        ("solvers.oats", "from allocators import uniform", "these folders never import each other"),
        ("solvers.oats", "from .wanda import Wanda\nfrom globalopt.capture import f", None),
        ("solvers", "from .oats import Oats\nfrom .wanda import Wanda", None),
        ("globalopt.cli", "import solvers, reports\nfrom globalopt import pipeline", None),
    ],
)
def test_the_check_sees(module, source, expected):
    names = (
        "globalopt",
        "globalopt.types",
        "globalopt.errors",
        "globalopt.capture",
        "globalopt.pipeline",
        "globalopt.cli",
    )
    names += ("globalopt.kernels", "globalopt.kernels.svd", "solvers", "solvers.oats", "solvers.wanda")
    names += ("allocators", "allocators.uniform", "reports")
    found = violations(dict.fromkeys(names, "") | {module: source})
    if expected is None:
        assert found == []
    else:
        assert len(found) == 1
        assert expected in found[0]


def test_what_only_searches_and_pictures_need_is_not_loaded_to_compress():
    """Optuna, scipy.stats and matplotlib take 50 MiB, which would count towards the peak of every compression."""
    code = "import globalopt.cli, globalopt.commands.compress, globalopt.pipeline, reports, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    assert not {"optuna", "matplotlib", "scipy.stats"} & set(loaded)
