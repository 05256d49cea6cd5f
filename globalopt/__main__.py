"""`python -m globalopt` is the `globalopt` command."""

from __future__ import annotations

from globalopt.commands.interrupts import handle_interrupts


def main() -> None:
    """Run the `globalopt` command; Ctrl-C is handled before anything that takes time is imported."""
    handle_interrupts()
    from globalopt.cli import main as run

    run()


if __name__ == "__main__":
    main()
