"""`globalopt list`: print all solvers and allocators, or the options of one method."""

# Heavy imports are inside the functions: `globalopt --help` must not wait for torch.
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from globalopt.commands.console import errors, out

if TYPE_CHECKING:
    from globalopt.commands.explanations import Explained

MATCHING, DISTILLATION = "matching", "distillation"


@dataclass(frozen=True)
class _Method:
    """Hold a method that has options, and the option of the commands that sets them."""

    kind: str
    setting: str
    cls: type[Any]
    paper: str = ""
    says: str = ""
    extra: tuple[Explained, ...] = ()


def list_methods(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A solver, an allocator, `matching` (--match-set) or `distillation` (--distill-set), whose options "
            "are then printed.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print all solvers and allocators, or the options of one method with their values, defaults and meanings."""
    with errors():
        from globalopt.errors import UnknownNameError

        methods = _methods()
        if name is None:
            _print_all(methods)
        elif name in methods:
            _print_options(name, methods[name])
        else:
            raise UnknownNameError("method", name, methods)


def _methods() -> Mapping[str, _Method]:
    """Map the names of everything that has options of its own."""
    from allocators import ALLOCATORS
    from globalopt.commands.explanations import Explained
    from globalopt.matching.block import PRESETS, Matching
    from globalopt.matching.model import Distillation
    from solvers import SOLVERS

    preset = Explained("preset", ", ".join(PRESETS), "default", "values of all options that are not given.")
    blocks = "Train what every block keeps to reproduce the outputs of the dense block on the same inputs."
    whole = "Train what the whole model keeps to reproduce the predictions of the dense model."
    return {
        **{name: _Method("solver", "--set", cls, cls.paper) for name, cls in SOLVERS.items()},
        **{name: _Method("allocator", "--allocator-set", cls, cls.paper) for name, cls in ALLOCATORS.items()},
        MATCHING: _Method(
            "training of every block, --match block or model", "--match-set", Matching, says=blocks, extra=(preset,)
        ),
        DISTILLATION: _Method("training of the whole model, --match model", "--distill-set", Distillation, says=whole),
    }


def _print_all(methods: Mapping[str, _Method]) -> None:
    """Print what every solver and every allocator does."""
    from rich.table import Table

    from globalopt.commands.explanations import sentence

    for kind in ("solver", "allocator"):
        table = Table(box=None, pad_edge=False)
        table.add_column(f"--{kind}", no_wrap=True)
        table.add_column("what it does", overflow="fold")
        table.add_column("paper", style="dim", no_wrap=True)
        for name, method in methods.items():
            if method.kind == kind:
                table.add_row(name, sentence(method.cls), method.paper)
        out.print(table, "", sep="")
    out.out(
        "globalopt list NAME prints the options of a solver (--set) or of an allocator (--allocator-set);\n"
        f"globalopt list {MATCHING} those of --match-set, globalopt list {DISTILLATION} those of --distill-set.",
        highlight=False,
    )


def _print_options(name: str, method: _Method) -> None:
    """Print what a method does, and its options."""
    from rich.table import Table
    from rich.text import Text

    from globalopt.commands.explanations import options, sentence

    source = f", {method.paper}" if method.paper else ""
    out.print(Text.assemble((name, "bold"), f" ({method.kind}{source})"), soft_wrap=True)
    out.print(Text(method.says or sentence(method.cls)), soft_wrap=True)
    found = [*method.extra, *options(method.cls)]
    if not found:
        out.out("It has no options.", highlight=False)
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("option", no_wrap=True)
    table.add_column("takes", overflow="fold", max_width=24)
    table.add_column("default", no_wrap=True)
    table.add_column("meaning", overflow="fold")
    for option in found:
        table.add_row(*map(Text, (option.name, option.takes, option.default, option.meaning.replace("`", ""))))
    out.print("", table, sep="\n")
    given = next((option for option in found if option.default), found[0])
    out.out(
        f"\nSet them with {method.setting} OPTION=VALUE[,...], such as {given.name}={given.default}.", highlight=False
    )
