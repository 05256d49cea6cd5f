"""`globalopt doctor`: test this machine and this installation."""

# Heavy imports are inside the functions: `globalopt --help` must not wait for torch.
from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer
from rich.table import Table
from rich.text import Text

from globalopt.commands.console import FAILED, errors, out, print_json
from globalopt.commands.options import Json

if TYPE_CHECKING:
    from globalopt.pipeline.health import Device, Health


def doctor(as_json: Json = False) -> None:
    """Test the packages, devices, dtypes, memory and disk that a run needs; exit with 1 if a required part fails."""
    with errors():
        from dataclasses import asdict

        from globalopt.pipeline.doctor import examine

        health = examine()
        if as_json:
            print_json({**asdict(health), "advice": health.advice, "broken": health.broken})
        else:
            # Not in `reports`: they cannot be imported where torch is broken.
            for part in _tables(health):
                out.print(part, soft_wrap=isinstance(part, Text))
        if health.broken:
            raise typer.Exit(FAILED)


def _tables(health: Health) -> Iterator[Table | Text]:
    """Lay out the findings as tables, and problems and advice as lines."""
    versions = _table("Versions")
    versions.add_row("globalopt", health.globalopt)
    versions.add_row("python", f"{health.python}, {health.system}")
    for part in health.required:
        versions.add_row(part.name, _state(part.version or "", part.problem))
    for part in health.optional:
        missing = f"not installed: {part.install}" if part.version is None else None
        state = _state(part.version or "", missing or part.problem, "yellow")
        versions.add_row(f"{part.name} (optional)", Text.assemble(state, (f"\n{part.enables}", "dim")))
    yield versions
    yield Text()
    machine = _table("Machine")
    for device in health.devices:
        machine.add_row(device.name, device.description)
        machine.add_row("", _size(device.free, device.total))
        machine.add_row("", _products(device))
    machine.add_row("threads", f"{health.threads or '-'} of torch, {health.cores} cores")
    for disk in health.disks:
        machine.add_row(f"disk, {disk.use}", Text(f"{_size(disk.free, disk.total)}  {disk.path}"))
    yield machine
    yield Text()
    if health.checks:
        checks = _table("Tried")
        for check in health.checks:
            checks.add_row(check.name, _state("works", check.problem))
        yield checks
        yield Text()
    for line in health.advice:
        yield Text(line)
    for line in health.broken:
        yield Text.assemble(("broken: ", "bold red"), line)
    if not health.broken:
        yield Text("Everything that is required works.", "bold")


def _table(title: str) -> Table:
    """Make an empty table with a title and dim first column."""
    table = Table(title=Text(title, "bold"), title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _state(good: str, problem: str | None, colour: str = "red") -> Text:
    """Show the problem in colour, or the good state where there is none."""
    return Text(good) if problem is None else Text(problem, colour)


def _products(device: Device) -> Text:
    """List the dtypes that work, with the time of a small product, and those that do not, with the reason."""
    parts = []
    for product in device.products:
        if product.seconds is None:
            parts.append(Text(f"{product.dtype}: {product.problem}", "yellow"))
        else:
            parts.append(Text(f"{product.dtype} {product.seconds * 1e3:.2g} ms"))
    return Text(", ").join(parts)


def _size(free: int | None, total: int | None) -> str:
    """Format free and total bytes in GiB."""
    if free is None or total is None:
        return "-"
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
