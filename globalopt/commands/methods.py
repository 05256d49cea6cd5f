"""`globalopt list`: print all solvers and allocators."""

# Heavy imports are inside the functions: `globalopt --help` must not wait for torch.
from __future__ import annotations

from globalopt.commands.console import errors, out
from globalopt.commands.results import defaults


def list_methods() -> None:
    """Print all solvers and allocators with their papers and options."""
    with errors():
        from rich.table import Table
        from rich.text import Text

        from allocators import ALLOCATORS
        from solvers import SOLVERS

        for kind, option, methods in (("solver", "--set", SOLVERS), ("allocator", "--allocator-set", ALLOCATORS)):
            table = Table(box=None, pad_edge=False)
            for heading in (f"--{kind}", "paper", f"what it does, and what {option} may change"):
                table.add_column(heading, overflow="fold")
            for name, method in methods.items():
                what = (method.__doc__ or "").partition("\n")[0]
                given = defaults(method)
                options = Text(f"\n{' '.join(f'{name}={value}' for name, value in given.items())}", "dim")
                table.add_row(name, method.paper, Text.assemble(what, options if given else ""))
            out.print(table, "", sep="")
